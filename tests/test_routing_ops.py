"""The routing operators' torch side: against loops, chunk by chunk, gradients, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from depthwire.ops import (
    canonical_score,
    gather_tokens,
    scatter_tokens,
    select_tokens,
    select_tokens_budget,
    surprise_score,
)
from depthwire.runtime.tolerances import tolerance
from tests.routing_cases import (
    BUDGET_CASES,
    FLT_MAX,
    MOVE_CASES,
    PADDINGS,
    SCORES,
    SELECT_CASES,
    SURPRISE_CASES,
    WINDOW_CASES,
    MoveCase,
    SelectCase,
    SelectOperands,
    SurpriseCase,
    assert_same,
    canonical,
    expected_budget,
    expected_moves,
    expected_surprise,
    expected_top_k,
    move_operands,
    select_operands,
    surprise_by_loop,
    surprise_operands,
)


def budget(t: SelectOperands) -> tuple[Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = select_tokens_budget(t.score, t.valid, t.threshold, t.budget, t.state, t.slots)
    return out


@pytest.mark.parametrize("case", [*SELECT_CASES, *WINDOW_CASES], ids=str)
def test_top_k(case: SelectCase) -> None:
    t = select_operands(case)
    actual = select_tokens(t.score, t.valid, t.slots, case.window)
    assert_same(actual, expected_top_k(t.score, t.valid, case.slots, case.window))
    # fp64 scores of the same values are the same selection.
    assert_same(select_tokens(t.score.double(), t.valid, t.slots, case.window), actual)


@pytest.mark.parametrize("case", BUDGET_CASES, ids=str)
def test_running_budget(case: SelectCase) -> None:
    t = select_operands(case)
    assert_same(budget(t), expected_budget(t))
    wide = dataclasses.replace(t, score=t.score.double(), threshold=t.threshold.double()[None])
    assert_same(budget(wide), expected_budget(t))


def test_random_cases_follow_the_rules() -> None:
    generator = torch.Generator().manual_seed(1)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for seed in range(2500):
        tokens = pick(1, 40)
        case = SelectCase(
            tokens,
            pick(1, tokens),
            pick(1, 3),
            SCORES[seed % len(SCORES)],
            PADDINGS[pick(0, len(PADDINGS) - 1)],
            threshold=(-math.inf, -0.5, 0.0, 0.5)[pick(0, 3)],
            budget=(pick(0, 5), pick(1, 6), pick(-1, 4)),
            state=(pick(0, 30), pick(0, 12)),
        )
        t = select_operands(case, seed=seed)
        assert_same(budget(t), expected_budget(t))
        assert_same(select_tokens(t.score, t.valid, t.slots), expected_top_k(t.score, t.valid, case.slots))


@pytest.mark.parametrize("kind", SCORES)
def test_canonical_scores_are_the_loops(kind: str) -> None:
    score = select_operands(SelectCase(200, 1, scores=kind)).score
    flat = canonical_score(score)
    assert flat.flatten().tolist() == [canonical(x) for x in score.flatten().tolist()]
    assert not (torch.signbit(flat) & (flat == 0)).any()


@pytest.mark.parametrize("chunk", [64, 100, 512])
@pytest.mark.parametrize("padding", ["none", "left", "ragged"])
def test_chunks_with_a_carried_state_are_the_whole(chunk: int, padding: str) -> None:
    case = SelectCase(1024, 1024, 3, padding=padding, threshold=-0.3, budget=(2, 5, 1))
    t = select_operands(case)
    index, taken, state = budget(t)
    whole = [row[flags].tolist() for row, flags in zip(index, taken, strict=True)]
    parts: list[list[int]] = [[], [], []]
    carried = t.state
    for start in range(0, case.tokens, chunk):
        score, valid = t.score[:, start : start + chunk], t.valid[:, start : start + chunk]
        piece = dataclasses.replace(t, score=score, valid=valid, slots=t.slots[: score.shape[1]], state=carried)
        index, taken, carried = budget(piece)
        for row, part in enumerate(parts):
            part.extend((index[row][taken[row]] + start).tolist())
    assert parts == whole
    assert torch.equal(carried, state)
    assert all(0 < len(row) <= 1024 * 2 // 5 + 1 for row in whole)


def test_the_budget_does_not_depend_on_bucket_or_padding_side() -> None:
    score = torch.randn(1, 300, generator=torch.Generator().manual_seed(2))
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    sets = []
    for bucket in (300, 512, 1024):
        for left in (False, True):
            start = bucket - 300 if left else 0
            padded, valid = torch.full((1, bucket), math.nan), torch.zeros(1, bucket, dtype=torch.bool)
            padded[:, start : start + 300], valid[:, start : start + 300] = score, True
            slots = torch.arange(bucket // 2)
            index, taken, state = select_tokens_budget(
                padded, valid, torch.tensor(-0.2), torch.tensor([1, 2, 0]), zeros, slots
            )
            sets.append((index[taken] - start).tolist())
            assert state.tolist() == [[300, len(sets[-1])]]
    assert all(other == sets[0] for other in sets)


@pytest.mark.parametrize("case", MOVE_CASES, ids=str)
def test_moves(case: MoveCase) -> None:
    t = move_operands(case)
    actual = gather_tokens(t.base, t.index), scatter_tokens(t.base, t.index, t.taken, t.rows)
    assert_same(actual, expected_moves(t))


@pytest.mark.parametrize("case", SURPRISE_CASES, ids=str)
def test_surprise(case: SurpriseCase) -> None:
    t = surprise_operands(case)
    exact = expected_surprise(case, t)
    torch.testing.assert_close(exact, surprise_by_loop(case, t), rtol=1e-12, atol=1e-12)
    rank = surprise_score(t.delta, t.prior, t.criteria, t.valid, case.window)
    assert rank.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    allowed = tolerance("float32", "layer").allowed(float(exact.max()))
    assert float((rank.double() - exact).abs().max()) <= allowed
    assert not rank[~t.valid].any()


def test_the_rank_is_the_gate_without_its_saturation() -> None:
    case = SurpriseCase(512, 64, batch=1, criteria=(0.0247, 1.1, 100.0, 100.0))
    t = surprise_operands(case)
    offset, m_cu, beta_ce, beta_cu = t.criteria.double().tolist()
    exact = surprise_score(t.delta.double(), t.prior.double(), t.criteria.double(), t.valid, 100)
    static, change = t.delta.double().square().mean(-1), (t.delta - t.prior).double().square().mean(-1)
    padded = torch.cat([static[:, :1].expand(1, 99), static], dim=1)
    a = torch.sigmoid(beta_ce * (static - (change - offset)))
    b = torch.sigmoid(beta_cu * (static - m_cu * padded.unfold(1, 100, 1).mean(-1)))
    torch.testing.assert_close(-torch.expm1(-exact), a + b - a * b, rtol=1e-9, atol=1e-12)
    rank = surprise_score(t.delta, t.prior, t.criteria, t.valid, 100)
    assert len(set(rank.flatten().tolist())) > 500
    assert len(set((-torch.expm1(-rank)).flatten().tolist())) < 400


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_gradients_of_the_moves() -> None:
    base, rows = leaves((2, 5, 3), (2, 3, 3))
    index, taken = torch.tensor([[4, 0, 2], [1, 3, 0]]), torch.tensor([[True, True, False], [True, False, False]])

    def scatter(*t: Tensor) -> Any:
        return scatter_tokens(t[0], index, taken, t[1])

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: gather_tokens(x, index), (base,))
        assert check(scatter, (base, rows))
    with torch.no_grad():
        rows[~taken] = math.nan
    scatter(base, rows).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, taken[..., None].expand(2, 3, 3).double())


def test_gradients_of_the_surprise() -> None:
    delta, prior = leaves((2, 5, 3), (2, 5, 3))
    valid = torch.tensor([[False, True, True, True, True], [True, True, True, False, False]])
    still = torch.tensor([0.1, 0.0, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: surprise_score(*t, valid, 3), (delta, prior, still))
    # The moving average is a constant to delta, so there a difference quotient is something else: against the formula.
    moving = torch.tensor([0.1, 1.3, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: surprise_score(delta.detach(), *t, valid, 3), (prior, moving))
    (got,) = torch.autograd.grad(surprise_score(delta, prior, moving, valid, 3).sum(), delta)
    static, change = delta.square().mean(-1), (delta - prior).square().mean(-1)
    first = static.detach().gather(1, torch.tensor([[1], [0]]))
    padded = torch.cat([first.expand(2, 2), torch.where(valid, static.detach(), first)], dim=1)
    offset, m_cu, beta_ce, beta_cu = moving.detach()
    unexpected = static - m_cu * padded.unfold(1, 3, 1).mean(-1)
    rank = torch.nn.functional.softplus(beta_ce * (static - change + offset)).add(
        torch.nn.functional.softplus(beta_cu * unexpected)
    )
    (want,) = torch.autograd.grad(rank[valid].sum(), delta)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_a_selection_has_no_gradient() -> None:
    score = torch.randn(2, 6, requires_grad=True)
    index, taken = select_tokens(score, torch.ones(2, 6, dtype=torch.bool), torch.arange(3))
    assert not index.requires_grad
    assert not taken.requires_grad


def test_autocast_moves_what_it_is_given() -> None:
    x = torch.randn(1, 4, 2).bfloat16()
    index, taken = torch.tensor([[2, 0]]), torch.tensor([[True, False]])
    with torch.autocast("cpu", torch.bfloat16):
        assert gather_tokens(x, index).dtype == torch.bfloat16
        assert scatter_tokens(x.float(), index, taken, x[:, :2]).dtype == torch.float32
        assert surprise_score(x, x, torch.ones(4), torch.ones(1, 4, dtype=torch.bool)).dtype == torch.float32


def test_torchs_rules_hold_for_every_operator() -> None:
    ops = torch.ops.depthwire
    t = select_operands(SelectCase(8, 4))
    index, taken = select_tokens(t.score, t.valid, t.slots)
    x, rows = leaves((2, 8, 3), (2, 4, 3))
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.select_tokens, (t.score.requires_grad_(), t.valid, t.slots, 4)),
        (ops.select_tokens_budget, (t.score, t.valid, t.threshold, t.budget, t.state, t.slots)),
        (ops.gather_tokens, (x, index)),
        (ops.gather_tokens, (torch.arange(16).reshape(2, 8), index)),
        (ops.scatter_tokens, (x, index, taken, rows)),
        (ops.surprise_score, (x, x.detach() * 2, torch.ones(4, dtype=torch.float64), t.valid, 5)),
    ]
    for op, args in calls:
        assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}, op


def test_the_number_of_slots_may_be_an_inputs_length() -> None:
    class Route(torch.nn.Module):
        def forward(self, x: Tensor, slots: Tensor) -> Any:
            index, taken = select_tokens(x.mean(-1), torch.ones_like(x[..., 0], dtype=torch.bool), slots)
            return scatter_tokens(x, index, taken, gather_tokens(x, index) * 2)

    slots = torch.export.Dim("slots", min=1, max=8)
    x = torch.randn(2, 8, 3)
    program = torch.export.export(Route(), (x, torch.arange(4)), dynamic_shapes=({}, {0: slots})).module()
    for count in (1, 3, 8):
        out = program(x, torch.arange(count))
        assert int((out != x).any(-1).sum()) == 2 * count


BITS = torch.ones(2, 8, dtype=torch.bool)
FOUR = torch.arange(4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: select_tokens(s[0], BITS, FOUR), r"score must be \[B, T\]"),
        (lambda s: select_tokens(s.half(), BITS, FOUR), "score must be torch.float32 or torch.float64"),
        (lambda s: select_tokens(s, BITS[:, :7], FOUR), r"valid must be torch.bool\[2, 8\]"),
        (lambda s: select_tokens(s, BITS.long(), FOUR), r"valid must be torch.bool\[2, 8\], not torch.int64"),
        (lambda s: select_tokens(s, BITS, torch.arange(9)), "9 slots are more than the 8 tokens"),
        (lambda s: select_tokens(s, BITS, torch.arange(0)), "at least one slot"),
        (lambda s: select_tokens(s, BITS, FOUR.int()), r"slots must be torch.int64\[K\]"),
        (lambda s: select_tokens(s, BITS, FOUR, 3), "windows of 3 tokens do not divide 8 tokens"),
        (lambda s: select_tokens(s, BITS, torch.arange(3), 4), "3 slots cannot be shared evenly by 2 windows"),
        (lambda s: select_tokens(s, BITS, FOUR, -8), "window must be 0"),
        (lambda s: _budget(s, threshold=torch.zeros(2)), r"threshold must be torch.float32\[\]"),
        (lambda s: _budget(s, threshold=torch.zeros((), dtype=torch.float64)), "threshold must be torch.float32"),
        (lambda s: _budget(s, budget=torch.ones(2, dtype=torch.int64)), r"budget must be torch.int64\[3\]"),
        (lambda s: _budget(s, state=torch.zeros(2, dtype=torch.int64)), r"state must be torch.int64\[2, 2\]"),
        (lambda s: gather_tokens(s[0], FOUR[None]), r"x must be \[B, T, ...\]"),
        (lambda s: gather_tokens(s, FOUR[None]), r"index must be torch.int64\[2, K\]"),
        (lambda s: gather_tokens(s, FOUR[None].expand(2, 4).int()), "not torch.int32"),
        (lambda s: scatter_tokens(s, FOUR.expand(2, 4), BITS, s[:, :4]), r"taken must be torch.bool\[2, 4\]"),
        (lambda s: scatter_tokens(s, FOUR.expand(2, 4), BITS[:, :4], s[:, :3]), "rows is"),
        (lambda s: scatter_tokens(s, FOUR.expand(2, 4), BITS[:, :4], s[:, :4].half()), "rows is torch.float16"),
        (lambda s: scatter_tokens(s, torch.zeros(2, 9).long(), BITS, s), "9 slots cannot hold distinct tokens of 8"),
        (lambda s: surprise_score(s, s, FOUR.float(), BITS), "delta must be floating point"),
        (lambda s: surprise_score(s[..., None], s[..., None].half(), FOUR.float(), BITS), "prior is torch.float16"),
        (lambda s: surprise_score(s[..., None], s[..., None], torch.ones(3), BITS), r"criteria must be \[4\]"),
        (lambda s: surprise_score(s[..., None], s[..., None], torch.ones(4), BITS, 0), "at least 1 token"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(torch.randn(2, 8))


def _budget(score: Tensor, **changed: Tensor) -> Any:
    operands = {
        "threshold": torch.tensor(0.0),
        "budget": torch.tensor([1, 2, 1]),
        "state": torch.zeros(2, 2, dtype=torch.int64),
        **changed,
    }
    return select_tokens_budget(score, BITS, slots=FOUR, **operands)


def test_the_loops_tell_rules_apart() -> None:
    # Teeth: ties to the higher index, padding by score, and a cap that is off by one are all seen by the table.
    t = select_operands(SelectCase(64, 32, 3, "ties", "ragged"))
    right = expected_top_k(t.score, t.valid, 32)
    flipped, _ = expected_top_k(t.score.flip(1), t.valid.flip(1), 32)
    assert not torch.equal(right[0], (63 - flipped).sort(dim=1).values)
    unmasked = expected_top_k(torch.where(t.valid, t.score, -FLT_MAX), torch.ones_like(t.valid), 32)
    assert not torch.equal(right[1], unmasked[1])
    assert not torch.equal(expected_budget(t)[2], expected_budget(dataclasses.replace(t, budget=t.budget + 1))[2])
