"""``depthwire::attn_res_read`` and its fused forms: softmax attention over depth.

The formula stands in ``depthwire/ops/_reference.py``. Four operators share it:

    attn_res_read            the read of Attention Residuals
    attn_res_read_norm       … and the RMSNorm that follows it, without rounding in between
    attn_res_add_read        the last source is a sum that is made on the way: sum = v_n + delta, returned as well
    attn_res_add_read_norm   both

Arguments, alike in all of them: ``query [d]`` of any floating dtype; ``sources``, n >= 1 tensors ``[..., d]`` of one
shape and floating dtype; ``delta`` like them; ``norm_weight [d]``, the norm's gain; ``eps`` and ``norm_eps``, added to
the mean squares of a source and of the mixed value; ``scale``, a factor on the logits; ``value_norm``: mix the
normalised sources, as Inkling-2 does; ``last_bias``, added to the logit of the last source. Results are ``[..., d]`` in
the dtype of the sources and differentiable with respect to every tensor; arguments that do not fit raise ValueError.

The arithmetic is fp32 whatever the dtype of the sources (fp64 for fp64 sources). The sum is rounded to their dtype
before it is read, as an addition of its own would be.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 - torch reads the annotations to make the schema
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthwire.ops._checks import check_alike, check_sources, check_vector
from depthwire.ops._reference import mix, rms_norm
from depthwire.ops._register import register

if TYPE_CHECKING:
    from collections.abc import Mapping


def attn_res_read_reference(
    query: Tensor, sources: Sequence[Tensor], eps: float, scale: float, value_norm: bool = False, last_bias: float = 0.0
) -> Tensor:
    """Mix the sources by softmax attention over depth: the read of Attention Residuals."""
    out = mix(query, sources, eps, scale, value_norm=value_norm, last_bias=last_bias)
    return out.to(sources[0].dtype)


def attn_res_read_norm_reference(
    query: Tensor,
    norm_weight: Tensor,
    sources: Sequence[Tensor],
    eps: float,
    scale: float,
    norm_eps: float,
    value_norm: bool = False,
    last_bias: float = 0.0,
) -> Tensor:
    """Read, and apply the RMSNorm that follows."""
    out = mix(query, sources, eps, scale, value_norm=value_norm, last_bias=last_bias)
    return rms_norm(out, norm_weight, norm_eps).to(sources[0].dtype)


def attn_res_add_read_reference(
    query: Tensor,
    sources: Sequence[Tensor],
    delta: Tensor,
    eps: float,
    scale: float,
    value_norm: bool = False,
    last_bias: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add ``delta`` to the last source, and read; return the read and the sum."""
    total = sources[-1] + delta
    return attn_res_read_reference(query, [*sources[:-1], total], eps, scale, value_norm, last_bias), total


def attn_res_add_read_norm_reference(
    query: Tensor,
    norm_weight: Tensor,
    sources: Sequence[Tensor],
    delta: Tensor,
    eps: float,
    scale: float,
    norm_eps: float,
    value_norm: bool = False,
    last_bias: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add ``delta`` to the last source, read, and apply the RMSNorm that follows; return that and the sum."""
    total = sources[-1] + delta
    summed = [*sources[:-1], total]
    read = attn_res_read_norm_reference(query, norm_weight, summed, eps, scale, norm_eps, value_norm, last_bias)
    return read, total


def _shapes(arguments: Mapping[str, Any]) -> Any:
    sources: Sequence[Tensor] = arguments["sources"]
    check_sources(sources)
    for name in ("query", "norm_weight"):
        if name in arguments:
            check_vector(name, arguments[name], sources[0].shape[-1])
    out = torch.empty_like(sources[0], memory_format=torch.contiguous_format)
    if "delta" not in arguments:
        return out
    check_alike("delta", arguments["delta"], "source 0", sources[0])
    return out, torch.empty_like(sources[0])


attn_res_read = register("attn_res_read", attn_res_read_reference, _shapes)
attn_res_read_norm = register("attn_res_read_norm", attn_res_read_norm_reference, _shapes)
attn_res_add_read = register("attn_res_add_read", attn_res_add_read_reference, _shapes)
attn_res_add_read_norm = register("attn_res_add_read_norm", attn_res_add_read_norm_reference, _shapes)
