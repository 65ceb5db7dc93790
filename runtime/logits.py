"""What a language model's user notices: the most likely token, and the likelihood of real text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from depthwire.errors import UsageError
from depthwire.runtime._statistics import CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from depthwire.runtime.tolerances import Tolerance

_LISTED = 32
"""Flips that are listed one by one, those with the largest gap first; the count and the largest gap cover all."""


@dataclass(frozen=True)
class Flip:
    """A position at which the most likely token differs.

    Attributes:
        position: Index into the leading dimensions of the logits, such as (batch, position).
        expected: The reference's token.
        actual: The other's token.
        gap: Reference logit of ``expected`` minus reference logit of ``actual``; not negative.
    """

    position: tuple[int, ...]
    expected: int
    actual: int
    gap: float


@dataclass(frozen=True)
class Top1:
    """Agreement of the most likely token at every position.

    A flip is forgiven only as a near-tie: where the reference itself holds the two tokens closer together than the
    logits may differ.

    Attributes:
        positions: Positions compared.
        flips: Positions that disagree.
        beyond: Flips whose gap reaches ``allowed``: not near-ties.
        largest_gap: Largest gap of a flip, 0 where there is none.
        allowed: The logits' absolute budget; a flip passes below it.
        listed: The flips with the largest gaps.
    """

    positions: int
    flips: int
    beyond: int
    largest_gap: float
    allowed: float
    listed: tuple[Flip, ...]

    def __bool__(self) -> bool:
        return self.positions > 0 and self.beyond == 0

    def as_dict(self) -> dict[str, Any]:
        """Return everything needed to judge the flips again, JSON-ready."""
        listed = [{**asdict(flip), "position": list(flip.position)} for flip in self.listed]
        return {**asdict(self), "passed": bool(self), "listed": listed}


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Mean next-token negative log-likelihood of a window's own tokens, in nats.

    Attributes:
        tokens: Tokens that were predicted.
        expected: The reference's mean.
        actual: The other's mean.
        tolerance: Budget on the difference of the two.
    """

    tokens: int
    expected: float
    actual: float
    tolerance: Tolerance

    @property
    def difference(self) -> float:
        """``actual - expected``."""
        return self.actual - self.expected

    def __bool__(self) -> bool:
        return self.tokens > 0 and abs(self.difference) <= self.tolerance.atol

    def as_dict(self) -> dict[str, Any]:
        """Return everything needed to judge the likelihood again, JSON-ready."""
        return {
            "passed": bool(self),
            "tokens": self.tokens,
            "expected": self.expected,
            "actual": self.actual,
            "difference": self.difference,
            "atol": self.tolerance.atol,
        }


def top1(expected: NDArray[Any], actual: NDArray[Any], *, allowed: float) -> Top1:
    """Compare the arg max over the last axis at every position (ties go to the lower index).

    Args:
        expected: Reference logits, [..., vocabulary], finite.
        actual: Logits of the same shape.
        allowed: A flip passes if the reference's gap is smaller than this.
    """
    flips: list[Flip] = []
    count, beyond, largest = 0, 0, 0.0
    rows_e, rows_a = _rows(expected), _rows(actual)
    for start, stop in _row_chunks(rows_e):
        e, a = rows_e[start:stop].astype(np.float64), rows_a[start:stop].astype(np.float64)
        best_e, best_a = e.argmax(axis=1), a.argmax(axis=1)
        changed = np.flatnonzero(best_e != best_a)
        gaps = e[changed, best_e[changed]] - e[changed, best_a[changed]]
        count += changed.size
        beyond += int((gaps >= allowed).sum())
        largest = max(largest, float(gaps.max(initial=0.0)))
        for row, gap in zip(changed.tolist(), gaps.tolist(), strict=True):
            position = tuple(int(i) for i in np.unravel_index(start + row, expected.shape[:-1]))
            flips.append(Flip(position, int(best_e[row]), int(best_a[row]), gap))
        flips = sorted(flips, key=lambda flip: -flip.gap)[:_LISTED]
    return Top1(rows_e.shape[0], count, beyond, largest, allowed, tuple(flips))


def token_nll(logits: NDArray[Any], tokens: NDArray[Any], mask: NDArray[Any] | None = None) -> tuple[float, int]:
    """Return the mean next-token negative log-likelihood and the number of tokens that were predicted.

    Args:
        logits: [batch, length, vocabulary], finite; position t predicts token t + 1. Log-softmax is taken in fp64.
        tokens: [batch, length] integers.
        mask: [batch, length]; a token whose mask is 0 is padding, and not counted.

    Raises:
        UsageError: Shapes do not fit, no token can be predicted, or a token is outside the vocabulary
            (``verify.tokens``).
    """
    if logits.ndim != 3 or tokens.shape != logits.shape[:2] or (mask is not None and mask.shape != tokens.shape):
        raise _token_error(f"logits {list(logits.shape)}, tokens {list(tokens.shape)}")
    # Position t is scored on token t + 1; the last position has none. Whole rows, so that no logit is copied.
    targets = np.roll(tokens, -1, axis=1).reshape(-1)
    counted = np.ones(tokens.shape, bool) if mask is None else np.roll(mask, -1, axis=1) != 0
    counted[:, -1] = False
    counted = counted.reshape(-1)
    vocabulary = logits.shape[2]
    if not counted.any() or targets[counted].min() < 0 or targets[counted].max() >= vocabulary:
        raise _token_error(f"{int(counted.sum())} tokens to predict, vocabulary {vocabulary}")
    rows = _rows(logits)
    total = 0.0
    for start, stop in _row_chunks(rows):
        use = np.flatnonzero(counted[start:stop])
        chunk = rows[start:stop][use].astype(np.float64)
        peak = chunk.max(axis=1, initial=-np.inf)
        normaliser = peak + np.log(np.exp(chunk - peak[:, None]).sum(axis=1))
        total += float((normaliser - chunk[np.arange(use.size), targets[start:stop][use]]).sum())
    return total / int(counted.sum()), int(counted.sum())


def _rows(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(-1, array.shape[-1])


def _row_chunks(rows: NDArray[Any]) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield start, min(start + step, rows.shape[0])


def _token_error(got: str) -> UsageError:
    return UsageError(
        "verify.tokens",
        "The window's tokens cannot be scored with these logits",
        at="input_ids",
        want="logits [batch, length, vocabulary], tokens [batch, length] inside the vocabulary, length 2 or more",
        got=got,
        todo="Give windows of at least two tokens that were made with the model's own tokenizer.",
    )
