"""Device functions that the kernels share: one row of every source, mixed under an online softmax.

The state of the softmax over depth is three values: ``peak``, the largest logit so far; ``mass``, the sum of
exp(logit - peak); ``mixed``, the sum of exp(logit - peak) times the source, ``[1, BLOCK]`` in registers. Taking in
further sources rescales the last two. All arithmetic is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse_rms(squares: tl.tensor, eps: tl.constexpr, width: tl.constexpr) -> tl.tensor:
    """Return 1 / sqrt(squares / width + eps)."""
    return tl.rsqrt(squares * (1.0 / width) + eps)


@triton.jit
def load_row(pointer: tl.tensor, offset: tl.tensor, keep: tl.tensor) -> tl.tensor:
    """Load one row in fp32; lanes beyond the width are zero, which no sum over the width notices."""
    return tl.load(pointer + offset, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def last_source(source: tl.tensor, delta: tl.tensor, total: tl.tensor, offset: tl.tensor, keep: tl.tensor) -> tl.tensor:
    """Load the last source; with a delta, add it, round to the sources' dtype and store the sum."""
    row = tl.load(source + offset, mask=keep, other=0.0)
    if delta is not None:
        # fp32 holds more than twice the digits of fp16 and bf16, so the second rounding is that of an exact sum.
        row = (row.to(tl.float32) + load_row(delta, offset, keep)).to(row.dtype)
        tl.store(total + offset, row, mask=keep)
    return row.to(tl.float32)


@triton.jit
def first_state(
    row: tl.tensor,
    query: tl.tensor,
    bias: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
) -> tl.tensor:
    """Return (peak, mass, mixed) of one source alone."""
    rstd = inverse_rms(tl.sum(row * row), EPS, WIDTH)
    peak = tl.sum(row * query) * rstd * SCALE + bias
    if UNIT:
        row = row * rstd
    return peak, 1.0, row


@triton.jit
def pointer_table(sources: tl.tuple, COUNT: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr) -> tl.tensor:
    """Return the addresses of the first COUNT sources as int64 ``[GROUPS, TILE]``, zero beyond them.

    The kernel takes every source as a parameter of its own, and parameters cannot be indexed by a loop's variable; a
    table in registers can. So the code does not grow with the number of sources, and nothing is uploaded.
    """
    place = tl.arange(0, GROUPS)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    table = tl.zeros([GROUPS, TILE], tl.int64)
    for index in tl.static_range(COUNT):
        table = tl.where(place == index, sources[index].to(tl.int64), table)
    return table


@triton.jit
def load_tile(
    table: tl.tensor,
    group: tl.tensor,
    kind: tl.tensor,
    offset: tl.tensor,
    keep: tl.tensor,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Load one row of TILE sources: fp32 ``[TILE, BLOCK]``, and which of them exist, ``[TILE, 1]``."""
    chosen = tl.arange(0, GROUPS)[:, None] == group
    address = tl.sum(tl.where(chosen, table, 0), axis=0)[:, None]
    exists = (group * TILE + tl.arange(0, TILE) < COUNT)[:, None]
    pointer = address.to(kind.dtype) + offset
    if ALIGNED:
        pointer = tl.multiple_of(tl.max_contiguous(pointer, [1, pointer.shape[1]]), [16, 16])
    return tl.load(pointer, mask=exists & keep, other=0.0).to(tl.float32), exists


@triton.jit
def take_tile(
    peak: tl.tensor,
    mass: tl.tensor,
    mixed: tl.tensor,
    rows: tl.tensor,
    exists: tl.tensor,
    query: tl.tensor,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
) -> tl.tensor:
    """Take TILE further sources into the state."""
    rstd = inverse_rms(tl.sum(rows * rows, axis=1, keep_dims=True), EPS, WIDTH)
    logits = tl.sum(rows * query, axis=1, keep_dims=True) * rstd * SCALE
    logits = tl.where(exists, logits, float("-inf"))
    higher = tl.maximum(peak, tl.max(logits))
    keep = tl.exp(peak - higher)
    weights = tl.exp(logits - higher)
    mass = mass * keep + tl.sum(weights)
    if UNIT:
        weights = tl.where(exists, weights * rstd, 0.0)
    return higher, mass, mixed * keep + tl.sum(weights * rows, axis=0, keep_dims=True)


@triton.jit
def join(
    peak: tl.tensor, mass: tl.tensor, mixed: tl.tensor, peak2: tl.tensor, mass2: tl.tensor, mixed2: tl.tensor
) -> tl.tuple:
    """Return the state of two disjoint sets of sources from the states of each."""
    higher = tl.maximum(peak, peak2)
    keep, keep2 = tl.exp(peak - higher), tl.exp(peak2 - higher)
    return higher, mass * keep + mass2 * keep2, mixed * keep + mixed2 * keep2


@triton.jit
def finish(
    mass: tl.tensor,
    mixed: tl.tensor,
    norm_weight: tl.tensor,
    out: tl.tensor,
    offset: tl.tensor,
    lane: tl.tensor,
    keep: tl.tensor,
    NORM_EPS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Divide by the mass, apply the norm that follows if there is one, and store the row."""
    mixed = mixed / mass
    if norm_weight is not None:
        gain = load_row(norm_weight, lane, keep)
        mixed = mixed * inverse_rms(tl.sum(mixed * mixed), NORM_EPS, WIDTH) * gain
    tl.store(out + offset, mixed.to(out.dtype.element_ty), mask=keep)
