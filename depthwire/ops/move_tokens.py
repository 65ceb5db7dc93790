"""``depthwire::gather_tokens`` and ``depthwire::scatter_tokens``: into the routed block and out of it.

    gather_tokens(x [B, T, ...], index [B, K])                                      -> [B, K, ...]
    scatter_tokens(base [B, T, ...], index [B, K], taken [B, K], rows [B, K, ...])  -> [B, T, ...]

Any dtype: hidden states, rotary tables, positions (int64), masks (bool). ``index`` is int64 with values in [0, T),
distinct in each row for ``scatter_tokens``, as ``select_tokens`` gives them. Rows of slots that are not taken are
ignored, NaN or not. Both are differentiable with respect to floating-point data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthwire.ops._checks import check_alike
from depthwire.ops._register import register
from depthwire.ops._token_checks import check_exact, check_index, check_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping


def gather_tokens_reference(x: Tensor, index: Tensor) -> Tensor:
    """Return row b, slot j = x[b, index[b, j]]."""
    return x[_row(index), index]


def scatter_tokens_reference(base: Tensor, index: Tensor, taken: Tensor, rows: Tensor) -> Tensor:
    """Return ``base`` with rows[b, j] at [b, index[b, j]] for every taken slot."""
    mask = taken.reshape(*taken.shape, *(1 for _ in rows.shape[2:]))
    # The other slots hold tokens that are not taken: they write back what is there.
    update = torch.where(mask, rows, base[_row(index), index])
    return base.index_put((_row(index), index), update)


def _row(index: Tensor) -> Tensor:
    return torch.arange(index.shape[0], device=index.device).unsqueeze(1)


def _gather_shapes(arguments: Mapping[str, Any]) -> Tensor:
    x: Tensor = arguments["x"]
    check_tokens("x", x)
    slots = check_index(arguments["index"], x.shape[0])
    return x.new_empty((x.shape[0], slots, *x.shape[2:]))


def _scatter_shapes(arguments: Mapping[str, Any]) -> Tensor:
    base: Tensor = arguments["base"]
    check_tokens("base", base)
    slots = check_index(arguments["index"], base.shape[0])
    if slots > base.shape[1]:
        raise ValueError(f"{slots} slots cannot hold distinct tokens of {base.shape[1]}")
    check_exact("taken", arguments["taken"], (base.shape[0], slots), torch.bool)
    like = base.new_empty((base.shape[0], slots, *base.shape[2:]))
    check_alike("rows", arguments["rows"], "the gathered base", like)
    return torch.empty_like(base, memory_format=torch.contiguous_format)


# Moving has no arithmetic to keep in fp32; what scatter brings together may differ in dtype under autocast.
gather_tokens = register("gather_tokens", gather_tokens_reference, _gather_shapes, widen=False)
scatter_tokens = register("scatter_tokens", scatter_tokens_reference, _scatter_shapes)
