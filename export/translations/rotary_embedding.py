"""torch's own ``onnx.RotaryEmbedding`` (opset 23) -> ONNX ``RotaryEmbedding``: the same operator under the same name.

The exporter knows it as a decomposition only, which would undo what the pass ``fuse_rotary`` did.
"""

from __future__ import annotations

from typing import Any


def rotary_embedding(
    x: Any,
    cos_cache: Any,
    sin_cache: Any,
    position_ids: Any = None,
    *,
    interleaved: bool = False,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Any:
    """Emit the operator.

    Args:
        x: ``[B, H, T, D]``, or ``[B, T, H·D]`` with ``num_heads``; fp32, fp16 or bf16.
        cos_cache: ``[B, T, pairs]``, or ``[positions, pairs]`` with ``position_ids``.
        sin_cache: Of the same shape.
        position_ids: ``[B, T]`` int64, or ``None``.
        interleaved: Whether the features of a pair lie side by side.
        num_heads: H, for the form with three axes.
        rotary_embedding_dim: Features that are rotated, 0 for all.
    """
    from onnxscript import opset23 as op

    options = {"num_heads": num_heads, "rotary_embedding_dim": rotary_embedding_dim, "interleaved": int(interleaved)}
    given = {name: option for name, option in options.items() if option}
    return op.RotaryEmbedding(x, cos_cache, sin_cache, position_ids, **given)
