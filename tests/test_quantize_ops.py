"""``quantize`` and ``dequantize``: against ONNX's own reference, number by number, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from depthwire.ops import SHAPES, dequantize, quantize

DTYPES = [torch.float32, torch.float16, torch.float64, torch.bfloat16]
# Halves both ways, what saturates, zeros of both signs, and quotients that are no halves in fp32 alone.
EDGES = [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 126.5, 127.0, 127.5, 128.0, -127.5, -128.0, -128.5, -300.0, 1e4, -1e4]


def onnx_node(op: str, feeds: dict[str, Any], **attributes: Any) -> np.ndarray:
    node = onnx.helper.make_node(op, list(feeds), ["y"], **attributes)
    types = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    inputs = [onnx.helper.make_tensor_value_info(name, kind, feeds[name].shape) for name, kind in types.items()]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UNDEFINED, None)
    graph = onnx.helper.make_graph([node], "one", inputs, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    (found,) = ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.1, 3.0])
def test_quantize_is_onnx_quantize_linear(dtype: torch.dtype, scale: float) -> None:
    spread = torch.linspace(-140, 140, 4001) * scale
    x = torch.cat([torch.tensor(EDGES) * scale, spread]).to(dtype)
    number = torch.tensor(scale, dtype=dtype)
    found = quantize(x, number)
    wanted = onnx_node("QuantizeLinear", {"x": x.numpy(), "s": number.numpy()}, output_dtype=onnx.TensorProto.INT8)
    assert found.dtype == torch.int8
    assert np.array_equal(found.numpy(), wanted.astype(np.int8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_go_to_the_even_neighbour_and_the_rest_saturates(dtype: torch.dtype) -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 200.0, -200.0, float("inf"), float("-inf")], dtype=dtype)
    assert quantize(x, torch.ones((), dtype=dtype)).tolist() == [0, 2, 2, 0, -2, 127, -128, 127, -128]


def integers(*shape: int, bits: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    bound = 1 << (bits - 1)
    return torch.randint(-bound, bound, shape, generator=generator).to(torch.int8)


@pytest.mark.parametrize(
    ("shape", "scale", "axis", "block"),
    [
        ((5, 6), (), 0, 0),
        ((5, 6), (5,), 0, 0),
        ((5, 6), (6,), 1, 0),
        ((5, 6), (5, 2), 1, 3),
        ((8, 3), (2, 3), 0, 4),
        ((2, 6, 4), (2, 3, 4), 1, 2),
        ((2, 6, 4), (4,), 2, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantize_is_onnx_dequantize_linear(
    shape: tuple[int, ...], scale: tuple[int, ...], axis: int, block: int, dtype: torch.dtype
) -> None:
    x = integers(*shape)
    scales = torch.rand(scale, generator=torch.Generator().manual_seed(1)).add(0.01).to(dtype)
    found = dequantize(x, scales, axis, block)
    attributes = ({"axis": axis} if scale else {}) | ({"block_size": block} if block else {})
    wanted = onnx_node("DequantizeLinear", {"x": x.numpy(), "s": scales.numpy()}, **attributes)
    assert found.dtype == dtype
    assert np.array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_decides_the_dtype(dtype: torch.dtype) -> None:
    scale = torch.rand(3, 2).add(0.1).to(dtype)
    found = dequantize(integers(3, 8, bits=4), scale, 1, 4, 4)
    assert found.dtype == dtype
    assert torch.equal(found, integers(3, 8, bits=4).to(dtype) * scale.repeat_interleave(4, 1))


@pytest.mark.parametrize("block", [0, 4])
def test_the_fake_kernel_tells_shape_and_dtype(block: int) -> None:
    x, scale = torch.randn(4, 8), torch.rand(4, 2) if block else torch.rand(4)
    with FakeTensorMode() as mode:
        fake = quantize(mode.from_tensor(x), mode.from_tensor(torch.tensor(0.1)))
        back = dequantize(fake, mode.from_tensor(scale), int(bool(block)), block)
    assert (fake.shape, fake.dtype, back.shape, back.dtype) == (x.shape, torch.int8, x.shape, torch.float32)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("quantize", (torch.ones(3), torch.ones((), dtype=torch.float16)), "both must agree"),
        ("quantize", (torch.ones(3), torch.ones(3)), "one number"),
        ("quantize", (torch.ones(3).int(), torch.ones((), dtype=torch.int32)), "floating point"),
        ("dequantize", (torch.ones(3), torch.ones(())), "must be int8"),
        ("dequantize", (integers(3), torch.ones((), dtype=torch.int32)), "floating point"),
        ("dequantize", (integers(3, 4), torch.ones(3), 1), r"must be \[4\], not \[3\]"),
        ("dequantize", (integers(3, 4), torch.ones(3), 2), r"axis must be in \[0, 2\)"),
        ("dequantize", (integers(3, 4), torch.ones(3), -1), r"axis must be in \[0, 2\)"),
        ("dequantize", (integers(3, 4), torch.ones(3, 2), 1, 3), "blocks of 3 do not divide 4"),
        ("dequantize", (integers(3, 4), torch.ones(3), 1, 2), r"must be \[3, 2\], not \[3\]"),
        ("dequantize", (integers(3, 4), torch.ones(()), 1, 2), "block_size 2"),
        ("dequantize", (integers(3, 4), torch.ones(3, 4), 0, -1), "block_size -1"),
        ("dequantize", (integers(3, 4), torch.ones(3), 0, 0, 6), "bits must be 4 or 8"),
    ],
)
def test_what_does_not_fit_is_refused_in_both_kernels(op: str, arguments: tuple[Any, ...], message: str) -> None:
    real = {"quantize": quantize, "dequantize": dequantize}[op]
    for call in (real, SHAPES[op]):
        with pytest.raises(ValueError, match=message):
            call(*arguments)


def test_the_scale_has_a_gradient() -> None:
    scale = torch.rand(3, dtype=torch.float64, requires_grad=True)
    x = integers(3, 4)
    dequantize(x, scale).sum().backward()
    assert scale.grad is not None
    assert torch.equal(scale.grad, x.sum(1).double())
