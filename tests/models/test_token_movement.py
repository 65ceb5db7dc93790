"""Selecting and moving tokens as models spell it against the operators that a compiler puts in their place."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from depthwire.models._stream import count_taken, selected_bits
from depthwire.models._token_movement import Selection, select_top, select_within_budget
from depthwire.ops import gather_tokens, scatter_tokens, select_tokens, select_tokens_budget
from tests.models.routed import SPELLINGS, padding, within_budget

if TYPE_CHECKING:
    from depthwire.models.routing_config import Spelling

TOKENS = 24
spelled = pytest.mark.parametrize("spelling", SPELLINGS)


def scores(seed: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, TOKENS, generator=torch.Generator().manual_seed(seed))


def bits_of(index: Tensor, taken: Tensor) -> Tensor:
    return selected_bits(Selection(index, taken), TOKENS)


@spelled
@pytest.mark.parametrize("slots", [1, 9, TOKENS])
@pytest.mark.parametrize("padded", [False, True])
def test_top_k_selects_what_the_operator_selects(spelling: Spelling, slots: int, padded: bool) -> None:
    for seed in range(8):
        score, valid = scores(seed), padding(TOKENS).bool() if padded else None
        selection = select_top(score, valid, slots, spelling)
        everything = torch.ones(3, TOKENS, dtype=torch.bool)
        index, taken = select_tokens(score, everything if valid is None else valid, torch.arange(slots))
        assert torch.equal(selected_bits(selection, TOKENS), bits_of(index, taken))
        assert torch.equal(count_taken(selection), taken.sum(1))


@spelled
@pytest.mark.parametrize("padded", [False, True])
def test_the_budget_selects_what_the_operator_selects_slot_by_slot(spelling: Spelling, padded: bool) -> None:
    for seed in range(8):
        score, valid = scores(seed), padding(TOKENS).bool() if padded else None
        threshold, slots = torch.tensor(0.3 * seed - 1), 14
        rule = {"capacity": Fraction(1, 2), "margin": 2, "slots": slots, "spelling": spelling}
        everything = torch.ones(3, TOKENS, dtype=torch.bool) if valid is None else valid
        seen, before = torch.tensor([0, 10, 31]), torch.tensor([0, 7, 3])
        for carried in (None, (seen, before)):
            state = torch.zeros(3, 2, dtype=torch.int64) if carried is None else torch.stack(carried, 1)
            if carried is not None:
                rule["slots"] = slots = TOKENS  # a chunk may take up what is left of the budget
            selection = select_within_budget(score, valid, threshold, carried=carried, **rule)  # type: ignore[arg-type]
            index, taken, after = select_tokens_budget(
                score, everything, threshold, torch.tensor([1, 2, 2]), state, torch.arange(slots)
            )
            assert selection.taken is not None
            assert torch.equal(selection.taken, taken)
            assert torch.equal(selection.positions()[taken], index[taken])
            if spelling != "onehot":  # whose untaken slots hold no token at all
                assert torch.equal(selection.index, index)
            assert torch.equal(count_taken(selection), after[:, 1] - state[:, 1])


def test_the_budget_is_the_sequential_rule() -> None:
    for seed in range(50):
        score = scores(seed, 1)
        capacity, margin, threshold = (0.125, 0.5, 0.75)[seed % 3], seed % 4, -1 + 0.04 * seed
        selection = select_within_budget(
            score,
            None,
            torch.tensor(threshold),
            capacity=Fraction(capacity),
            margin=margin,
            slots=TOKENS,
            spelling="gather",
        )
        assert selection.taken is not None
        assert selection.index[selection.taken].tolist() == within_budget(score[0], threshold, capacity, margin)


@spelled
def test_equal_scores_give_exactly_k_tokens(spelling: Spelling) -> None:
    for slots in (1, 7, TOKENS):
        selection = select_top(torch.zeros(2, TOKENS), None, slots, spelling)
        assert selected_bits(selection, TOKENS).sum(1).tolist() == [slots, slots]
        assert all(row == sorted(set(row)) for row in selection.positions().tolist())


@spelled
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_move_as_the_operators_move_them(spelling: Spelling, padded: bool) -> None:
    x = torch.randn(3, TOKENS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = padding(TOKENS).bool() if padded else None
    selection = select_top(scores(1), mask, 20, spelling)
    index, taken = select_tokens(
        scores(1), torch.ones(3, TOKENS, dtype=torch.bool) if mask is None else mask, torch.arange(20)
    )
    rows = selection.gather(x)
    want = gather_tokens(x, index)
    kept = torch.ones_like(taken) if selection.taken is None else selection.taken
    # A product with ones and zeros is exact.
    assert torch.equal(rows[kept], want[taken])
    assert torch.equal(selection.table(x[0])[kept], x[0][selection.positions()][kept])
    moved = selection.scatter(x, rows, rows * 3)
    torch.testing.assert_close(moved, scatter_tokens(x, index, taken, want * 3), rtol=1e-15, atol=1e-15)
