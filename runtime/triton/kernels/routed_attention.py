"""Attention of the tokens that a routed block computes, by their positions, under an online softmax.

No causal mask is ever built: a query's own position says which keys it sees.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def routed_attention(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    index: tl.tensor,
    kept: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SCALE: tl.constexpr,
) -> None:
    """Attend from ``query [B, K, KV_HEADS * GROUP, WIDTH]`` to ``key`` and ``value [B, T, KV_HEADS, WIDTH]``.

    A slot's query sees the keys up to its token, ``index [B, K]``, of those that ``kept [B, T]`` marks. Where ``index``
    is None the keys are the slots themselves, T is K, and slot j sees the slots up to j. A query that sees no key
    gets 0. One program has ROWS queries of the GROUP heads that share a key head, so that each key it needs is loaded
    once; keys behind its last token are not loaded.
    """
    tiles = tl.cdiv(slots * GROUP, ROWS)
    head = tl.program_id(0) // tiles % KV_HEADS
    batch = (tl.program_id(0) // tiles // KV_HEADS).to(tl.int64)
    first = tl.program_id(0) % tiles * ROWS
    place = first + tl.arange(0, ROWS)
    slot = place // GROUP
    asked = slot < slots
    lane = tl.arange(0, LANES)
    if index is None:
        position = tl.where(asked, slot, -1)
    else:
        position = tl.load(index + batch * slots + slot, mask=asked, other=-1).to(tl.int32)
    # 64 bits for where a program begins; from there 32 are enough, and take half the registers.
    begin = ((batch * slots + first // GROUP) * KV_HEADS + head) * (GROUP * WIDTH)
    row = (slot - first // GROUP) * (KV_HEADS * GROUP) + place % GROUP
    offset = row[:, None] * WIDTH + lane[None, :]
    inside = asked[:, None] & (lane < WIDTH)[None, :]
    q = tl.load(query + begin + offset, mask=inside, other=0.0)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, LANES], tl.float32)
    each = tl.arange(0, KEYS)
    key += (batch * tokens * KV_HEADS + head) * WIDTH
    value += (batch * tokens * KV_HEADS + head) * WIDTH
    kept += batch * tokens
    for start in range(0, tl.minimum(tl.max(position, 0) + 1, tokens), KEYS):
        token = start + each
        # What is not kept may hold anything, NaN too: a weight of zero would not silence it.
        real = tl.load(kept + token, mask=token < tokens, other=0) != 0
        across = each[None, :] * (KV_HEADS * WIDTH) + lane[:, None]
        k = tl.load(key + across, mask=real[None, :] & (lane < WIDTH)[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") * (SCALE * LOG2_E)
        logits = tl.where(real[None, :] & (token[None, :] <= position[:, None]), logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        remain = tl.exp2(peak - level)
        weights = tl.exp2(logits - level[:, None])
        mass = mass * remain + tl.sum(weights, axis=1)
        along = each[:, None] * (KV_HEADS * WIDTH) + lane[None, :]
        v = tl.load(value + along, mask=real[:, None] & (lane < WIDTH)[None, :], other=0.0)
        mixed = mixed * remain[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = higher
        key += KEYS * KV_HEADS * WIDTH
        value += KEYS * KV_HEADS * WIDTH
    mixed = mixed / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(out + begin + offset, mixed.to(out.dtype.element_ty), mask=inside)
