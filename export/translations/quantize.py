"""``depthwire::quantize`` -> ONNX ``QuantizeLinear``, ``depthwire::dequantize`` -> ``DequantizeLinear``; zero point 0.

Integers of four bits come as int8; ``Cast`` to INT4 stands between until ``export/_quantized_weights.py`` packs them.
"""

from __future__ import annotations

from typing import Any


def quantize(x: Any, scale: Any) -> Any:
    """Emit the rounding of an activation.

    Args:
        x: Floating point, any shape.
        scale: One number of the same dtype.
    """
    import onnx_ir as ir
    from onnxscript import opset23 as op

    return op.QuantizeLinear(x, scale, output_dtype=ir.DataType.INT8)


def dequantize(x: Any, scale: Any, axis: int = 0, block_size: int = 0, bits: int = 8) -> Any:
    """Emit the product of integers and scales; the result has the dtype of the scale.

    Args:
        x: int8.
        scale: One number, one for every index of ``axis``, or one for every ``block_size`` elements along it.
        axis: Which axis; of no meaning with one number.
        block_size: 0 without blocks.
        bits: 8 or 4.
    """
    import onnx_ir as ir
    from onnxscript import opset23 as op

    integers = op.Cast(x, to=ir.DataType.INT4) if bits == 4 else x
    if not len(scale.shape):
        return op.DequantizeLinear(integers, scale)
    if not block_size:
        return op.DequantizeLinear(integers, scale, axis=axis)
    return op.DequantizeLinear(integers, scale, axis=axis, block_size=block_size)
