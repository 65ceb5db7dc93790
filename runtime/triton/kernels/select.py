"""Which tokens a routed block computes: ``SelectTokens_L`` and ``SelectTokensBudget_L``.

One program has one row of scores. The rules are ``docs/routing_ops.md``'s, in integers but for the comparison of scores
with a threshold; so indices and their order are those of every other body.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLT_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)
FLT_MIN: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def canonical_score(score: tl.tensor) -> tl.tensor:
    """Return fp32 scores without NaN, -inf, denormals and -0."""
    finite = tl.where(score >= -FLT_MAX, score, -FLT_MAX)
    return tl.where(tl.abs(finite) < FLT_MIN, 0.0, finite)


@triton.jit
def sortable(score: tl.tensor, valid: tl.tensor) -> tl.tensor:
    """Return uint32 keys in the order of canonical scores; 0, below all of them, for padding."""
    bits = score.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, ~bits, bits | -0x80000000)
    return tl.where(valid, keys, 0).to(tl.uint32, bitcast=True)


@triton.jit
def kth_key(keys: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Return the largest key that at least ``count`` keys reach, bit by bit from the highest."""
    found = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        higher = found | bit
        found = tl.where(tl.sum((keys >= higher).to(tl.int32)) >= count, higher, found)
        bit = bit >> 1
    return found


@triton.jit
def store_slots(
    index: tl.tensor,
    selected: tl.tensor,
    token: tl.tensor,
    exists: tl.tensor,
    before: tl.tensor,
    skipped: tl.tensor,
    total: tl.tensor,
    slots: tl.tensor,
) -> None:
    """Store tokens at their slots: the ``total`` selected ones of the row ascending, then the others ascending.

    ``before`` and ``skipped`` are the numbers of selected and of other tokens that lie before these.
    """
    ones = selected.to(tl.int32)
    place = tl.cumsum(ones, 0) - ones
    others = token - tl.min(token, 0) - place
    slot = tl.where(selected, before + place, total + skipped + others)
    tl.store(index + slot, token.to(tl.int64), mask=exists & (slot < slots))


@triton.jit
def store_taken(taken: tl.tensor, total: tl.tensor, slots: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Store which slots hold a selected token: the first ``total``."""
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(taken + slot, (slot < total).to(tl.int8), mask=slot < slots)


@triton.jit
def select_tokens(
    score: tl.tensor,
    valid: tl.tensor,
    index: tl.tensor,
    taken: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:
    """Select the valid tokens of the highest scores, the lower index first among equals; in windows if WINDOW > 0.

    BLOCK holds a window, or without windows the row. How many tokens are selected in all, and so where the others
    begin, follows from the number of valid ones in each window; the scores are then read once.
    """
    row = tl.program_id(0).to(tl.int64)
    score += row * tokens
    valid += row * tokens
    index += row * slots
    taken += row * slots
    width = tokens
    if WINDOW > 0:
        width = tl.full([], WINDOW, tl.int32)
    share = slots // (tokens // width)
    lane = tl.arange(0, BLOCK)
    total = tl.full([], 0, tl.int32)
    for start in range(0, tokens, width):
        kept = tl.load(valid + start + lane, mask=lane < width, other=0) != 0
        total += tl.minimum(tl.sum(kept.to(tl.int32)), share)
    before = tl.full([], 0, tl.int32)
    for start in range(0, tokens, width):
        exists = lane < width
        kept = tl.load(valid + start + lane, mask=exists, other=0) != 0
        keys = sortable(canonical_score(tl.load(score + start + lane, mask=exists, other=0.0)), kept)
        count = tl.minimum(tl.sum(kept.to(tl.int32)), share)
        least = kth_key(keys, count)
        above = keys > least
        equal = keys == least  # no padding: a window without a valid token has count 0, and no key reaches ``least``
        left = count - tl.sum(above.to(tl.int32))
        selected = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
        store_slots(index, selected, start + lane, exists, before, start - before, total, slots)
        before += count
    store_taken(taken, total, slots, BLOCK)


@triton.jit
def lower(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    """Return the smaller of two numbers."""
    return tl.minimum(left, right)


@triton.jit
def room_at(
    position: tl.tensor,
    numerator: tl.tensor,
    denominator: tl.tensor,
    margin: tl.tensor,
    before: tl.tensor,
    slots: tl.tensor,
) -> tl.tensor:
    """Return how many tokens of this chunk the budget grants at a position, 0 to K."""
    granted = numerator * position // denominator + margin - before
    return tl.minimum(tl.maximum(granted, 0), slots).to(tl.int32)


@triton.jit
def budget_chunk(
    score: tl.tensor,
    valid: tl.tensor,
    threshold: tl.tensor,
    budget: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    seen: tl.tensor,
    taken: tl.tensor,
    asked: tl.tensor,
    slack: tl.tensor,
) -> tl.tuple:
    """Return which of some tokens are selected, and the numbers behind them: seen, asked, and the least r - A.

    The closed form, asked of the token before: C is the number selected up to a token, r the room there, A the number
    that asked. A token that asks is selected iff C of the token before is below r, and that C is
    A + min(0, min (r - A)) over the tokens before. Position and A of the token before follow from a lane's own bits.
    """
    numerator, denominator, margin = tl.load(budget), tl.load(budget + 1), tl.load(budget + 2)
    exists = token < tokens
    kept = tl.load(valid + token, mask=exists, other=0) != 0
    value = canonical_score(tl.load(score + token, mask=exists, other=0.0))
    asks = kept & (value >= tl.load(threshold))
    ones = asks.to(tl.int32)
    before = asked + tl.cumsum(ones, 0) - ones
    position = seen + tl.cumsum(kept.to(tl.int32), 0).to(tl.int64)
    room = room_at(position, numerator, denominator, margin, taken, slots)
    earlier = room_at(position - kept.to(tl.int64), numerator, denominator, margin, taken, slots)
    spare = tl.where(token == 0, 0, earlier - before)
    least = tl.minimum(tl.associative_scan(spare, 0, lower), slack)
    selected = asks & (before + least < room)
    return selected, seen + tl.sum(kept.to(tl.int32)), asked + tl.sum(ones), tl.minimum(slack, tl.min(spare, 0))


@triton.jit
def select_tokens_budget(
    score: tl.tensor,
    valid: tl.tensor,
    threshold: tl.tensor,
    budget: tl.tensor,
    state: tl.tensor,
    index: tl.tensor,
    taken: tl.tensor,
    state_out: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Select, in order, the valid tokens that reach the threshold, as far as the running budget goes.

    BLOCK tokens at a time; unless they are the WHOLE row it is scanned twice, first for the number of tokens that are
    selected, where the others begin.
    """
    row = tl.program_id(0).to(tl.int64)
    score += row * tokens
    valid += row * tokens
    index += row * slots
    taken += row * slots
    first, before = tl.load(state + 2 * row), tl.load(state + 2 * row + 1)
    zero = tl.full([], 0, tl.int32)
    lane = tl.arange(0, BLOCK)
    if WHOLE:
        selected, seen, _, _ = budget_chunk(
            score, valid, threshold, budget, lane, tokens, slots, first, before, zero, zero
        )
        total = tl.sum(selected.to(tl.int32))
        store_slots(index, selected, lane, lane < tokens, zero, zero, total, slots)
    else:
        seen, asked, slack, total = first, zero, zero, zero
        for start in range(0, tokens, BLOCK):
            selected, seen, asked, slack = budget_chunk(
                score, valid, threshold, budget, start + lane, tokens, slots, seen, before, asked, slack
            )
            total += tl.sum(selected.to(tl.int32))
        again, asked, slack, stored = first, zero, zero, zero
        for start in range(0, tokens, BLOCK):
            token = start + lane
            selected, again, asked, slack = budget_chunk(
                score, valid, threshold, budget, token, tokens, slots, again, before, asked, slack
            )
            store_slots(index, selected, token, token < tokens, stored, start - stored, total, slots)
            stored += tl.sum(selected.to(tl.int32))
    store_taken(taken, total, slots, BLOCK)
    tl.store(state_out + 2 * row, seen)
    tl.store(state_out + 2 * row + 1, before + total)
