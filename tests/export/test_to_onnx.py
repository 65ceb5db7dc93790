"""Translation: the ONNX file computes what the program does, under the program's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from depthwire.errors import ExportError
from depthwire.export.goldens import make_goldens
from depthwire.export.to_onnx import to_onnx
from depthwire.program import Program, Source
from tests.export.tiny import LENGTH, VOCABULARY, captured, lifted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


def _feed(program: Program) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in program.example_inputs.items()}


def _run(model: ir.Model, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, dict(feed))
    return outputs


def _expected(program: Program) -> NDArray[Any]:
    return make_goldens(program, [_feed(program)]).outputs[0]["logits"]


@pytest.mark.parametrize("attn_res", [None, "full", "block:3", "block-layers:2"])
@pytest.mark.parametrize("tied", [False, True])
def test_parity(attn_res: str | None, *, tied: bool) -> None:
    program = lifted(captured(tied=tied), attn_res)
    expected = _expected(program)
    (actual,) = _run(to_onnx(program), _feed(program))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("arity", [2, 4])
def test_a_changed_body_is_noticed(arity: int) -> None:
    """Teeth: the parity above would fail if a body of this arity computed anything else."""
    program = lifted(captured(), "block:3")
    model = to_onnx(program)
    body = model.functions["depthwire", f"AttnResRead_{arity}", ""]
    divide = next(node for node in body if node.op_type == "Div")
    divide.op_type = "Mul"
    expected = _expected(program)
    (actual,) = _run(model, _feed(program))
    assert float(np.abs(actual - expected).max()) > 2e-5 * float(np.abs(expected).max())


def test_checker_and_reference_evaluator_accept_the_model() -> None:
    program = lifted(captured(), "full")
    proto = ir.to_proto(to_onnx(program))
    onnx.checker.check_model(proto, full_check=True)
    (actual,) = ReferenceEvaluator(proto).run(None, _feed(program))
    assert isinstance(actual, np.ndarray)
    expected = _expected(program)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


def test_one_body_for_each_arity_and_fixed_inputs() -> None:
    model = to_onnx(lifted(captured(), "full"))
    used = {node.op_type for node in model.graph if node.domain == "depthwire"}
    assert used == {f"AttnResRead_{n}" for n in range(2, 8)}
    assert {name for _, name, _ in model.functions} == used
    for node in model.graph:
        if node.domain == "depthwire":
            arity = int(node.op_type.rsplit("_", 1)[1])
            names = [value.name for value in node.inputs if value is not None]
            assert len(names) == arity + 1
            assert len(set(names)) == arity + 1
            assert str(names[0]).startswith("attn_res.query.")


def test_names_are_fx_names_and_unique() -> None:
    program = lifted(captured(), "block:3")
    model = to_onnx(program)
    fx_names = {node.name for node in program.exported.graph.nodes}
    nodes = [node.name for node in model.graph]
    assert len(nodes) == len(set(nodes))
    reads = [node.outputs[0].name for node in model.graph if node.domain == "depthwire"]
    assert reads == [node.name for node in program.exported.graph.nodes if node.name.startswith("attn_res_read")]
    norms = {node.outputs[0].name for node in model.graph if node.op_type == "RMSNormalization"}
    assert norms <= fx_names
    assert [value.name for value in model.graph.inputs] == ["input_ids"]
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert all("stack_trace" not in key for node in model.graph for key in node.metadata_props)
    modules = {node.metadata_props.get("depthwire.module") for node in model.graph}
    assert "layers.1.attention_norm" in modules


def test_a_tied_weight_is_stored_once_and_others_as_matmul_reads_them() -> None:
    tied = to_onnx(lifted(captured(tied=True)))
    untied = to_onnx(lifted(captured(tied=False)))
    shared = [v.name for v in _weights(tied) if v.shape is not None and v.shape in ((VOCABULARY, 32), (32, VOCABULARY))]
    assert len(shared) == 1
    assert not str(shared[0]).endswith(".T")
    assert sum(v.shape == (VOCABULARY, 32) for v in _weights(untied)) == 1
    assert list(untied.graph.initializers["head.weight.T"].shape or []) == [32, VOCABULARY]
    assert sum(node.op_type == "Transpose" and node.inputs[0] in _weights(untied) for node in untied.graph) == 0


def _weights(model: ir.Model) -> set[ir.Value]:
    return set(model.graph.initializers.values())


def test_equal_queries_stay_apart() -> None:
    model = to_onnx(lifted(captured(), "full", seed=None))
    queries = [name for name in model.graph.initializers if str(name).startswith("attn_res.query.")]
    assert len(queries) == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_reads_in_fp32(dtype: torch.dtype) -> None:
    model = to_onnx(lifted(captured(dtype=dtype)))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    wanted = ir.DataType.FLOAT16 if dtype == torch.float16 else ir.DataType.BFLOAT16
    read = next(node for node in model.graph if node.domain == "depthwire")
    assert read.inputs[0] is not None
    assert read.inputs[0].dtype == ir.DataType.FLOAT
    assert read.outputs[0].dtype == wanted
    body = model.functions[read.op_identifier()]
    casts = [node for node in body if node.op_type == "Cast"]
    assert {value.name for node in casts for value in node.inputs if value is not None} == {
        "query",
        *(f"source_{i}" for i in range(len(read.inputs) - 1)),
    }
    assert model.graph.outputs[0].dtype == wanted


def test_an_old_opset_is_refused() -> None:
    with pytest.raises(ExportError) as caught:
        to_onnx(lifted(captured()), opset=17)
    assert caught.value.code == "export.opset"
    assert caught.value.exit_code == 5


@torch.library.custom_op("depthwire_tests::unknown", mutates_args=())
def _unknown(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@_unknown.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_an_operator_without_translation_is_named_with_its_module() -> None:
    class Inner(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = _unknown(x)
            return result

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.inner(x) + 1
            return result

    x = torch.randn(2, LENGTH)
    exported = torch.export.export(Outer(), (x,))
    program = Program(exported, Source("module", "Outer"), {"x": x}, ("y",))
    with pytest.raises(ExportError) as caught:
        to_onnx(program)
    assert caught.value.code == "export.no-translation"
    assert "inner" in str(caught.value.at)
    assert "unknown" in str(caught.value.got)


def test_an_operator_that_must_be_decomposed_first_still_exports() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.special.entr(x.sigmoid())
            return result

    x = torch.randn(2, LENGTH)
    program = Program(torch.export.export(Model(), (x,)), Source("module", "Model"), {"x": x}, ("y",))
    (actual,) = _run(to_onnx(program), {"x": x.numpy()})
    np.testing.assert_allclose(actual, Model()(x).numpy(), atol=1e-6)
