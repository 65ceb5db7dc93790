"""The grouped product in standard operators: every split of rows to experts, empty ones included."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers.integrations.moe  # noqa: F401 - registers the operator
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from depthwire.errors import ExportError
from depthwire.export.to_onnx import to_onnx
from depthwire.program import Program, Source
from depthwire.runtime.tolerances import tolerance

INNER, WIDTH = 8, 16


class Product(nn.Module):
    def __init__(self, experts: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(experts, INNER, WIDTH).to(dtype))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            return nn.functional.grouped_mm(x, self.weight, offs=ends)
        product: Tensor = torch.ops.transformers.grouped_mm_fallback(x, self.weight, ends)
        return product


def exported(rows: int, experts: int, dtype: torch.dtype = torch.float32) -> tuple[Product, Tensor, ir.Model]:
    model = Product(experts, dtype)
    x = torch.randn(rows, INNER, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs = {"x": x, "ends": torch.linspace(0, rows, experts + 1)[1:].int()}
    with torch.no_grad():
        graph = torch.export.export(model, tuple(inputs.values()))
    return model, x, to_onnx(Program(graph, Source("module", "Product"), inputs, ("y",)))


def splits(rows: int, experts: int) -> list[list[int]]:
    """Where runs end: all to one, none to most, uneven, and rows behind the last run."""
    uneven = np.sort(np.random.default_rng(0).integers(0, rows + 1, experts - 1)).tolist()
    first, last = [rows] * experts, [0] * (experts - 1) + [rows]
    return [first, last, [*uneven, rows], [0] * experts, [1] * (experts - 1) + [rows - 1]]


@pytest.mark.parametrize(
    ("rows", "experts", "form"), [(12, 4, "every"), (4, 12, "own"), (5, 5, "own"), (6, 1, "every")]
)
def test_every_split(rows: int, experts: int, form: str) -> None:
    model, x, onnx_model = exported(rows, experts)
    proto = ir.to_proto(onnx_model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for ends in splits(rows, experts):
        offsets = torch.tensor(ends, dtype=torch.int32)
        with torch.no_grad():
            wanted = model(x, offsets).numpy()
        (got,) = session.run(None, {"x": x.numpy(), "ends": offsets.numpy()})
        allowed = tolerance("float32", "layer").allowed(float(np.abs(wanted).max()))
        assert float(np.abs(got - wanted).max()) <= allowed, ends
    order = [node.op_type for node in onnx_model.graph if node.op_type in ("MatMul", "Gather")]
    assert order == (["MatMul", "Gather"] if form == "every" else ["Gather", "MatMul"])


def test_only_operators_that_every_back_end_takes() -> None:
    _, _, model = exported(12, 4)
    used = {node.op_type for node in model.graph}
    assert not used & {"NonZero", "Loop", "Scan", "If", "ScatterElements", "ScatterND", "Compress", "TopK"}


def test_bfloat16_is_the_operator_of_aten() -> None:
    model, x, onnx_model = exported(12, 4, torch.bfloat16)
    evaluator = ReferenceEvaluator(ir.to_proto(onnx_model))
    for ends in splits(12, 4)[:3]:
        offsets = torch.tensor(ends, dtype=torch.int32)
        with torch.no_grad():
            wanted = model(x, offsets).float().numpy()
        feed = {"x": x.float().numpy().astype(ml_dtypes.bfloat16), "ends": offsets.numpy()}
        got: Any = evaluator.run(None, feed)[0]  # type: ignore[index]
        assert got.dtype == ml_dtypes.bfloat16
        allowed = tolerance("bfloat16", "layer").allowed(float(np.abs(wanted).max()))
        assert float(np.abs(got.astype(np.float32) - wanted).max()) <= allowed, ends


def test_another_form_of_the_operator_is_refused() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
            return nn.functional.grouped_mm(x, y, offs=ends)

    x, y = torch.randn(16, 32).bfloat16(), torch.randn(32, 16).bfloat16()
    inputs = {"x": x, "y": y, "ends": torch.tensor([16, 32], dtype=torch.int32)}
    graph = torch.export.export(Both(), tuple(inputs.values()))
    with pytest.raises(ExportError) as caught:
        to_onnx(Program(graph, Source("module", "Both"), inputs, ("y",)))
    assert caught.value.code == "export.translation-failed"
