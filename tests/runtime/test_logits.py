"""Top-1 and likelihood: every flip counts, and only a near-tie is forgiven."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from depthwire.errors import UsageError
from depthwire.runtime import logits as module
from depthwire.runtime.logits import NegativeLogLikelihood, token_nll, top1
from depthwire.runtime.tolerances import tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray


def rng() -> np.random.Generator:
    """The same numbers for every test, whatever the order of the tests."""
    return np.random.default_rng(11)


def logits(*rows: list[float]) -> NDArray[np.float32]:
    return np.array([rows], np.float32)


def test_agreement_passes_and_counts_positions() -> None:
    x = rng().normal(size=(2, 5, 11)).astype(np.float32)
    result = top1(x, x, allowed=1e-4)
    assert result
    assert (result.positions, result.flips, result.listed) == (10, 0, ())


def test_a_flip_with_a_gap_fails_and_is_told() -> None:
    expected, actual = logits([0, 0, 9], [1.0, 3.0, 2.5]), logits([0, 0, 9], [1.0, 2.4, 2.5])
    result = top1(expected, actual, allowed=0.1)
    assert not result
    assert (result.positions, result.flips, result.beyond, result.largest_gap) == (2, 1, 1, 0.5)
    flip = result.listed[0]
    assert (flip.position, flip.expected, flip.actual, flip.gap) == ((0, 1), 1, 2, 0.5)


def test_a_near_tie_passes_and_is_still_a_flip() -> None:
    result = top1(logits([1.0, 1.0 + 2**-20]), logits([1.0 + 2**-20, 1.0]), allowed=1e-5)
    assert result
    assert (result.flips, result.beyond) == (1, 0)
    assert result.listed[0].gap == 2**-20


def test_a_gap_as_large_as_the_budget_fails() -> None:
    assert not top1(logits([1.0, 1.5]), logits([1.5, 1.0]), allowed=0.5)


def test_one_bad_flip_among_near_ties_fails() -> None:
    expected = logits([1.0, 1.0 + 2**-20], [1.0, 5.0])
    result = top1(expected, expected[..., ::-1].copy(), allowed=1e-5)
    assert not result
    assert (result.flips, result.beyond, result.largest_gap) == (2, 1, 4.0)


def test_exact_ties_go_to_the_lower_index_on_both_sides() -> None:
    assert top1(logits([2.0, 2.0]), logits([2.0, 2.0]), allowed=0.0).flips == 0


def test_no_position_is_no_agreement() -> None:
    assert not top1(np.empty((1, 0, 3), np.float32), np.empty((1, 0, 3), np.float32), allowed=1.0)


def test_many_flips_are_all_counted_and_the_largest_gaps_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    expected = np.zeros((1, 100, 2), np.float32)
    expected[0, :, 0] = np.arange(1, 101)
    result = top1(expected, expected[..., ::-1].copy(), allowed=50.5)
    assert (result.flips, result.beyond, result.largest_gap) == (100, 50, 100.0)
    assert [flip.position[1] for flip in result.listed] == list(range(99, 67, -1))
    stored = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert (stored["largest_gap"] < stored["allowed"]) is stored["passed"] is False


@pytest.mark.parametrize("batch", [1, 3])
def test_the_likelihood_is_torchs(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    x = rng().normal(scale=5, size=(batch, 9, 17)).astype(np.float32)
    ids = rng().integers(0, 17, (batch, 9))
    value, count = token_nll(x, ids)
    flat = torch.tensor(x[:, :-1].astype(np.float64)).flatten(0, 1)
    reference = torch.nn.functional.cross_entropy(flat, torch.tensor(ids[:, 1:]).flatten())
    assert value == pytest.approx(reference.item(), rel=1e-12)
    assert count == batch * 8


def test_padding_is_not_scored() -> None:
    x = rng().normal(size=(1, 6, 7)).astype(np.float32)
    ids, mask = rng().integers(0, 7, (1, 6)), np.array([[1, 1, 1, 1, 0, 0]])
    value, count = token_nll(x, ids, mask)
    assert value == pytest.approx(token_nll(x[:, :4], ids[:, :4])[0], rel=1e-12)
    assert count == 3


def test_large_logits_do_not_overflow() -> None:
    value, _ = token_nll(logits([1e30, 0.0], [0.0, 0.0]), np.array([[0, 1]]))
    assert value == pytest.approx(1e30)


@pytest.mark.parametrize(
    ("shape", "ids"),
    [((1, 3, 5), [[0, 1]]), ((3, 5), [[0, 1, 2]]), ((1, 1, 5), [[0]]), ((1, 2, 5), [[0, 5]]), ((1, 2, 5), [[0, -1]])],
)
def test_tokens_that_cannot_be_scored_are_refused(shape: tuple[int, ...], ids: list[list[int]]) -> None:
    with pytest.raises(UsageError) as caught:
        token_nll(np.zeros(shape, np.float32), np.array(ids))
    assert caught.value.code == "verify.tokens"


@pytest.mark.parametrize(
    ("difference", "passes"), [(0.0, True), (9e-6, True), (-9e-6, True), (1.1e-5, False), (-2e-5, False)]
)
def test_the_likelihood_is_judged_by_its_difference(difference: float, passes: bool) -> None:
    result = NegativeLogLikelihood(511, 3.0, 3.0 + difference, tolerance("float32", "nll"))
    assert bool(result) is passes
    stored: dict[str, Any] = result.as_dict()
    assert (abs(stored["difference"]) <= stored["atol"]) is passes


def test_no_token_is_no_likelihood() -> None:
    assert not NegativeLogLikelihood(0, 3.0, 3.0, tolerance("float32", "nll"))
