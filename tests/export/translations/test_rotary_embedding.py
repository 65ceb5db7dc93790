"""``onnx.RotaryEmbedding`` of torch against ONNX Runtime's, in every form; and through the whole front end."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.onnx import ops

from depthwire.export.to_onnx import to_onnx
from depthwire.program import Program, Source
from depthwire.runtime.tolerances import tolerance


class Rotate(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, places: Tensor | None = None) -> Tensor:
        return ops.rotary_embedding(x, cos, sin, places, **self.options)


def translated(module: nn.Module, examples: dict[str, Tensor]) -> ir.Model:
    exported = torch.export.export(module, tuple(examples.values()), strict=False)
    return to_onnx(Program(exported, Source("module", "Rotate"), examples, ("y",)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "rotated", "options"),
    [
        ((2, 3, 5, 8), 8, {}),
        ((2, 3, 5, 8), 8, {"interleaved": True}),
        ((2, 3, 5, 8), 4, {"rotary_embedding_dim": 4}),
        ((2, 5, 24), 8, {"num_heads": 3}),
        ((1, 5, 16), 4, {"num_heads": 2, "rotary_embedding_dim": 4, "interleaved": True}),
    ],
)
@pytest.mark.parametrize("placed", [False, True])
def test_the_operator_computes_what_torch_does(
    shape: tuple[int, ...], rotated: int, options: dict[str, Any], dtype: torch.dtype, placed: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (9,) if placed else (shape[0], 5)
    examples = {"x": torch.randn(shape, generator=generator)}
    examples |= {name: torch.rand(*rows, rotated // 2, generator=generator) for name in ("cos", "sin")}
    examples = {name: tensor.to(dtype) for name, tensor in examples.items()}
    if placed:
        examples["places"] = torch.randint(0, 9, (shape[0], 5), generator=generator)
    module = Rotate(**options)
    model = translated(module, examples)
    assert [node.op_type for node in model.graph] == ["RotaryEmbedding"]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in examples.items()}
    (got,) = session.run(None, feed)
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in examples.values()]
    want = module(*wide).numpy()
    allowed = tolerance(str(dtype).removeprefix("torch."), "hidden").allowed(float(np.abs(want).max()))
    assert np.abs(got - want).max() <= allowed
