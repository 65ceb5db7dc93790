"""``depthwire::quantize`` and ``depthwire::dequantize``: ONNX's QuantizeLinear and DequantizeLinear with zero point 0.

    quantize(x [...], scale [])                        -> int8 [...]     saturate(round(x / scale)) to -128 ... 127
    dequantize(x int8, scale, axis, block_size, bits)  -> like x         x * scale, in the dtype of the scale

``round`` takes halves to the even neighbour, and the quotient is rounded to the dtype of ``x`` first, as ONNX has it.
The scale of ``dequantize`` is one number; or ``[x.shape[axis]]``, one for every index of ``axis``; or, with a block
size B, of the rank of ``x`` with ``x.shape[axis] / B`` along ``axis``: one for every B consecutive elements. With
``bits`` 4 the integers lie in -8 ... 7; torch has no such dtype, so they come as int8, and a file stores two in a byte.

The dtype of the scale is that of the floating-point side, so a pass that narrows a graph narrows scales and activations
together. ``dequantize`` is differentiable with respect to the scale; nothing goes through the integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthwire.ops._register import register

if TYPE_CHECKING:
    from collections.abc import Mapping

LOWEST, HIGHEST = -128, 127


def quantize_reference(x: Tensor, scale: Tensor) -> Tensor:
    """Return ``saturate(round(x / scale))`` as int8."""
    # NaN becomes 0 here; ONNX leaves it open.
    return (x / scale).round().nan_to_num(0.0).clamp(LOWEST, HIGHEST).to(torch.int8)


def dequantize_reference(x: Tensor, scale: Tensor, axis: int = 0, block_size: int = 0, bits: int = 8) -> Tensor:  # noqa: ARG001
    """Return ``x * scale``, with the scale of every channel or block."""
    wide = x.to(scale.dtype)
    if not scale.dim():
        return wide * scale
    if not block_size:
        shape = [1] * x.dim()
        shape[axis] = -1
        return wide * scale.reshape(shape)
    blocks = wide.reshape(*x.shape[:axis], -1, block_size, *x.shape[axis + 1 :])
    return (blocks * scale.unsqueeze(axis + 1)).flatten(axis, axis + 1)


def _check_scale(scale: Tensor) -> None:
    if not scale.dtype.is_floating_point:
        raise ValueError(f"scale must be floating point, not {scale.dtype}")


def _quantize_shapes(arguments: Mapping[str, Any]) -> Tensor:
    x, scale = arguments["x"], arguments["scale"]
    _check_scale(scale)
    if x.dtype != scale.dtype:
        raise ValueError(f"x is {x.dtype}, scale is {scale.dtype}; both must agree")
    if scale.dim():
        raise ValueError(f"scale must be one number, not {list(scale.shape)}")
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)


def _dequantize_shapes(arguments: Mapping[str, Any]) -> Tensor:
    x, scale, axis, block = (arguments[name] for name in ("x", "scale", "axis", "block_size"))
    _check_scale(scale)
    if x.dtype != torch.int8:
        raise ValueError(f"x must be int8, not {x.dtype}")
    if arguments["bits"] not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {arguments['bits']}")
    if block < 0 or (block and not scale.dim()):
        raise ValueError(f"block_size {block} does not go with a scale {list(scale.shape)}")
    if scale.dim():
        if not 0 <= axis < x.dim():
            raise ValueError(f"axis must be in [0, {x.dim()}), not {axis}")
        wanted = [x.shape[axis]]
        if block:
            if x.shape[axis] % block:
                raise ValueError(f"blocks of {block} do not divide {x.shape[axis]} elements along axis {axis}")
            wanted = [size // block if index == axis else size for index, size in enumerate(x.shape)]
        if list(scale.shape) != wanted:
            raise ValueError(f"scale must be {wanted}, not {list(scale.shape)}")
    return torch.empty_like(x, dtype=scale.dtype, memory_format=torch.contiguous_format)


# Scale and data agree in dtype; widening one of them under autocast would break that.
quantize = register("quantize", quantize_reference, _quantize_shapes, widen=False)
dequantize = register("dequantize", dequantize_reference, _dequantize_shapes, widen=False)
