"""That the library's kernels run, in place of the bodies, the same on any number of threads; and how it is found."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import depthwire
from depthwire.errors import BuildError
from depthwire.runtime import native
from depthwire.runtime.native import OPS_ENTRY, instruction_set, ops_entry
from tests.attn_res_cases import Case, TwoPhaseCase, expected, operands, two_phase_operands
from tests.runtime.native.one_node import (
    DOMAIN,
    Node,
    model_of,
    read_node,
    run,
    run_session,
    session_of,
    two_phase_nodes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


def profiled(session: onnxruntime.InferenceSession, nodes: Sequence[Node]) -> set[str]:
    """The operators that a run executes, by ONNX Runtime's own profile."""
    run_session(session, nodes)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return {event["args"]["op_name"] for event in events if event.get("cat") == "Node"}


def with_wrong_body(model: onnx.ModelProto, node: Node) -> onnx.ModelProto:
    """The model with a function body that returns its first source."""
    names = list(node.inputs)
    body = helper.make_function(
        DOMAIN,
        node.op_type,
        names,
        ["out"],
        [helper.make_node("Identity", ["source_0"], ["out"])],
        [helper.make_opsetid("", 23)],
        list(node.attributes),
    )
    model.functions.append(body)
    return model


def test_the_kernel_runs_and_not_the_body(tmp_path: Path) -> None:
    case = Case(9, 64, norm=True)
    tensors = operands(case)
    node = read_node(case, tensors)
    model = with_wrong_body(model_of([node]), node)
    session = session_of(model, profile=str(tmp_path / "kernel"))
    operators = profiled(session, [node])
    assert "AttnResReadNorm_9" in operators
    assert "Identity" not in operators
    exact, _ = expected(case, tensors)
    torch.testing.assert_close(run([node])["out"].double(), exact, rtol=1e-4, atol=1e-5)

    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "body")
    bare = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert torch.equal(run_session(bare, [node])["out"], tensors.sources[0])
    assert "AttnResReadNorm_9" not in profiled(bare, [node])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_change_no_bit(dtype: str) -> None:
    case = Case(9, 576, dtype, rows=512, norm=True, add=True)  # enough rows that they are split into tasks
    node = read_node(case, operands(case))
    one, two, three = (run([node], threads=threads) for threads in (1, 2, 3))
    for name in ("out", "sum"):
        assert torch.equal(one[name], two[name])
        assert torch.equal(one[name], three[name])
    phases = TwoPhaseCase(9, 5, 3, 576, dtype, rows=200, index=3)
    nodes = two_phase_nodes(phases, *two_phase_operands(phases))
    alone, together = (run(nodes, threads=threads) for threads in (1, 2))
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_memory_that_is_used_again_changes_nothing() -> None:
    """A chain of reads in which ONNX Runtime puts ``out`` and ``sum`` where the last source and delta were."""
    generator = np.random.default_rng(0)
    feeds = {name: generator.standard_normal((40, 576)).astype(np.float32) for name in ("a", "b", "partial", "delta")}
    weights = {name: generator.standard_normal(576).astype(np.float32) / 8 for name in ("query", "gain")}
    nodes, partial, delta = [], "partial", "delta"
    for k in range(6):
        inputs, outputs = ["query", "gain", "a", "b", partial, delta], [f"out{k}", f"sum{k}"]
        node = helper.make_node("AttnResAddReadNorm_3", inputs, outputs, domain=DOMAIN, eps=1e-6, norm_eps=1e-6)
        nodes.append(node)
        delta, partial = outputs
    rows = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 576]) for name in feeds]

    def outputs_of(names: list[str]) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        graph = helper.make_graph(
            nodes,
            "chain",
            rows,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 576]) for name in names],
            [helper.make_tensor(name, TensorProto.FLOAT, [576], value) for name, value in weights.items()],
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
        session = session_of(helper.make_model(graph, opset_imports=opsets, ir_version=10), threads=2)
        found: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = session.run(names, feeds)
        return found

    # A value that is a graph output keeps memory of its own.
    every = [name for node in nodes for name in node.output]
    apart = dict(zip(every, outputs_of(every), strict=True))
    for name, value in zip(("out5", "sum5"), outputs_of(["out5", "sum5"]), strict=True):
        assert np.array_equal(value, apart[name])


def test_symbolic_axes_stay_symbolic() -> None:
    case = TwoPhaseCase(2, 4, 1, 64, rows=5, index=2)
    queries, tensors = two_phase_operands(case)
    nodes = two_phase_nodes(case, queries, tensors)
    fixed, dynamic = run(nodes), run(nodes, dynamic=True)
    assert all(torch.equal(fixed[name], dynamic[name]) for name in fixed)


def test_any_number_of_leading_axes() -> None:
    case = Case(2, 64, rows=12, norm=True)
    tensors = operands(case)
    flat = run([read_node(case, tensors)])["out"]
    tensors.sources[:] = [source.reshape(2, 3, 2, 64) for source in tensors.sources]
    assert torch.equal(run([read_node(case, tensors)])["out"].reshape(12, 64), flat)
    tensors.sources[:] = [source.reshape(12, 64)[3] for source in tensors.sources]
    assert torch.equal(run([read_node(case, tensors)])["out"], flat[3])


def test_no_rows_is_no_error() -> None:
    case = Case(3, 64, rows=0, add=True)
    assert {tuple(t.shape) for t in run([read_node(case, operands(case))], dynamic=True).values()} == {(0, 64)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parameters_of_the_sources_dtype(dtype: str) -> None:
    case = Case(9, 77, dtype, norm=True)
    tensors = operands(case)
    narrow = tensors.sources[0].dtype
    node = read_node(case, tensors)
    node.inputs["query"], node.inputs["norm_weight"] = tensors.query.to(narrow), tensors.norm_weight.to(narrow)
    wide = read_node(case, tensors)
    wide.inputs["query"] = node.inputs["query"].float()
    wide.inputs["norm_weight"] = node.inputs["norm_weight"].float()
    assert torch.equal(run([node])["out"], run([wide])["out"])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(poison: float) -> None:
    case = Case(9, 77, rows=4, norm=True, add=True)
    tensors = operands(case)
    clean = run([read_node(case, tensors)])["out"]
    tensors.sources[4] = tensors.sources[4].clone()
    tensors.sources[4][2, 70] = poison
    found = run([read_node(case, tensors)])["out"]
    assert bool(found[2].isnan().all())
    keep = [0, 1, 3]
    assert torch.equal(found[keep], clean[keep])


def test_names_are_ranges() -> None:
    names = ["depthwire::AttnResRead_2", "AttnResRead_3", "AttnResRead_4", "AttnResAddMerge_7", "MatMul", "a::B_3"]
    assert ops_entry(names) == "AttnResAddMerge_7,AttnResRead_2-4"
    assert ops_entry(["MatMul"]) == ""


@pytest.mark.parametrize("entry", ["AttnResRead_0", "AttnResRead_257", "AttnResInter_", "MatMul_3", "AttnResRead_3-x"])
def test_a_name_that_is_no_operator_is_refused(entry: str) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(OPS_ENTRY, entry)
    with pytest.raises(Exception, match=f"no operator '{entry}'"):
        options.register_custom_ops_library(depthwire.custom_ops_library())


def test_every_operator_is_registered_unless_names_are_given() -> None:
    kinds = [
        "AttnResRead_256",
        "AttnResAddUnitReadNorm_1",
        "AttnResInter_256",
        "AttnResMerge_1",
        "AttnResAddMergeNorm_9",
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])
    for kind in kinds:
        count = int(kind.rpartition("_")[2]) + 2 * ("Norm" in kind) + 4
        # Too many inputs: an operator that nobody registered would fail for another reason.
        outputs = ["y", "z"] if "Add" in kind or "Inter" in kind else ["y"]
        node = helper.make_node(kind, ["x"] * (count + 3), outputs, domain=DOMAIN)
        graph = helper.make_graph([node], "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if kind != kinds[0]:  # one session with all of them is enough
            options.add_session_config_entry(OPS_ENTRY, kind)
        options.register_custom_ops_library(depthwire.custom_ops_library())
        with pytest.raises(Exception, match=f"{kind}: has {count + 3} inputs, wanted"):
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_the_library_says_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert instruction_set() in {"avx512", "avx2", "neon", "baseline"}
    path = native.library_path()
    assert path is not None
    assert str(path) == depthwire.custom_ops_library()
    assert ctypes.CDLL(str(path)).DepthwireAbi() == native.ABI
    monkeypatch.setattr(native, "ABI", 99)
    with pytest.raises(BuildError, match=r"runtime\.stale-kernels"):
        native.library_path()
    broken = tmp_path / "library.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "_LIBRARY", broken)
    with pytest.raises(BuildError, match=r"runtime\.stale-kernels"):
        native.library_path()
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "absent.so")
    assert native.library_path() is None
    assert instruction_set() is None
    with pytest.raises(BuildError, match=r"runtime\.no-kernels"):
        native.custom_ops_library()
