"""Operators that the exporter's own table lacks, translated to standard ONNX operators: one file an operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def translations() -> dict[str, Callable[..., Any]]:
    """Return qualified torch name, with the overload unless it is the default -> callable that emits the ONNX nodes."""
    from depthwire.export.translations.grouped_mm import aten_grouped_mm, grouped_mm
    from depthwire.export.translations.quantize import dequantize, quantize
    from depthwire.export.translations.rotary_embedding import rotary_embedding
    from depthwire.export.translations.to_dtype import to_dtype

    return {
        "transformers::grouped_mm_fallback": grouped_mm,
        "aten::_grouped_mm": aten_grouped_mm,
        "aten::to.dtype": to_dtype,
        "depthwire::dequantize": dequantize,
        "depthwire::quantize": quantize,
        "onnx::RotaryEmbedding.opset23": rotary_embedding,
    }


__all__ = ["translations"]
