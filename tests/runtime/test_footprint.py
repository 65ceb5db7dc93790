"""What is predicted of an engine, against counts by hand and against engines that were built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import depthwire
from depthwire.errors import BuildError
from depthwire.passes.analysis import quantization
from depthwire.runtime.footprint import (
    EIGHT_BIT_SHARE,
    INT4_BLOCK,
    footprint,
    own_precision,
    problems,
    read_model,
    require_fits,
    weight_bytes,
)
from depthwire.runtime.target import Precision, load_target
from tests.routed_tiny import write_routed
from tests.runtime.engine_models import artifact_of, read_function, save, tiny, transformer, value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from depthwire._options import Options
    from depthwire.runtime._onnx_memory import ModelFacts

ROOT = Path(__file__).parents[2]
RTX = load_target("rtx")
SIZE = {"layers": 2, "width": 32, "hidden": 48, "vocabulary": 100, "length": 16}
LINEAR = SIZE["layers"] * (4 * 32 * 32 + 3 * 32 * 48)
EMBEDDING = 2 * 100 * 32
# Scales and a mask of 16 x 16 beside the norms.
REST = SIZE["layers"] * 2 * 32 + 16 * 16 + 1
FIXED = 8 * (4 + 3)


def facts_of(folder: Path, dtype: type[np.floating[Any]] = np.float32) -> ModelFacts:
    return read_model(transformer(folder, **SIZE, dtype=dtype))


def test_weights_by_what_they_are_for(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    weights = facts.weights
    assert (weights.linear, weights.embedding, weights.rest, weights.fixed) == (LINEAR, EMBEDDING, REST, FIXED)
    assert weights.channels == SIZE["layers"] * (5 * 32 + 2 * 48)
    assert weights.stored == 4 * (LINEAR + EMBEDDING + REST) + FIXED
    assert own_precision(facts) == "fp32"
    assert facts.interface == 16 * 8 + 16 * 100 * 4


def test_stacked_experts_are_no_linear_layer(tmp_path: Path) -> None:
    experts = numpy_helper.from_array(np.ones((3, 8, 4), np.float32), "experts")
    nodes = [
        helper.make_node("MatMul", ["x", "experts"], ["m"], name="product"),
        helper.make_node("Relu", ["m"], ["y"], name="relu"),
    ]
    x, y = value("x", 1, 8), value("y", 3, 1, 4)
    weights = read_model(save(tmp_path / "model.onnx", nodes, inputs=[x], outputs=[y], weights=[experts])).weights
    assert (weights.linear, weights.rest, weights.stored) == (0, 3 * 8 * 4, 4 * 3 * 8 * 4)


def test_what_another_precision_would_make_of_them(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    rest = 2 * (EMBEDDING + REST) + FIXED
    found = {kind: weight_bytes(facts, kind, 4 if kind == "fp32" else 2) for kind in get_args(Precision)}
    assert found == {
        "fp32": facts.weights.stored,
        "fp16": 2 * LINEAR + rest,
        "bf16": 2 * LINEAR + rest,
        "int8": LINEAR + 2 * facts.weights.channels + rest,
        # One half with 4 bits and a scale a block, the other with 8 bits and a scale a channel.
        "int4-weights": round(
            0.5 * (LINEAR / 2 + 2 * LINEAR / 64) + 0.5 * (LINEAR + 2 * facts.weights.channels) + rest
        ),
    }


def test_the_quantizer_is_the_one_that_is_predicted() -> None:
    assert (INT4_BLOCK, EIGHT_BIT_SHARE) == (quantization.BLOCK, quantization.EIGHT_BIT_SHARE)


def test_a_conversion_is_predicted_as_it_turns_out(tmp_path: Path) -> None:
    for name in ("wide", "half"):
        (tmp_path / name).mkdir()
    wide, half = facts_of(tmp_path / "wide"), facts_of(tmp_path / "half", np.float16)
    foreseen, found = footprint(wide, RTX, "fp16"), footprint(half, RTX)
    assert (foreseen.own, found.own, found.precision) == (False, True, "fp16")
    assert foreseen.weight_bytes == found.weight_bytes
    assert foreseen.engine_bytes == found.engine_bytes
    assert foreseen.activation_bytes == found.activation_bytes
    assert foreseen.build_bytes == found.build_bytes


def dequantized(folder: Path, kind: int, block: int) -> Path:
    """One product with a weight ``[64, 8]`` of integers, beside a norm's gain."""
    shape = (64 // block, 8) if block else (8,)
    weight = helper.make_tensor("q", kind, (64, 8), np.zeros((64, 8), np.int8).flatten())
    scale = numpy_helper.from_array(np.ones(shape, np.float16), "scale")
    gain = numpy_helper.from_array(np.ones(64, np.float16), "gain")
    extra: dict[str, Any] = {"block_size": block} if block else {}
    nodes = [
        helper.make_node("Mul", ["x", "gain"], ["n"], name="gained"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], name="dq", axis=0 if block else 1, **extra),
        helper.make_node("MatMul", ["n", "w"], ["m"], name="product"),
        helper.make_node("Relu", ["m"], ["y"], name="relu"),
    ]
    x, y = (value(name, 1, 4, width, dtype=TensorProto.FLOAT16) for name, width in (("x", 64), ("y", 8)))
    return save(folder / "model.onnx", nodes, inputs=[x], outputs=[y], weights=[weight, scale, gain])


@pytest.mark.parametrize(
    ("kind", "block", "precision", "stored"),
    [
        (TensorProto.INT8, 0, "int8", 64 * 8 + 2 * 8),
        (TensorProto.INT4, 32, "int4-weights", 64 * 8 // 2 + 2 * 2 * 8),
    ],
)
def test_a_quantized_graph_is_recognised(
    kind: int, block: int, precision: Precision, stored: int, tmp_path: Path
) -> None:
    facts = read_model(dequantized(tmp_path, kind, block))
    assert own_precision(facts) == precision
    assert facts.weights.stored == stored + 64 * 2
    assert footprint(facts, RTX).weight_bytes == stored + 64 * 2
    # Back to half precision: the integers become numbers and the scales go.
    assert footprint(facts, RTX, "fp16").weight_bytes == 2 * 64 * 8 + 64 * 2
    if precision == "int8":  # what is predicted for the same precision is what the file has
        assert weight_bytes(facts, precision, 2) == stored + 64 * 2


def chain(folder: Path, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], functions: bool = False) -> ModelFacts:
    """A graph over values ``[1, 8]`` of 32 bytes, of which ``big`` is ``[1000, 8]``."""
    weights = [numpy_helper.from_array(np.ones((1000, 1), np.float32), "column")]
    return read_model(
        save(
            folder / "model.onnx",
            list(nodes),
            inputs=[value("x", 1, 8)],
            outputs=[value(name, 1, 8) for name in outputs],
            weights=weights,
            functions=[read_function()] if functions else [],
        )
    )


def test_values_live_from_their_maker_to_their_last_reader(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="a"),
        helper.make_node("Mul", ["a", "column"], ["big"], name="big"),
        helper.make_node("Flatten", ["big"], ["view"], name="view"),
        helper.make_node("ReduceMax", ["view"], ["b"], name="b", keepdims=1),
        helper.make_node("Add", ["b", "a"], ["y"], name="y"),
    ]
    facts = chain(tmp_path, nodes, ["y"])
    # a, big and b together; x and y are the caller's, the view is big itself.
    assert facts.peaks[0] == (32 + 32000 + 4, "b")
    assert facts.peaks[2] == (16 + 16000 + 2, "b")


def test_a_call_needs_its_inputs_once_more(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="a"),
        helper.make_node("Read", ["a", "x"], ["r"], name="read", domain="depthwire"),
        helper.make_node("Relu", ["r"], ["y"], name="y"),
    ]
    facts = chain(tmp_path, nodes, ["y"], functions=True)
    assert facts.calls == 1
    assert facts.peaks[0] == (32 + 32 + 2 * 32, "read")


def test_run_and_load_and_build_are_the_stated_sums(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    board, card = load_target("jetson-orin-nano-8"), load_target("h100")
    on_board, on_card = footprint(facts, board), footprint(facts, card)
    engine = on_board.engine_bytes
    assert engine is not None
    assert engine == on_card.engine_bytes
    values = on_board.activation_bytes + facts.interface
    assert on_board.run_bytes == engine + values + board.context_bytes
    assert on_board.loading_bytes == on_board.run_bytes + engine
    assert on_card.loading_bytes == on_card.run_bytes
    assert board.memory is not None
    process = board.memory.predict(
        weight_bytes=facts.graph.weight_bytes, products=facts.graph.products, nodes=facts.graph.nodes
    )
    assert board.workspace_bytes is not None
    assert on_board.build_bytes == process + board.workspace_bytes + values + board.context_bytes
    assert on_card.build_bytes == process
    assert on_card.build_device_bytes == facts.graph.weight_bytes + values + card.context_bytes
    cpu = load_target("ort-cpu")
    here = footprint(facts, cpu)
    # convert leaves the rest of a quantised model in fp32 there.
    assert (
        footprint(facts, cpu, "int8").embedding_bytes
        == 4 * EMBEDDING
        == 2 * footprint(facts, RTX, "int8").embedding_bytes
    )
    assert (here.engine_bytes, here.build_bytes) == (None, None)
    assert here.run_bytes == facts.weights.stored + values


def wide_selection(folder: Path, count: int) -> ModelFacts:
    k = numpy_helper.from_array(np.array([count], np.int64), "k")
    node = helper.make_node("TopK", ["x", "k"], ["best", "index"], name="topk")
    entry = node.metadata_props.add()
    entry.key, entry.value = "depthwire.module", "layers.3.router"
    best, index = value("best", 1, count), value("index", 1, count, dtype=TensorProto.INT64)
    file = save(folder / "model.onnx", [node], inputs=[value("x", 1, 5000)], outputs=[best, index], weights=[k])
    return read_model(file)


@pytest.mark.parametrize("name", ["rtx", "jetson-agx-orin", "h100"])
def test_a_selection_beyond_topk_names_the_layer_and_the_limit(name: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        require_fits(load_target(name), wide_selection(tmp_path, 3841))
    error = caught.value
    assert error.code == "target.topk-limit"
    assert "topk (module layers.3.router)" in (error.at or "")
    assert "3840" in (error.want or "")
    assert "3841 of 5000" in (error.got or "")
    require_fits(load_target(name), wide_selection(tmp_path, 3840))
    require_fits(load_target("ort-cpu"), wide_selection(tmp_path, 3841))


def test_token_selections_count_as_their_topk_does(tmp_path: Path) -> None:
    artifact = write_routed(tmp_path / "a", rule="topk")
    facts = read_model(artifact.model)
    assert [(each.k, each.of) for each in facts.selections] == [(8, 16), (8, 16)]
    assert "layers.1" in facts.selections[0].module
    narrow = RTX.model_copy(update={"topk_limit": 7})
    with pytest.raises(BuildError, match="selects more than TopK"):
        require_fits(narrow, facts)


@pytest.mark.parametrize("steps", [["Building"], ["Building", "Loading"], ["Building", "Loading", "Running"]])
def test_memory_that_a_board_does_not_have(steps: list[str], tmp_path: Path) -> None:
    facts = read_model(tiny(tmp_path))
    board = load_target("jetson-orin-nano-4")
    needs = footprint(facts, board)
    needed = {"Building": needs.build_bytes, "Loading": needs.loading_bytes, "Running": needs.run_bytes}[steps[-1]]
    assert needed is not None
    short = board.model_copy(update={"memory_bytes": needed - 1 + board.reserved_bytes})
    assert [each.what.split()[0] for each in problems(short, facts, needs)] == steps
    with pytest.raises(BuildError) as caught:
        require_fits(short, facts)
    assert caught.value.code == "target.memory-limit"
    assert "1.20 GB for the system" in (caught.value.want or "")
    assert "of weights" in (caught.value.at or "")
    exact = board.model_copy(update={"memory_bytes": needed + board.reserved_bytes})
    assert [each.what.split()[0] for each in problems(exact, facts, needs)] == steps[:-1]
    require_fits(board, facts)


def test_a_card_must_hold_what_runs_on_it(tmp_path: Path) -> None:
    facts = read_model(tiny(tmp_path))
    card = load_target("h100").model_copy(update={"memory_bytes": 1_000_000_000, "reserved_bytes": 600_000_000})
    found = problems(card, facts, footprint(facts, card))
    assert [each.what.split()[0] for each in found] == ["Building", "Running"]


def engine_error(built: int) -> float:
    """The bound that footprint.py states for engines that its coefficients were not fitted on."""
    return 0.07 if built > 10e6 else 0.15


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
def test_the_size_of_an_engine_that_was_not_fitted_on(dtype: type[np.floating[Any]], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from depthwire.runtime.tensorrt_rtx import build

    transformer(tmp_path, layers=5, width=320, hidden=960, vocabulary=3000, dtype=dtype)
    artifact = artifact_of(tmp_path)
    predicted = footprint(read_model(artifact.model), RTX).engine_bytes
    built = build(artifact, RTX, compute_capabilities=["SM89"]).bytes
    assert built > 10e6
    assert predicted == pytest.approx(built, rel=engine_error(built))


def test_the_size_of_a_routed_engine_that_was_not_fitted_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    source = ROOT / "tests/data/routed_small/subjective_depth"
    options: Options = {"dtype": "fp16", "seq_len": 32, "target": "rtx", "verify": False}
    options["compute_capabilities"] = ["SM120"]
    result = depthwire.convert(source, tmp_path / "a", **options)
    assert result.engine is not None
    predicted = footprint(read_model(result.artifact.model), RTX).engine_bytes
    assert predicted == pytest.approx(result.engine.bytes, rel=engine_error(result.engine.bytes))
