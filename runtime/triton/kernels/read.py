"""The reads that scan their sources once: ``AttnResRead_n`` and its Add, Unit and Norm forms."""

from __future__ import annotations

import triton
import triton.language as tl

from depthwire.runtime.triton.kernels._mix import (
    finish,
    first_state,
    last_source,
    load_row,
    load_tile,
    pointer_table,
    take_tile,
)


@triton.jit
def attn_res_read(
    query: tl.tensor,
    norm_weight: tl.tensor,
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
    UNIT: tl.constexpr,
) -> None:
    """Read COUNT sources; ``delta`` with ``total``, and ``norm_weight``, are None in the forms without them.

    One program handles one row of the ``[rows, WIDTH]`` sources, all of it in registers, and so each source is read
    from memory once. The last source seeds the online softmax; the others follow TILE at a time.
    """
    lane = tl.arange(0, BLOCK)[None, :]
    keep = lane < WIDTH
    offset = tl.program_id(0).to(tl.int64) * WIDTH + lane
    u = load_row(query, lane, keep)
    row = last_source(sources[COUNT - 1], delta, total, offset, keep)
    peak, mass, mixed = first_state(row, u, LAST_BIAS, EPS, SCALE, WIDTH, UNIT)
    if COUNT > 1:
        table = pointer_table(sources, COUNT - 1, TILE, GROUPS)
        for group in range(GROUPS):
            rows, exists = load_tile(table, group, sources[0], offset, keep, COUNT - 1, TILE, GROUPS, ALIGNED)
            peak, mass, mixed = take_tile(peak, mass, mixed, rows, exists, u, EPS, SCALE, WIDTH, UNIT)
    finish(mass, mixed, norm_weight, out, offset, lane, keep, NORM_EPS, WIDTH)
