"""Attention of a subset of the tokens: its keys, its masks, and its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from depthwire.models._layers import Attention, repeat_heads, rotate

if TYPE_CHECKING:
    from collections.abc import Callable


class KeyValueCache:
    """Keys and values of the tokens so far, rotated at their positions.

    Every call writes behind the entries that count and then moves the end by as many as count: an entry that does not
    count is overwritten by the next call. No branch, and no shape that depends on values.

    Attributes:
        key: ``[batch, kv_heads, entries, head_dim]``.
        value: The same shape.
        visible: ``[batch, entries]`` bool.
        length: ``[batch]`` int64, where the next call writes.
    """

    def __init__(self, key: Tensor) -> None:
        self.key, self.value = key, torch.zeros_like(key)
        self.visible = torch.zeros(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        self.length = torch.zeros(key.shape[0], dtype=torch.int64, device=key.device)

    def extend(
        self, key: Tensor, value: Tensor, kept: Tensor, advance: Tensor, queries: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the entries of a chunk and say who sees what.

        Args:
            key: ``[batch, kv_heads, n, head_dim]``.
            value: The same shape.
            kept: ``[batch, n]`` bool, the entries that may be seen.
            advance: ``[batch]`` int64, entries that stay.
            queries: ``[batch, q]`` int64, each query's entry among the n.

        Returns:
            All keys, all values, and the mask ``[batch, 1, q, entries]``.
        """
        entries = self.length.unsqueeze(1) + torch.arange(key.shape[2], device=key.device)
        where = entries[:, None, :, None].expand_as(key)
        self.key = self.key.scatter(2, where, key)
        self.value = self.value.scatter(2, where, value)
        self.visible = self.visible.scatter(1, entries, kept)
        own = (self.length.unsqueeze(1) + queries).unsqueeze(2)
        span = torch.arange(self.key.shape[2], device=key.device)
        # A query that is padding sees itself, so that no row of the softmax is empty.
        mask = (self.visible.unsqueeze(1) & (span < own)) | (span == own)
        self.length = self.length + advance
        return self.key, self.value, mask.unsqueeze(1)


@dataclass(frozen=True)
class Keys:
    """What the queries of one attention attend to.

    Attributes:
        mask: ``[batch, 1, queries, keys]`` bool, True where visible; ``None`` for a causal one.
        source: ``[batch, keys, width]``, the states whose keys and values are taken; ``None`` for the queries' own.
        cos: The source's rotary table, with it.
        sin: The source's rotary table, with it.
        cache: Where keys and values are written; it makes the mask.
        kept: For the cache: see ``KeyValueCache.extend``.
        advance: For the cache.
        queries: For the cache.
    """

    mask: Tensor | None = None
    source: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    cache: KeyValueCache | None = None
    kept: Tensor | None = None
    advance: Tensor | None = None
    queries: Tensor | None = None


class TokenAttention(Attention):
    """Causal attention whose queries and keys may be different tokens, each at its own position."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Keys | None = None,
        norm: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: ``[batch, queries, width]``.
            cos: ``[queries, head_dim]`` or ``[batch, queries, head_dim]``.
            sin: The same shape.
            keys: What to attend to; ``None``: the queries' own tokens, causally.
            norm: Applied to the source of the keys, where that is not ``x``.
        """
        keys = keys or Keys()
        query = self._rotated(self.q_proj(x), self.heads, cos, sin)
        if keys.source is None:
            key, value = self._rotated(self.k_proj(x), self.kv_heads, cos, sin), self.v_proj(x)
        else:
            source = keys.source if norm is None else norm(keys.source)
            key = self._rotated(self.k_proj(source), self.kv_heads, _given(keys.cos), _given(keys.sin))
            value = self.v_proj(source)
        value, mask = self._split(value, self.kv_heads), keys.mask
        if keys.cache is not None:
            key, value, mask = keys.cache.extend(
                key, value, _given(keys.kept), _given(keys.advance), _given(keys.queries)
            )
        groups = self.heads // self.kv_heads
        if groups > 1:
            key, value = repeat_heads(key, groups), repeat_heads(value, groups)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return cast("Tensor", self.o_proj(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)))

    def _rotated(self, x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        if cos.dim() == 3:  # one table per sequence, the same for its heads
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(self._split(x, heads), cos, sin)


def _given(x: Tensor | None) -> Tensor:
    if x is None:
        raise TypeError
    return x


def causal_mask(valid: Tensor) -> Tensor:
    """Return who sees whom among tokens or slots in order: ``[batch, n]`` bool to ``[batch, 1, n, n]`` bool.

    A token sees the valid ones up to itself, and itself even if it is padding, lest its softmax be empty.
    """
    n = valid.shape[1]
    lower = torch.ones(n, n, dtype=torch.bool, device=valid.device).tril()
    itself = torch.eye(n, dtype=torch.bool, device=valid.device)
    return ((lower & valid.unsqueeze(1)) | itself).unsqueeze(1)
