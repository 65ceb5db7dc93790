"""Numbers about the difference of two arrays, in fp64, a chunk at a time.

A chunk keeps the temporaries small: logits of shape [1, 512, 49152] would otherwise need 200 MB for every fp64
intermediate, of which there are six.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

CHUNK = 1 << 20
"""Elements that are held in fp64 at a time."""

_QUANTILE = 0.99


@dataclass(frozen=True)
class Extent:
    """What is known before values are compared.

    Attributes:
        nan: Number of NaN.
        inf: Number of infinities of either sign.
        largest: Largest finite magnitude, 0 where there is none.
    """

    nan: int
    inf: int
    largest: float


@dataclass(frozen=True)
class Statistics:
    """Differences of two finite, non-empty arrays of one shape; all in fp64.

    Attributes:
        count: Number of elements.
        max_abs: ``max|expected - actual|``.
        mean_abs: ``mean|expected - actual|``.
        p99_abs: 0.99 quantile of ``|expected - actual|`` (linear interpolation, as ``numpy.quantile``).
        max_expected: ``max|expected|``.
        max_actual: ``max|actual|``.
        cosine: Cosine of the angle between the two as vectors; ``None`` where one of them is all zeros.
        unequal: Number of elements that are not equal.
        worst_index: Where ``max_abs`` is reached first.
    """

    count: int
    max_abs: float
    mean_abs: float
    p99_abs: float
    max_expected: float
    max_actual: float
    cosine: float | None
    unequal: int
    worst_index: tuple[int, ...]

    @property
    def max_rel(self) -> float | None:
        """``max_abs / max_expected``; ``None`` where the reference is all zeros."""
        return self.max_abs / self.max_expected if self.max_expected else None


def extent(array: NDArray[Any]) -> Extent:
    """Count what is not finite and find the largest finite magnitude."""
    nan = inf = 0
    largest = 0.0
    for chunk in _chunks(array):
        values = np.abs(chunk.astype(np.float64))
        finite = np.isfinite(values)
        if not finite.all():
            nan += int(np.isnan(values).sum())
            inf += int(np.isinf(values).sum())
            values = values[finite]
        if values.size:
            largest = max(largest, float(values.max()))
    return Extent(nan, inf, largest)


def statistics(expected: NDArray[Any], actual: NDArray[Any], *, largest: tuple[float, float]) -> Statistics:
    """Return the differences of two finite, non-empty arrays of the same shape and dtype.

    Args:
        expected: The reference.
        actual: What is judged.
        largest: ``Extent.largest`` of both; the dot products are scaled by it, so that none overflows.
    """
    scale_e, scale_a = (value or 1.0 for value in largest)
    worst, worst_at, total, unequal = -1.0, 0, 0.0, 0
    dot = norm_e = norm_a = 0.0
    tail = _Tail(expected.size)
    for start, (left, right) in _pairs(expected, actual):
        # Compared before the cast: int64 beyond 2**53 is not exact in fp64, and uint8 would wrap around if subtracted.
        unequal += int((left != right).sum())
        e, a = left.astype(np.float64), right.astype(np.float64)
        with np.errstate(over="ignore"):  # 1e308 - -1e308: the infinite maximum is judged by the caller
            difference = np.abs(e - a)
            total += float(difference.sum())
        at = int(difference.argmax())
        if difference[at] > worst:
            worst, worst_at = float(difference[at]), start + at
        tail.add(difference)
        e /= scale_e
        a /= scale_a
        dot, norm_e, norm_a = dot + float(e @ a), norm_e + float(e @ e), norm_a + float(a @ a)
    return Statistics(
        count=expected.size,
        max_abs=worst,
        mean_abs=total / expected.size,
        p99_abs=tail.quantile(),
        max_expected=largest[0],
        max_actual=largest[1],
        cosine=dot / math.sqrt(norm_e * norm_a) if norm_e and norm_a else None,
        unequal=unequal,
        worst_index=tuple(int(i) for i in np.unravel_index(worst_at, expected.shape)),
    )


class _Tail:
    """The largest hundredth of a stream of values: all that an exact 0.99 quantile needs."""

    def __init__(self, count: int) -> None:
        position = _QUANTILE * (count - 1)
        self._fraction = position - math.floor(position)
        self._keep = count - math.floor(position)
        self._values: NDArray[np.float64] = np.empty(0)

    def add(self, values: NDArray[np.float64]) -> None:
        if self._values.size == self._keep:
            values = values[values > self._values.min()]
        merged = np.concatenate([self._values, values])
        excess = merged.size - self._keep
        self._values = np.partition(merged, excess)[excess:] if excess > 0 else merged

    def quantile(self) -> float:
        lower, *rest = np.sort(self._values)[:2].tolist()
        upper = rest[0] if rest else lower
        return float(lower + (upper - lower) * self._fraction)


def _chunks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK]


def _pairs(expected: NDArray[Any], actual: NDArray[Any]) -> Iterator[tuple[int, tuple[NDArray[Any], NDArray[Any]]]]:
    for index, pair in enumerate(zip(_chunks(expected), _chunks(actual), strict=True)):
        yield index * CHUNK, pair
