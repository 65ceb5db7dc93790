"""A graph whose batch was left open computes for every batch what the captured graph computes row by row."""

from __future__ import annotations

import functools
import importlib.util
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from depthwire.artifact import MODEL, Artifact
from depthwire.errors import InternalError, UsageError
from depthwire.export.to_onnx import to_onnx
from depthwire.runtime import _batch_axes
from depthwire.runtime._batch_profile import BATCH, open_batch
from depthwire.runtime._route_network import network_model
from depthwire.runtime._route_profile import SLOTS
from depthwire.runtime.target import load_target
from depthwire.runtime.tensorrt_rtx import build
from depthwire.runtime.tolerances import tolerance
from tests.export.tiny import VOCABULARY, lifted
from tests.routed_tiny import TOKENS, captured, routed, write_routed
from tests.runtime.precision_models import program

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from depthwire.runtime._batch_call import Call

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="the builder is needed: pip install 'depthwire[rtx]'"
)

Feed = dict[str, "NDArray[Any]"]

RESIDUALS = {"plain": None, "block": "block:3", "full": "full"}
ROUTED: dict[str, dict[str, Any]] = {
    "budget": {},
    "top-k": {"rule": "top-k"},
    "windows": {"score": "timescale", "gate": "sigmoid", "rule": "top-k", "window": 8, "fallback": "linear"},
    "surprise": {"score": "surprise", "gate": "surprise", "unit": "mlp", "fallback": "swiglu"},
    "all-keys": {"keys_values": "all", "split": True},
}


@functools.cache
def graph(name: str, batch: int) -> onnx.ModelProto:
    if name in RESIDUALS:
        program = lifted(captured(TOKENS, batch), RESIDUALS[name])
    else:
        program = routed(batch=batch, target="decomposed", **ROUTED[name])
    return ir.to_proto(to_onnx(program))


def session(model: onnx.ModelProto | str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, folder / MODEL)
    return folder / MODEL


def tokens(batch: int) -> NDArray[np.int64]:
    return np.random.default_rng(batch).integers(0, VOCABULARY, (batch, TOKENS))


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def assert_rows_equal(static: onnx.ModelProto, opened: onnx.ModelProto, captured_batch: int) -> None:
    """Compare all outputs row by row; selections (which slots, which tokens) must be equal bit by bit."""
    selected = [name for node in static.graph.node if "Select" in node.op_type for name in node.output[:2]]
    one, other = session(with_outputs(static, selected)), session(with_outputs(opened, selected))
    names = [output.name for output in other.get_outputs()]
    for batch in (1, 2, 5):
        ids = tokens(batch)
        found = dict(zip(names, other.run(names, {"input_ids": ids}), strict=True))
        for row in range(batch):
            repeated = np.repeat(ids[row : row + 1], captured_batch, 0)
            for name, value in zip(names, one.run(names, {"input_ids": repeated}), strict=True):
                assert found[name].shape == (batch, *value.shape[1:])
                if name in selected:
                    assert np.array_equal(found[name][row], value[0])
                else:
                    allowed = tolerance("float32", "logits").allowed(float(np.abs(value).max()))
                    assert np.abs(found[name][row] - value[0]).max() <= allowed


CASES = [(name, 1) for name in (*RESIDUALS, *ROUTED)] + [(name, 2) for name in ("block", "budget", "windows")]


@pytest.mark.parametrize(("name", "captured_batch"), CASES)
def test_rows_of_every_batch_are_those_of_the_captured_graph(name: str, captured_batch: int, tmp_path: Path) -> None:
    static = graph(name, captured_batch)
    opened = open_batch(saved(tmp_path, static))
    assert_rows_equal(static, opened.model, captured_batch)
    onnx.checker.check_model(opened.model)
    assert opened.inputs == {"input_ids": ((captured_batch, TOKENS), 0)}
    assert opened.profile(8) == {"input_ids": ((1, TOKENS), (8, TOKENS), (8, TOKENS))}
    assert [value.name for value in opened.model.graph.input] == ["input_ids"]
    dims = opened.model.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == [BATCH, TOKENS, VOCABULARY]


def test_narrow_graphs_are_followed_through_their_casts(tmp_path: Path) -> None:
    static = ir.to_proto(to_onnx(program("block", torch.float16)))
    one, other = session(static), session(open_batch(saved(tmp_path, static)).model)
    ids = tokens(5)
    found = other.run(None, {"input_ids": ids})[0]
    for row in range(5):
        value = one.run(None, {"input_ids": ids[row : row + 1]})[0][0]
        allowed = tolerance("float16", "logits").allowed(float(np.abs(value).max()))
        assert np.abs(found[row] - value).max() <= allowed


def test_weights_stay_where_they_are(tmp_path: Path) -> None:
    model = graph("block", 1)
    onnx.save(model, tmp_path / MODEL, save_as_external_data=True, location="weights", size_threshold=512)
    opened = open_batch(tmp_path / MODEL).model
    assert opened.ByteSize() < 0.5 * (tmp_path / "weights").stat().st_size
    (tmp_path / "open.onnx").write_bytes(opened.SerializeToString())
    assert session(str(tmp_path / "open.onnx")).run(None, {"input_ids": tokens(3)})[0].shape[0] == 3


@pytest.mark.parametrize("rule", ["budget"])
def test_batch_and_capacity_may_both_be_open(rule: str, tmp_path: Path) -> None:
    shares = (Fraction(1, 8), Fraction(3, 4), Fraction(1))
    artifact = write_routed(tmp_path / "out", shares, target="decomposed", rule=rule)
    with network_model(artifact, route_inputs=False, all_capacities=True, max_batch=6) as (model, profile):
        both = session(str(model))
    assert profile["input_ids"] == ((1, TOKENS), (6, TOKENS), (6, TOKENS))
    for share in shares:
        name = {Fraction(1, 8): "model.c12.5.onnx", Fraction(3, 4): "model.c75.onnx"}.get(share, "model.c100.onnx")
        static = session(str(artifact.path(name)))
        ids = tokens(5)
        slots = min(int(share * TOKENS) + (rule == "budget"), TOKENS)
        tables = {
            "route_thresholds": np.full(2, 0.1, np.float32),
            "route_budgets": np.array([[share.numerator, share.denominator, 1]] * 2),
        }
        wide = {**tables, "route_states": np.zeros((2, 5, 2), np.int64)} if rule == "budget" else {}
        found = both.run(None, {"input_ids": ids, **wide, SLOTS: np.arange(slots)})[0]
        for row in range(5):
            given = {**tables, "route_states": np.zeros((2, 2, 2), np.int64)} if rule == "budget" else {}
            value = static.run(None, {"input_ids": np.repeat(ids[row : row + 1], 2, 0), **given})[0]
            allowed = tolerance("float32", "logits").allowed(float(np.abs(value).max()))
            assert np.abs(found[row] - value[0]).max() <= allowed


def test_counts_of_running_budgets_may_be_an_input_with_a_batch(tmp_path: Path) -> None:
    opened = open_batch(saved(tmp_path, graph("budget", 1)), tables_are_inputs=True)
    assert opened.profile(4)["route_states"] == ((2, 1, 2), (2, 4, 2), (2, 4, 2))
    names = {value.name for value in opened.model.graph.input}
    assert names == {"input_ids", "route_thresholds", "route_budgets", "route_states"}
    assert names.isdisjoint(tensor.name for tensor in opened.model.graph.initializer)


FLOATS = np.random.default_rng(0).standard_normal


def small(folder: Path, nodes: Sequence[onnx.NodeProto], out: Sequence[int], weights: Feed, rows: int = 1) -> Path:
    """Write a graph from x [rows, 4, 6] to y."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 4, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(out))
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], constants), ir_version=10)
    model.opset_import[0].version = 23
    onnx.checker.check_model(model, full_check=True)
    return saved(folder, model)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


Nodes = list["onnx.NodeProto"]
ONE = helper.make_node


def branching() -> onnx.NodeProto:
    """An If whose branches see x without naming it as an operand."""
    inner = [
        helper.make_graph(
            [ONE(kind, ["x"], [kind])], kind, [], [helper.make_tensor_value_info(kind, TensorProto.FLOAT, [1, 4, 6])]
        )
        for kind in ("Relu", "Neg")
    ]
    return ONE("If", ["c"], ["y"], then_branch=inner[0], else_branch=inner[1])


# What mixes rows of the batch, or cannot be told: nodes, shape of the result, constants, batch, what the refusal says.
REFUSED: dict[str, tuple[Nodes, list[int], Feed, int, str]] = {
    "mean": ([ONE("ReduceMean", ["x", "a"], ["y"], keepdims=1)], [1, 4, 6], {"a": ints(0)}, 1, "reduces over"),
    "mean of all": ([ONE("ReduceMean", ["x"], ["y"], keepdims=1)], [1, 1, 1], {}, 1, "reduces over"),
    "softmax": ([ONE("Softmax", ["x"], ["y"], axis=0)], [2, 4, 6], {}, 2, "along axis 0"),
    "slice": (
        [ONE("Slice", ["x", "z", "o", "z"], ["y"])],
        [1, 4, 6],
        {"z": ints(0), "o": ints(1)},
        2,
        "takes a part of the batch",
    ),
    "drop": ([ONE("Squeeze", ["x", "a"], ["y"])], [4, 6], {"a": ints(0)}, 1, "reduces over the batch"),
    "drop all": ([ONE("Squeeze", ["x"], ["y"])], [4, 6], {}, 1, "drops every axis of one element"),
    "repeat": ([ONE("Expand", ["x", "s"], ["y"])], [3, 4, 6], {"s": ints(3, 4, 6)}, 1, "repeats the batch"),
    "rows that differ": (
        [ONE("Add", ["x", "c"], ["y"])],
        [2, 4, 6],
        {"c": np.arange(48, dtype=np.float32).reshape(2, 4, 6)},
        2,
        "which no input decides",
    ),
    "merged": (
        [ONE("Reshape", ["x", "s"], ["f"]), ONE("Add", ["f", "c"], ["y"])],
        [4, 6],
        {"s": ints(4, 6), "c": np.ones((4, 6), np.float32)},
        1,
        "merged with it",
    ),
    "crossed": (
        [ONE("Transpose", ["x"], ["t"], perm=[1, 0, 2]), ONE("Add", ["x", "t"], ["y"])],
        [4, 4, 6],
        {},
        4,
        "in different places",
    ),
    "rows multiplied": (
        [ONE("Reshape", ["x", "s"], ["f"]), ONE("Transpose", ["f"], ["t"]), ONE("MatMul", ["f", "t"], ["y"])],
        [4, 4],
        {"s": ints(4, 6)},
        1,
        "different places",
    ),
    "inside": ([branching()], [1, 4, 6], {"c": np.array(True)}, 1, "a graph of its own"),
    "unknown": ([ONE("Shape", ["x"], ["s"]), ONE("Cast", ["s"], ["y"], to=1)], [3], {}, 1, "nothing is known"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=list(REFUSED))
def test_what_mixes_rows_is_refused_by_name(case: tuple[Nodes, list[int], Feed, int, str], tmp_path: Path) -> None:
    nodes, out, weights, rows, said = case
    with pytest.raises(UsageError) as caught:
        open_batch(small(tmp_path, nodes, out, weights, rows))
    assert caught.value.code == "build.batch-not-followed"
    assert said in (caught.value.got or "")
    assert any(f"({node.op_type})" in (caught.value.at or "") for node in nodes)


F32 = np.float32
# What can be followed although it is not obvious: nodes, shape of the result, constants, captured batch.
FOLLOWED: dict[str, tuple[Nodes, list[int], Feed, int]] = {
    "merged and parted": (
        [ONE("Reshape", ["x", "s"], ["f"]), ONE("Gemm", ["f", "w", "b"], ["g"]), ONE("Reshape", ["g", "t"], ["y"])],
        [2, 4, 3],
        {"s": ints(8, 6), "w": FLOATS((6, 3)).astype(F32), "b": FLOATS(3).astype(F32), "t": ints(2, -1, 3)},
        2,
    ),
    "another axis of one": (
        [ONE("Reshape", ["x", "s"], ["f"]), ONE("ReduceSum", ["f", "a"], ["y"], keepdims=0)],
        [1, 4, 6],
        {"s": ints(1, 1, 4, 6), "a": ints(1)},
        1,
    ),
    "a row for each": (
        [ONE("Add", ["x", "c"], ["a"]), ONE("Concat", ["a", "c"], ["y"], axis=1)],
        [2, 8, 6],
        {"c": np.broadcast_to(FLOATS((4, 6)), (2, 4, 6)).astype(F32)},
        2,
    ),
    "a class token": ([ONE("Concat", ["c", "x"], ["y"], axis=1)], [1, 5, 6], {"c": FLOATS((1, 1, 6)).astype(F32)}, 1),
    "moved behind": (
        [ONE("Transpose", ["x"], ["t"], perm=[2, 1, 0]), ONE("Reshape", ["t", "s"], ["y"])],
        [24, 2],
        {"s": ints(24, 2)},
        2,
    ),
    "patches": (
        [ONE("Reshape", ["x", "s"], ["i"]), ONE("Conv", ["i", "k"], ["c"]), ONE("Flatten", ["c"], ["y"])],
        [1, 10],
        {"s": ints(1, 1, 4, 6), "k": FLOATS((2, 1, 4, 2)).astype(F32)},
        1,
    ),
    "groups repeated": (
        [ONE("Unsqueeze", ["x", "a"], ["u"]), ONE("Expand", ["u", "s"], ["e"]), ONE("Reshape", ["e", "t"], ["y"])],
        [1, 12, 6],
        {"a": ints(2), "s": ints(1, 4, 3, 6), "t": ints(1, 12, 6)},
        1,
    ),
    "best of each": (
        [ONE("TopK", ["x", "k"], ["v", "i"]), ONE("GatherElements", ["x", "i"], ["y"], axis=2)],
        [1, 4, 2],
        {"k": ints(2)},
        1,
    ),
}


@pytest.mark.parametrize("case", FOLLOWED.values(), ids=list(FOLLOWED))
def test_what_keeps_rows_apart_is_followed(case: tuple[Nodes, list[int], Feed, int], tmp_path: Path) -> None:
    nodes, out, weights, rows = case
    path = small(tmp_path, nodes, out, weights, rows)
    static, opened = session(str(path)), session(open_batch(path).model)
    axis = 1 if nodes[0].op_type == "Transpose" else 0
    for batch in (1, 2, 5):
        x = FLOATS((batch, 4, 6)).astype(F32)
        found = opened.run(None, {"x": x})[0]
        for row in range(batch):
            value = static.run(None, {"x": np.repeat(x[row : row + 1], rows, 0)})[0]
            np.testing.assert_allclose(found.take(row, axis), value.take(0, axis), rtol=1e-6, atol=1e-6)


def test_a_reshape_that_keeps_the_captured_batch_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = _batch_axes._RULES["Reshape"]

    def sabotaged(call: Call) -> Any:
        found = right(call)
        call.target = None
        return found

    monkeypatch.setitem(_batch_axes._RULES, "Reshape", sabotaged)
    with pytest.raises(InternalError) as caught:
        open_batch(saved(tmp_path, graph("block", 2)))
    assert caught.value.code == "build.batch-shapes"


def test_rows_that_are_mixed_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Teeth of the comparison: a rule that lets a mean over the batch pass gives other numbers.
    static = graph("plain", 2)
    mixed = onnx.ModelProto()
    mixed.CopyFrom(static)
    mixed.graph.node.insert(1, ONE("ReduceMean", ["embedding", "rows"], ["mean"], keepdims=1))
    mixed.graph.node.insert(2, ONE("Sub", ["embedding", "mean"], ["centred"]))
    mixed.graph.initializer.append(numpy_helper.from_array(ints(0), "rows"))
    mixed.graph.node[3].input[0] = "centred"
    path = saved(tmp_path, mixed)
    with pytest.raises(UsageError):
        open_batch(path)
    monkeypatch.setitem(_batch_axes._RULES, "ReduceMean", lambda _: None)
    monkeypatch.setattr("depthwire.runtime._batch_profile.check_shapes", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_rows_equal(mixed, open_batch(path).model, 2)


@needs_builder
@pytest.mark.parametrize("rule", ["budget", "top-k"])
def test_one_engine_serves_batches(rule: str, tmp_path: Path) -> None:
    artifact = write_routed(tmp_path / "out", target="decomposed", rule=rule)
    info = build(artifact, load_target("rtx"), compute_capabilities=["SM86", "SM120"], max_batch=8)
    assert info.profile == {"input_ids": [[1, TOKENS], [8, TOKENS], [8, TOKENS]]}
    assert "Batches of 1 to 8, tuned for 8." in info.notes
    assert Artifact.load(artifact.root).manifest.engines["rtx"] == info
    assert [path.name for path in artifact.root.iterdir() if path.name.startswith(".")] == []
