"""Tokens into a routed block and out of it: ``GatherTokens`` and ``ScatterTokens``.

Tokens are moved as words of 4, 2 or 1 bytes, whatever their dtype: WORDS to a token, the largest word that divides it.
An index that is no token's is not followed: nothing is read or written outside the tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_tokens(
    x: tl.tensor,
    index: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Copy the tokens of TILE slots; a slot whose index is none is zeroed."""
    tiles = tl.cdiv(slots, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    slot = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    exists = slot < slots
    token = tl.load(index + row * slots + slot, mask=exists, other=-1)
    found = exists & (token >= 0) & (token < tokens)
    source = ((row * tokens + token) * WORDS)[:, None]
    target = ((row * slots + slot) * WORDS)[:, None]
    for start in range(0, WORDS, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        words = tl.load(x + source + column, mask=found[:, None] & (column < WORDS), other=0)
        tl.store(out + target + column, words, mask=exists[:, None] & (column < WORDS))


@triton.jit
def scatter_tokens(
    base: tl.tensor,
    index: tl.tensor,
    taken: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    """Write TILE tokens, each from its slot or from the base; where ``out`` is ``base``, from slots alone.

    Slots are in no order, so a program looks through all of its row for those of its tokens. Each token is then read
    once, from where it comes, and written once.
    """
    tiles = tl.cdiv(tokens, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    exists = token < tokens
    slot = tl.full([TILE], -1, tl.int32)
    for start in range(0, slots, SLOTS):
        each = start + tl.arange(0, SLOTS)
        here = each < slots
        named = tl.load(index + row * slots + each, mask=here, other=-1)
        used = tl.load(taken + row * slots + each, mask=here, other=0) != 0
        own = used[None, :] & (named[None, :] == token[:, None])
        slot = tl.maximum(slot, tl.max(tl.where(own, each[None, :], -1), axis=1))
    moved = exists & (slot >= 0)
    in_place = out.to(tl.int64) == base.to(tl.int64)
    stays = exists & (slot < tl.where(in_place, -1, 0))
    source = ((row * slots + slot) * WORDS)[:, None]
    target = ((row * tokens + token) * WORDS)[:, None]
    for start in range(0, WORDS, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = column < WORDS
        fresh = tl.load(rows + source + column, mask=moved[:, None] & inside, other=0)
        old = tl.load(base + target + column, mask=stays[:, None] & inside, other=0)
        words = tl.where(moved[:, None], fresh, old)
        tl.store(out + target + column, words, mask=(moved | stays)[:, None] & inside)
