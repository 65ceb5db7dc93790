"""The one case table of the routing operators, and their rules written out as plain loops.

Every body of every operator is tested against these: the loops are the rules of ``docs/routing_ops.md`` one token at a
time, with Python's integers and nothing shared with the bodies.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from depthwire.ops import surprise_score

if TYPE_CHECKING:
    from collections.abc import Sequence

FLT_MAX = torch.finfo(torch.float32).max
FLT_MIN = torch.finfo(torch.float32).tiny

SCORES = ("normal", "equal", "ties", "infinite", "nan", "denormal", "extreme", "rising", "falling")
PADDINGS = ("none", "left", "right", "ragged", "all", "scattered")

# What the odd scores are drawn from. Two denormals and the zeros are one score; FLT_MIN is another.
_POOLS = {
    "equal": [0.25],
    "ties": [-1.0, 0.0, 1.0, 2.0],
    "infinite": [math.inf, -math.inf, 0.5, -0.5, FLT_MAX, -FLT_MAX],
    "nan": [math.nan, -math.nan, -math.inf, -FLT_MAX, 0.5, -0.5],
    "denormal": [0.0, -0.0, 1e-45, -1e-45, FLT_MIN / 2, -FLT_MIN / 2, FLT_MIN, -FLT_MIN],
    "extreme": [FLT_MAX, -FLT_MAX, FLT_MAX * 0.99, 1e-38, -1e-38, 1.0, 1.0 + 2.0**-23, 1.0 - 2.0**-24],
}


@dataclass(frozen=True)
class SelectCase:
    """One selection.

    Attributes:
        tokens: T.
        slots: K.
        batch: B.
        scores: Of ``SCORES``.
        padding: Of ``PADDINGS``; ``ragged`` pads each row otherwise, ``all`` leaves one row without a valid token.
        window: Of the top-k rule; 0 for none.
        threshold: Of the budget rule.
        budget: Of the budget rule: numerator, denominator, margin.
        state: Of the budget rule: tokens seen and taken before, in row 0; other rows have had a little more.
    """

    tokens: int
    slots: int
    batch: int = 2
    scores: str = "normal"
    padding: str = "none"
    window: int = 0
    threshold: float = 0.0
    budget: tuple[int, int, int] = (1, 2, 1)
    state: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        """Return a name for pytest."""
        name = f"T{self.tokens}-K{self.slots}-B{self.batch}-{self.scores}-{self.padding}"
        return name + (f"-W{self.window}" if self.window else "")


@dataclass(frozen=True)
class SelectOperands:
    """The tensors of a selection, in the dtypes of the operators."""

    score: Tensor
    valid: Tensor
    slots: Tensor
    threshold: Tensor
    budget: Tensor
    state: Tensor


def draw_scores(kind: str, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Return fp32 scores ``[B, T]`` of one kind."""
    if kind in _POOLS:
        pool = torch.tensor(_POOLS[kind], dtype=torch.float32)
        return pool[torch.randint(len(pool), (batch, tokens), generator=generator)]
    score = torch.randn(batch, tokens, generator=generator)
    if kind == "normal":
        return score
    return score.sort(dim=1, descending=kind == "falling").values


def draw_valid(padding: str, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Return which tokens ``[B, T]`` are valid."""
    position = torch.arange(tokens).expand(batch, tokens)
    if padding == "scattered":
        return torch.rand(batch, tokens, generator=generator) < 0.7
    length = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    start = torch.zeros_like(length)
    match padding:
        case "none":
            length = torch.full_like(length, tokens)
        case "left":
            start = tokens - length
        case "ragged":
            start = ((tokens - length) * torch.rand(batch, 1, generator=generator)).long()
        case "all":
            length[0] = 0
    return (position >= start) & (position < start + length)


def select_operands(case: SelectCase, *, seed: int = 0) -> SelectOperands:
    """Draw the tensors of a case."""
    generator = torch.Generator().manual_seed(seed + 1000 * case.tokens + case.slots)
    more = torch.arange(case.batch)[:, None] * torch.tensor([3, 1])
    return SelectOperands(
        draw_scores(case.scores, case.batch, case.tokens, generator),
        draw_valid(case.padding, case.batch, case.tokens, generator),
        torch.arange(case.slots),
        torch.tensor(case.threshold),
        torch.tensor(case.budget),
        torch.tensor(case.state) + more,
    )


def canonical(score: float) -> float:
    """One score as every backend is to see it."""
    if math.isnan(score) or score < -FLT_MAX:
        return -FLT_MAX
    return 0.0 if abs(score) < FLT_MIN else score


def expected_top_k(score: Tensor, valid: Tensor, slots: int, window: int = 0) -> tuple[Tensor, Tensor]:
    """The top-k rule as a loop: index ``[B, K]`` and taken ``[B, K]``."""
    tokens = score.shape[1]
    width = window or tokens
    selected = []
    for scores, valids in zip(score.tolist(), valid.tolist(), strict=True):
        chosen: set[int] = set()
        for start in range(0, tokens, width):
            inside = [t for t in range(start, start + width) if valids[t]]
            inside.sort(key=lambda t: (-canonical(scores[t]), t))
            chosen.update(inside[: slots * width // tokens])
        selected.append(chosen)
    return _slots(selected, tokens, slots)


def expected_budget(operands: SelectOperands) -> tuple[Tensor, Tensor, Tensor]:
    """The running budget as a loop: index ``[B, K]``, taken ``[B, K]`` and the state ``[B, 2]`` behind it."""
    slots, threshold = len(operands.slots), float(operands.threshold)
    numerator, denominator, margin = operands.budget.tolist()
    selected, states = [], []
    rows = zip(operands.score.tolist(), operands.valid.tolist(), operands.state.tolist(), strict=True)
    for scores, valids, (seen, before) in rows:
        chosen: set[int] = set()
        position, taken = seen, before
        for t, (score, is_valid) in enumerate(zip(scores, valids, strict=True)):
            position += is_valid
            cap = min(numerator * position // denominator + margin, before + slots)
            if is_valid and canonical(score) >= threshold and taken < cap:
                chosen.add(t)
                taken += 1
        selected.append(chosen)
        states.append([position, taken])
    return *_slots(selected, operands.score.shape[1], slots), torch.tensor(states)


def _slots(selected: list[set[int]], tokens: int, slots: int) -> tuple[Tensor, Tensor]:
    rows = [(sorted(chosen) + [t for t in range(tokens) if t not in chosen])[:slots] for chosen in selected]
    return torch.tensor(rows), torch.tensor([[slot < len(chosen) for slot in range(slots)] for chosen in selected])


def _select_table() -> list[SelectCase]:
    sizes = [
        (1, 1, 1),
        (1, 1, 3),
        (2, 1, 2),
        (7, 3, 3),
        (7, 7, 2),
        (64, 32, 3),
        (65, 1, 2),
        (100, 50, 3),
        (129, 128, 2),
    ]
    cases = [
        SelectCase(tokens, slots, batch, scores, padding)
        for (tokens, slots, batch), (scores, padding) in itertools.product(
            sizes, [*itertools.product(("normal", "ties"), PADDINGS)]
        )
    ]
    cases += [SelectCase(33, 16, 3, scores, padding) for scores in SCORES for padding in ("none", "ragged", "all")]
    cases += [SelectCase(512, 256, 1), SelectCase(2048, 512, 3, "ties", "ragged"), SelectCase(512, 512, 2, "equal")]
    return list(dict.fromkeys(cases))


SELECT_CASES = _select_table()

WINDOW_CASES = [
    SelectCase(tokens, slots, 3, scores, padding, window=window)
    for (tokens, slots, window) in [(12, 6, 4), (12, 12, 3), (12, 12, 1), (64, 4, 16), (100, 50, 50), (96, 32, 96)]
    for scores in ("normal", "ties", "infinite", "denormal")
    for padding in ("none", "ragged", "all")
]

BUDGET_CASES = [
    *SELECT_CASES,
    *(
        SelectCase(40, 40, 3, scores, padding, threshold=threshold, budget=budget, state=state)
        for scores, padding in [("normal", "none"), ("ties", "ragged"), ("infinite", "all"), ("denormal", "left")]
        for threshold, budget, state in [
            (-math.inf, (1, 2, 0), (0, 0)),
            (math.inf, (1, 1, 0), (0, 0)),
            (math.nan, (1, 1, 4), (0, 0)),
            (0.0, (0, 1, 5), (0, 0)),  # a margin and nothing else
            (0.0, (0, 1, 0), (7, 3)),  # nothing at all
            (-0.5, (1, 8, 1), (100, 12)),
            (-0.5, (1, 4, 0), (10, 30)),  # more taken before than the budget grants: nothing until it catches up
            (0.5, (3, 7, 2), (13, 4)),
            (-math.inf, (900_000_001, 1_800_000_003, 1), (2_000_000, 1_000_000)),  # products beyond 32 bits
            (-math.inf, (1, 1, -3), (0, 0)),
        ]
    ),
]

MOVE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)


@dataclass(frozen=True)
class MoveCase:
    """One gather and one scatter: data ``[B, T, *tail]``, K slots, of which row b takes ``slots - b``, at least 0."""

    tokens: int
    slots: int
    batch: int
    tail: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """Return a name for pytest."""
        tail = "x".join(map(str, self.tail)) or "flat"
        return f"T{self.tokens}-K{self.slots}-B{self.batch}-{tail}-{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class MoveOperands:
    """The tensors of a move; rows of slots that are not taken are NaN where the dtype has it."""

    base: Tensor
    index: Tensor
    taken: Tensor
    rows: Tensor


def move_operands(case: MoveCase, *, seed: int = 0) -> MoveOperands:
    """Draw the tensors of a case."""
    generator = torch.Generator().manual_seed(seed + case.tokens)

    def draw(count: int) -> Tensor:
        data = torch.randn(case.batch, count, *case.tail, generator=generator, dtype=torch.float64) * 8
        return data > 0 if case.dtype == torch.bool else data.to(case.dtype)

    order = torch.rand(case.batch, case.tokens, generator=generator).argsort(dim=1)[:, : case.slots]
    taken = torch.arange(case.slots) < (case.slots - torch.arange(case.batch)).clamp(min=0)[:, None]
    rows = draw(case.slots)
    if case.dtype.is_floating_point:
        rows[~taken] = math.nan
    return MoveOperands(draw(case.tokens), order, taken, rows)


def expected_moves(operands: MoveOperands) -> tuple[Tensor, Tensor]:
    """Gathered rows of the base, and the base with the taken rows scattered, as loops."""
    gathered, scattered = torch.empty_like(operands.rows), operands.base.clone()
    for row, slots in enumerate(operands.index.tolist()):
        for slot, token in enumerate(slots):
            gathered[row, slot] = operands.base[row, token]
            if operands.taken[row, slot]:
                scattered[row, token] = operands.rows[row, slot]
    return gathered, scattered


MOVE_CASES = [
    MoveCase(tokens, slots, batch, tail, dtype)
    for tokens, slots, batch in [(1, 1, 1), (7, 3, 3), (9, 9, 2), (64, 32, 3)]
    for tail, dtype in [*itertools.product([(), (5,), (77,), (2, 3)], MOVE_DTYPES), ((576,), torch.float32)]
]


@dataclass(frozen=True)
class SurpriseCase:
    """One surprise score.

    Attributes:
        tokens: T.
        width: d.
        batch: B.
        dtype: Of delta and prior.
        padding: Of ``PADDINGS``, but one run of valid tokens a row; padding holds NaN.
        window: Of the moving average.
        criteria: offset, m_cu, beta_ce, beta_cu.
        magnitude: Standard deviation of delta.
        miss: Standard deviation of delta - prior, relative to delta's.
        first: Factor on the first valid token's delta, such as a massive activation has.
    """

    tokens: int
    width: int
    batch: int = 2
    dtype: torch.dtype = torch.float32
    padding: str = "none"
    window: int = 100
    criteria: tuple[float, float, float, float] = (0.0247, 1.1, 0.554, 0.437)
    magnitude: float = 1.0
    miss: float = 0.5
    first: float = 1.0

    def __str__(self) -> str:
        """Return a name for pytest."""
        name = f"T{self.tokens}-d{self.width}-B{self.batch}-{str(self.dtype).removeprefix('torch.')}-{self.padding}"
        return f"{name}-W{self.window}-beta{self.criteria[2]:g}-m{self.magnitude:g}-first{self.first:g}"


@dataclass(frozen=True)
class SurpriseOperands:
    """The tensors of a surprise score; the criteria are fp32."""

    delta: Tensor
    prior: Tensor
    criteria: Tensor
    valid: Tensor


def surprise_operands(case: SurpriseCase, *, seed: int = 0) -> SurpriseOperands:
    """Draw the tensors of a case."""
    generator = torch.Generator().manual_seed(seed + case.tokens)
    shape = (case.batch, case.tokens, case.width)
    valid = draw_valid(case.padding, case.batch, case.tokens, generator)
    # Tokens differ in how much they are changed, as those of real text do.
    sizes = torch.rand(*shape[:2], 1, generator=generator, dtype=torch.float64) * case.magnitude
    sizes[torch.arange(case.batch), valid.byte().argmax(1)] *= case.first
    delta = torch.randn(shape, generator=generator, dtype=torch.float64) * sizes
    prior = delta + torch.randn(shape, generator=generator, dtype=torch.float64) * sizes * case.miss
    delta[~valid], prior[~valid] = math.nan, math.nan
    return SurpriseOperands(delta.to(case.dtype), prior.to(case.dtype), torch.tensor(case.criteria), valid)


def expected_surprise(case: SurpriseCase, operands: SurpriseOperands) -> Tensor:
    """The rank in fp64, from the rounded operands, by the torch reference (tested against ``surprise_by_loop``)."""
    rank: Tensor = surprise_score(
        operands.delta.double(), operands.prior.double(), operands.criteria.double(), operands.valid, case.window
    )
    return rank


def surprise_by_loop(case: SurpriseCase, operands: SurpriseOperands) -> Tensor:
    """The rank in fp64, one token and one number at a time."""
    offset, m_cu, beta_ce, beta_cu = operands.criteria.tolist()
    rank = torch.zeros(operands.valid.shape, dtype=torch.float64)
    for row, valids in enumerate(operands.valid.tolist()):
        static: list[float] = []
        for t in (t for t, is_valid in enumerate(valids) if is_valid):
            delta, prior = operands.delta[row, t].tolist(), operands.prior[row, t].tolist()
            static.append(sum(x * x for x in delta) / case.width)
            change = sum((x - y) ** 2 for x, y in zip(delta, prior, strict=True)) / case.width
            last = static[-case.window :]
            average = (sum(last) + (case.window - len(last)) * static[0]) / case.window
            a, b = beta_ce * (static[-1] - (change - offset)), beta_cu * (static[-1] - m_cu * average)
            rank[row, t] = sum(max(z, 0.0) + math.log1p(math.exp(-abs(z))) for z in (a, b))
    return rank


_SHARP = (0.0247, 1.1, 100.0, 100.0)

SURPRISE_CASES = [
    *(
        SurpriseCase(tokens, width, batch, padding=padding)
        for (tokens, width, batch), padding in itertools.product(
            [(1, 64, 1), (7, 77, 3), (129, 64, 2), (250, 576, 2)], ("none", "left", "right", "ragged", "all")
        )
    ),
    *(SurpriseCase(64, 64, dtype=dtype, padding="ragged") for dtype in (torch.float16, torch.bfloat16, torch.float64)),
    *(SurpriseCase(64, 64, 3, padding="left", window=window) for window in (1, 2, 64, 65, 300)),
    *(SurpriseCase(130, 64, criteria=_SHARP, magnitude=m, miss=miss) for m in (0.3, 1.0) for miss in (0.0, 0.9, 2.0)),
    SurpriseCase(130, 64, first=32.0),
    SurpriseCase(130, 64, criteria=_SHARP, first=32.0, padding="left"),
    *(SurpriseCase(64, 576, magnitude=m) for m in (1e-6, 1e4)),
]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Assert that results are equal bit for bit, dtypes included."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
