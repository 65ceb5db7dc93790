"""``depthwire::attn_res_inter`` and ``depthwire::attn_res_merge``: reads in two phases (arXiv 2603.15031, algorithm 1).

The queries of a read are parameters, so every read of a group can look at the sources that exist before the group
together: ``attn_res_inter`` passes over them once for S queries. Each read then merges what is new to it:
``attn_res_merge`` takes row ``index`` of phase 1 as one source that is mixed already. The formulas, and that this is
exact, stand in ``depthwire/ops/_reference.py``.

Arguments, as in ``attn_res_read`` and: ``queries [S, d]``; ``inter_out [S, ..., d]``, like the sources, and
``inter_lse [S, ...]``, fp32 (fp64 for fp64 sources), both from ``attn_res_inter``; ``index`` from 0 to S - 1;
``sources``, m >= 0 of them (m >= 1 where the last one is a sum made on the way).
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 - torch reads the annotations to make the schema
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthwire.ops._checks import check_alike, check_matrix, check_sources, check_vector
from depthwire.ops._reference import compute_dtype, mix, phase_1, rms_norm
from depthwire.ops._register import register

if TYPE_CHECKING:
    from collections.abc import Mapping


def attn_res_inter_reference(
    queries: Tensor, sources: Sequence[Tensor], eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Read the sources for S queries in one pass; return the means ``[S, ..., d]`` and logsumexps ``[S, ...]``."""
    out, lse = phase_1(queries, sources, eps, scale)
    return out.to(sources[0].dtype).contiguous(), lse.contiguous()


def attn_res_merge_reference(
    query: Tensor,
    inter_out: Tensor,
    inter_lse: Tensor,
    sources: Sequence[Tensor],
    index: int,
    eps: float,
    scale: float,
    last_bias: float = 0.0,
) -> Tensor:
    """Finish read ``index`` of a group with the sources that phase 1 did not see."""
    mixed = (inter_out[index], inter_lse[index])
    return mix(query, sources, eps, scale, last_bias=last_bias, mixed=mixed).to(inter_out.dtype)


def attn_res_merge_norm_reference(
    query: Tensor,
    norm_weight: Tensor,
    inter_out: Tensor,
    inter_lse: Tensor,
    sources: Sequence[Tensor],
    index: int,
    eps: float,
    scale: float,
    norm_eps: float,
    last_bias: float = 0.0,
) -> Tensor:
    """Finish a read, and apply the RMSNorm that follows."""
    mixed = (inter_out[index], inter_lse[index])
    out = mix(query, sources, eps, scale, last_bias=last_bias, mixed=mixed)
    return rms_norm(out, norm_weight, norm_eps).to(inter_out.dtype)


def attn_res_add_merge_reference(
    query: Tensor,
    inter_out: Tensor,
    inter_lse: Tensor,
    sources: Sequence[Tensor],
    delta: Tensor,
    index: int,
    eps: float,
    scale: float,
    last_bias: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add ``delta`` to the last source, and finish the read; return the read and the sum."""
    total = sources[-1] + delta
    summed = [*sources[:-1], total]
    return attn_res_merge_reference(query, inter_out, inter_lse, summed, index, eps, scale, last_bias), total


def attn_res_add_merge_norm_reference(
    query: Tensor,
    norm_weight: Tensor,
    inter_out: Tensor,
    inter_lse: Tensor,
    sources: Sequence[Tensor],
    delta: Tensor,
    index: int,
    eps: float,
    scale: float,
    norm_eps: float,
    last_bias: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add ``delta`` to the last source, finish the read, and apply the RMSNorm; return that and the sum."""
    total = sources[-1] + delta
    read = attn_res_merge_norm_reference(
        query, norm_weight, inter_out, inter_lse, [*sources[:-1], total], index, eps, scale, norm_eps, last_bias
    )
    return read, total


def _inter_shapes(arguments: Mapping[str, Any]) -> Any:
    queries: Tensor = arguments["queries"]
    sources: Sequence[Tensor] = arguments["sources"]
    check_sources(sources)
    first = sources[0]
    check_matrix("queries", queries, first.shape[-1])
    out = first.new_empty((queries.shape[0], *first.shape))
    return out, first.new_empty((queries.shape[0], *first.shape[:-1]), dtype=compute_dtype(first))


def _merge_shapes(arguments: Mapping[str, Any]) -> Any:
    inter_out: Tensor = arguments["inter_out"]
    inter_lse: Tensor = arguments["inter_lse"]
    index: int = arguments["index"]
    if inter_out.dim() < 2 or not 0 <= index < inter_out.shape[0]:
        raise ValueError(f"index {index} is not a row of inter_out {list(inter_out.shape)}")
    if inter_lse.shape != inter_out.shape[:-1] or inter_lse.dtype != compute_dtype(inter_out):
        raise ValueError(
            f"inter_lse must be {compute_dtype(inter_out)}{list(inter_out.shape[:-1])}, "
            f"not {inter_lse.dtype}{list(inter_lse.shape)}"
        )
    row = inter_out[index]
    check_sources(arguments["sources"], like=row)
    for name in ("query", "norm_weight"):
        if name in arguments:
            check_vector(name, arguments[name], row.shape[-1])
    out = torch.empty_like(row, memory_format=torch.contiguous_format)
    if "delta" not in arguments:
        return out
    if not arguments["sources"]:
        raise ValueError("at least one source is needed to add delta to")
    check_alike("delta", arguments["delta"], "source 0", arguments["sources"][0])
    return out, torch.empty_like(arguments["sources"][0])


attn_res_inter = register("attn_res_inter", attn_res_inter_reference, _inter_shapes)
attn_res_merge = register("attn_res_merge", attn_res_merge_reference, _merge_shapes)
attn_res_merge_norm = register("attn_res_merge_norm", attn_res_merge_norm_reference, _merge_shapes)
attn_res_add_merge = register("attn_res_add_merge", attn_res_add_merge_reference, _merge_shapes)
attn_res_add_merge_norm = register("attn_res_add_merge_norm", attn_res_add_merge_norm_reference, _merge_shapes)
