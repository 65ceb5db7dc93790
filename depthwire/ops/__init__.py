"""The custom operators: torch reference, fake shapes and gradient.

Importing this package registers the operators with torch under the namespace ``depthwire``.
"""

from __future__ import annotations

from depthwire.ops._reference import read_weights
from depthwire.ops._register import SHAPES
from depthwire.ops.attn_res_read import (
    attn_res_add_read,
    attn_res_add_read_norm,
    attn_res_read,
    attn_res_read_norm,
    attn_res_read_reference,
)
from depthwire.ops.attn_res_two_phase import (
    attn_res_add_merge,
    attn_res_add_merge_norm,
    attn_res_inter,
    attn_res_merge,
    attn_res_merge_norm,
)
from depthwire.ops.move_tokens import gather_tokens, scatter_tokens
from depthwire.ops.quantize import dequantize, quantize
from depthwire.ops.select_tokens import canonical_score, select_tokens, select_tokens_budget
from depthwire.ops.surprise_score import surprise_score

__all__ = [
    "SHAPES",
    "attn_res_add_merge",
    "attn_res_add_merge_norm",
    "attn_res_add_read",
    "attn_res_add_read_norm",
    "attn_res_inter",
    "attn_res_merge",
    "attn_res_merge_norm",
    "attn_res_read",
    "attn_res_read_norm",
    "attn_res_read_reference",
    "canonical_score",
    "dequantize",
    "gather_tokens",
    "quantize",
    "read_weights",
    "scatter_tokens",
    "select_tokens",
    "select_tokens_budget",
    "surprise_score",
]
