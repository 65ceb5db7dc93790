"""``SurpriseScore``, in two launches: sums over the width, and what depends on earlier tokens. Or all of it in one.

The first reads ``delta`` and ``prior`` once and leaves two numbers a token, D_st and D_st - D_ch; the second makes the
rank of them. Where there is no memory to leave them in, as in a TensorRT plugin that is one launch, each program takes
the sums of the tokens before its own again. All arithmetic is fp32. Padding is never read.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def surprise_sums(
    delta: tl.tensor,
    prior: tl.tensor,
    valid: tl.tensor,
    sums: tl.tensor,
    tokens: tl.tensor,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Store D_st and D_st - D_ch of TILE tokens of ``[B, T, WIDTH]`` as fp32 ``[B, 2, T]``; zero for padding.

    The difference of the two means is the mean of (2 delta - prior) prior, without their cancellation.
    """
    tiles = tl.cdiv(tokens, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    exists = token < tokens
    kept = exists & (tl.load(valid + row * tokens + token, mask=exists, other=0) != 0)
    offset = ((row * tokens + token) * WIDTH)[:, None]
    static = tl.zeros([TILE, COLUMNS], tl.float32)
    change = tl.zeros([TILE, COLUMNS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = kept[:, None] & (column < WIDTH)
        actual = tl.load(delta + offset + column, mask=inside, other=0.0).to(tl.float32)
        expected = tl.load(prior + offset + column, mask=inside, other=0.0).to(tl.float32)
        static += actual * actual
        change += (actual + (actual - expected)) * expected
    place = row * 2 * tokens + token
    tl.store(sums + place, tl.sum(static, axis=1) * (1.0 / WIDTH), mask=exists)
    tl.store(sums + place + tokens, tl.sum(change, axis=1) * (1.0 / WIDTH), mask=exists)


@triton.jit
def softplus(value: tl.tensor) -> tl.tensor:
    """Return log(1 + exp(value)) as max(value, 0) + 2 artanh(e / (2 + e)), e = exp(-|value|).

    The argument is at most 1/3, and the series up to its 15th power is off by at most 2e-9 of the result; log(1 + e)
    would be 0 below e = 6e-8.
    """
    e = tl.exp(-tl.abs(value))
    ratio = e / (2.0 + e)
    square = ratio * ratio
    series = square * (1.0 / 15.0) + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    return tl.maximum(value, 0.0) + 2.0 * (ratio + ratio * square * series)


@triton.jit
def first_valid(valid: tl.tensor, tokens: tl.tensor, SCAN: tl.constexpr) -> tl.tensor:
    """Return the first token of a row that is no padding; the number of tokens where all are."""
    first = tokens
    for start in range(0, tokens, SCAN):
        each = start + tl.arange(0, SCAN)
        bit = tl.load(valid + each, mask=each < tokens, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(bit, each, tokens), 0))
    return first


@triton.jit
def surprise_rank(
    sums: tl.tensor,
    criteria: tl.tensor,
    valid: tl.tensor,
    rank: tl.tensor,
    tokens: tl.tensor,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCAN: tl.constexpr,
) -> None:
    """Store the rank of TILE tokens; 0 for padding.

    The average is summed afresh for every token, from a cache: a running sum would lose small values behind a large
    first one. What lies before the first valid token counts as that one.
    """
    tiles = tl.cdiv(tokens, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    exists = token < tokens
    valid += row * tokens
    sums += row * 2 * tokens
    kept = exists & (tl.load(valid + token, mask=exists, other=0) != 0)
    first = first_valid(valid, tokens, SCAN)
    behind = tl.minimum(token - first + 1, WINDOW)  # tokens of the window that there are
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    for start in range(0, tl.minimum(tokens, WINDOW), COLUMNS):
        back = (start + tl.arange(0, COLUMNS))[None, :]
        inside = kept[:, None] & (back < behind[:, None])
        total += tl.load(sums + token[:, None] - back, mask=inside, other=0.0)
    before = tl.load(sums + first, mask=first < tokens, other=0.0)
    missing = (WINDOW - behind).to(tl.float32)
    average = (tl.sum(total, axis=1) + missing * before) * (1.0 / WINDOW)
    offset, m_cu = tl.load(criteria).to(tl.float32), tl.load(criteria + 1).to(tl.float32)
    beta_ce, beta_cu = tl.load(criteria + 2).to(tl.float32), tl.load(criteria + 3).to(tl.float32)
    static = tl.load(sums + token, mask=exists, other=0.0)
    expected_change = tl.load(sums + tokens + token, mask=exists, other=0.0) + offset
    score = softplus(beta_ce * expected_change) + softplus(beta_cu * (static - m_cu * average))
    tl.store(rank + row * tokens + token, tl.where(kept, score, 0.0), mask=exists)


@triton.jit
def surprise_score(
    delta: tl.tensor,
    prior: tl.tensor,
    criteria: tl.tensor,
    valid: tl.tensor,
    rank: tl.tensor,
    tokens: tl.tensor,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SCAN: tl.constexpr,
) -> None:
    """Store the rank of TILE tokens of ``[B, T, WIDTH]``; 0 for padding.

    The tokens of the windows are taken ROWS at a time: those before the tile for the average alone, ``delta`` only.
    """
    tiles = tl.cdiv(tokens, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    begin = tl.program_id(0) % tiles * TILE
    token = begin + tl.arange(0, TILE)
    exists = token < tokens
    valid += row * tokens
    delta += row * tokens * WIDTH
    prior += row * tokens * WIDTH
    kept = exists & (tl.load(valid + token, mask=exists, other=0) != 0)
    first = first_valid(valid, tokens, SCAN)
    behind = tl.minimum(token - first + 1, WINDOW)  # tokens of the window that there are
    end = tl.minimum(begin + TILE, tokens)
    total = tl.zeros([TILE], tl.float32)
    static = tl.zeros([TILE], tl.float32)
    change = tl.zeros([TILE], tl.float32)
    # Left of ``first`` there is nothing to sum; begin - WINDOW does not overflow, both being below 2^31.
    for start in range(tl.maximum(begin - (WINDOW - 1), first), end, ROWS):
        each = start + tl.arange(0, ROWS)
        bit = (each < end) & (tl.load(valid + each, mask=each < end, other=0) != 0)
        own = bit & (each >= begin)
        offset = (each.to(tl.int64) * WIDTH)[:, None]
        squares = tl.zeros([ROWS, COLUMNS], tl.float32)
        changes = tl.zeros([ROWS, COLUMNS], tl.float32)
        for left in range(0, WIDTH, COLUMNS):
            column = (left + tl.arange(0, COLUMNS))[None, :]
            inside = column < WIDTH
            actual = tl.load(delta + offset + column, mask=bit[:, None] & inside, other=0.0).to(tl.float32)
            expected = tl.load(prior + offset + column, mask=own[:, None] & inside, other=0.0).to(tl.float32)
            squares += actual * actual
            changes += (actual + (actual - expected)) * expected
        mean = (tl.sum(squares, axis=1) * (1.0 / WIDTH))[None, :]
        moved = (tl.sum(changes, axis=1) * (1.0 / WIDTH))[None, :]
        back = token[:, None] - each[None, :]
        total += tl.sum(tl.where((back >= 0) & (back < behind[:, None]), mean, 0.0), axis=1)
        static += tl.sum(tl.where(back == 0, mean, 0.0), axis=1)
        change += tl.sum(tl.where(back == 0, moved, 0.0), axis=1)
    # What lies before the first valid token counts as that one, which the windows of later tiles do not reach.
    before = tl.zeros([COLUMNS], tl.float32)
    width = tl.where((first < tokens) & (begin - WINDOW < first), WIDTH, 0)
    for left in range(0, WIDTH, COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        actual = tl.load(delta + first.to(tl.int64) * WIDTH + column, mask=column < width, other=0.0).to(tl.float32)
        before += actual * actual
    missing = (WINDOW - behind).to(tl.float32)
    average = (total + missing * (tl.sum(before, 0) * (1.0 / WIDTH))) * (1.0 / WINDOW)
    offset_ce, m_cu = tl.load(criteria).to(tl.float32), tl.load(criteria + 1).to(tl.float32)
    beta_ce, beta_cu = tl.load(criteria + 2).to(tl.float32), tl.load(criteria + 3).to(tl.float32)
    score = softplus(beta_ce * (change + offset_ce)) + softplus(beta_cu * (static - m_cu * average))
    tl.store(rank + row * tokens + token, tl.where(kept, score, 0.0), mask=exists)
