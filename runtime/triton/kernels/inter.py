"""The first phase of the two-phase form: ``AttnResInter_n``, several queries over one bank."""

from __future__ import annotations

import triton
import triton.language as tl

from depthwire.runtime.triton.kernels._mix import inverse_rms, load_row, load_tile, pointer_table


@triton.jit
def attn_res_inter(
    queries: tl.tensor,
    sources: tl.tuple,
    out: tl.tensor,
    lse: tl.tensor,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    QUERIES: tl.constexpr,
    SHARE: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """Read COUNT sources with QUERIES queries: outputs normalised per query, and the logarithm of each mass.

    PROGRAMS programs handle one row of the ``[rows, WIDTH]`` sources, SHARE queries each. They lie next to each other
    in the grid, so that all but the first find the row's sources in the L2 cache. ``out`` is ``[QUERIES, rows,
    WIDTH]``, ``lse`` fp32 ``[QUERIES, rows]``.
    """
    lane = tl.arange(0, BLOCK)[None, :]
    keep = lane < WIDTH
    program = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64) // PROGRAMS
    row_index = program // PROGRAMS
    which = (program % PROGRAMS) * SHARE + tl.arange(0, SHARE)[:, None]
    asked = which < QUERIES
    u = load_row(queries, which * WIDTH + lane, asked & keep)
    peak = tl.full([SHARE, 1], float("-inf"), tl.float32)
    mass = tl.zeros([SHARE, 1], tl.float32)
    mixed = tl.zeros([SHARE, BLOCK], tl.float32)
    offset = row_index * WIDTH + lane
    table = pointer_table(sources, COUNT, 1, GROUPS)
    following, _ = load_tile(table, 0, sources[0], offset, keep, COUNT, 1, GROUPS, ALIGNED)
    for index in range(COUNT):
        row = following
        # The next source is on its way while this one is reduced.
        following, _ = load_tile(table, index + 1, sources[0], offset, keep, COUNT, 1, GROUPS, ALIGNED)
        rstd = inverse_rms(tl.sum(row * row), EPS, WIDTH)
        logits = tl.sum(row * u, axis=1, keep_dims=True) * rstd * SCALE
        higher = tl.maximum(peak, logits)
        remain = tl.exp(peak - higher)
        weights = tl.exp(logits - higher)
        peak, mass, mixed = higher, mass * remain + weights, mixed * remain + weights * row
    place = which * rows + row_index
    tl.store(out + place * WIDTH + lane, (mixed / mass).to(out.dtype.element_ty), mask=asked & keep)
    tl.store(lse + place, peak + tl.log(mass), mask=asked)
