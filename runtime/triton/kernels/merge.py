"""The reads that start from an inter-block result: ``AttnResMerge_m`` and its Add and Norm forms."""

from __future__ import annotations

import triton
import triton.language as tl

from depthwire.runtime.triton.kernels._mix import (
    finish,
    first_state,
    join,
    last_source,
    load_row,
    load_tile,
    pointer_table,
    take_tile,
)


@triton.jit
def attn_res_merge(
    query: tl.tensor,
    norm_weight: tl.tensor,
    inter_out: tl.tensor,
    inter_lse: tl.tensor,
    sources: tl.tuple,
    delta: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    LAST_BIAS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    INDEX: tl.constexpr,
) -> None:
    """Read COUNT sources and row INDEX of an inter-block result, which counts as one more, mixed already.

    One program handles one row of the ``[rows, WIDTH]`` sources. ``inter_out`` is ``[S, rows, WIDTH]`` and
    ``inter_lse`` fp32 ``[S, rows]``, where rows is the number of programs.
    """
    lane = tl.arange(0, BLOCK)[None, :]
    keep = lane < WIDTH
    row_index = tl.program_id(0).to(tl.int64)
    mixed_index = tl.num_programs(0).to(tl.int64) * INDEX + row_index
    offset = row_index * WIDTH + lane
    peak = tl.load(inter_lse + mixed_index)
    mass = 1.0
    mixed = load_row(inter_out, mixed_index * WIDTH + lane, keep)
    if COUNT > 0:
        u = load_row(query, lane, keep)
        row = last_source(sources[COUNT - 1], delta, total, offset, keep)
        peak2, mass2, mixed2 = first_state(row, u, LAST_BIAS, EPS, SCALE, WIDTH, False)
        peak, mass, mixed = join(peak, mass, mixed, peak2, mass2, mixed2)
        if COUNT > 1:
            table = pointer_table(sources, COUNT - 1, TILE, GROUPS)
            for group in range(GROUPS):
                rows, exists = load_tile(table, group, sources[0], offset, keep, COUNT - 1, TILE, GROUPS, ALIGNED)
                peak, mass, mixed = take_tile(peak, mass, mixed, rows, exists, u, EPS, SCALE, WIDTH, False)
    finish(mass, mixed, norm_weight, out, offset, lane, keep, NORM_EPS, WIDTH)
