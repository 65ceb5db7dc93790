"""The one comparison: structure first, then values, in fp64, by the one table of tolerances.

Count, names, dtype, shape, emptiness, NaN and Inf are judged before any value is: a comparator that subtracts first
accepts NaN (every comparison with NaN is false), broadcasts (3, 1) against (1, 3), wraps uint8 around, and takes an
empty array for a perfect match. What cannot be compared fails; nothing is skipped.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from depthwire.runtime._statistics import Statistics, extent, statistics
from depthwire.runtime.tolerances import EXACT_DTYPES, FLOAT_DTYPES, Kind, Tolerance, tolerance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TensorResult:
    """How one tensor compares.

    Attributes:
        name: Name of the tensor.
        kind: Row of the table it was judged by.
        dtype: The reference's dtype (``?`` where there is none).
        shape: The reference's shape.
        problem: Why the values were not compared, or ``None``.
        stats: The numbers, where the values were compared.
        tolerance: The budget, where there is one.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    problem: str | None = None
    stats: Statistics | None = None
    tolerance: Tolerance | None = None

    @property
    def allowed(self) -> float | None:
        """Largest absolute difference that passes."""
        if self.stats is None or self.tolerance is None:
            return None
        return self.tolerance.allowed(self.stats.max_expected)

    @property
    def required_rtol(self) -> float | None:
        """Smallest ``rtol`` with which the tensor would pass; ``None`` where no ``rtol`` would do."""
        if self.stats is None or self.tolerance is None:
            return None
        if self.dtype in EXACT_DTYPES:
            return None if self.stats.unequal else 0.0
        excess = max(self.stats.max_abs - self.tolerance.atol, 0.0)
        if excess == 0.0:
            return 0.0
        return excess / self.stats.max_expected if self.stats.max_expected else None

    def judge(self, budget: Tolerance) -> TensorResult:
        """Return the same numbers judged by another budget."""
        return dataclasses.replace(self, tolerance=budget)

    def __bool__(self) -> bool:
        if self.problem is not None or self.stats is None or self.allowed is None:
            return False
        if self.dtype in EXACT_DTYPES:
            return self.stats.unequal == 0
        return self.stats.max_abs <= self.allowed  # false for NaN, as it must be

    def as_dict(self) -> dict[str, Any]:
        """Return everything needed to judge the tensor again, JSON-ready."""
        numbers: dict[str, Any] = {}
        if self.stats is not None:
            numbers = {**dataclasses.asdict(self.stats), "max_rel": self.stats.max_rel}
            numbers["worst_index"] = list(self.stats.worst_index)
        if self.tolerance is not None:
            numbers |= {"rtol": self.tolerance.rtol, "atol": self.tolerance.atol}
        return {
            "name": self.name,
            "passed": bool(self),
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "problem": self.problem,
            "allowed": self.allowed,
            "required_rtol": self.required_rtol,
            **numbers,
        }


@dataclass(frozen=True)
class Comparison:
    """One set of named tensors against another; true only if there is a tensor and every tensor passes."""

    tensors: tuple[TensorResult, ...]

    def __bool__(self) -> bool:
        return bool(self.tensors) and all(self.tensors)

    def __getitem__(self, name: str) -> TensorResult:
        return {result.name: result for result in self.tensors}[name]


@dataclass(frozen=True)
class RunComparison:
    """Several iterations of one runner against another; true only if the numbers of iterations agree and all pass."""

    problem: str | None
    iterations: tuple[Comparison, ...]

    def __bool__(self) -> bool:
        return self.problem is None and bool(self.iterations) and all(self.iterations)


def compare(
    expected: Arrays,
    actual: Arrays,
    *,
    kinds: Mapping[str, Kind] | None = None,
    default: Kind = "hidden",
    rounded: str | None = None,
) -> Comparison:
    """Compare two sets of named arrays.

    Args:
        expected: The reference; its dtypes and magnitudes determine the budgets.
        actual: What is judged.
        kinds: Row of the table for each name; integer and boolean tensors are exact whatever it says.
        default: Row for the names that ``kinds`` lacks.
        rounded: The dtype that float32 values were rounded to inside the graph, whose budgets are granted to them.

    Returns:
        One result for every name of either side. A name that one side lacks fails.

    Raises:
        UsageError: The table has no row for a dtype and kind.
    """
    names = [*expected, *(name for name in actual if name not in expected)]
    rows = kinds or {}
    return Comparison(
        tuple(
            _compare_tensor(name, rows.get(name, default), expected.get(name), actual.get(name), rounded)
            for name in names
        )
    )


def compare_runs(
    expected: Sequence[Arrays],
    actual: Sequence[Arrays],
    *,
    kinds: Mapping[str, Kind] | None = None,
    default: Kind = "hidden",
    rounded: str | None = None,
) -> RunComparison:
    """Compare iteration by iteration; see ``compare``. Different numbers of iterations, or none, fail."""
    problem = None
    if len(expected) != len(actual):
        problem = f"{len(expected)} iterations were expected, {len(actual)} were run"
    elif not expected:
        problem = "no iteration was run"
    pairs = zip(expected, actual, strict=False)  # the lengths are judged above; what exists on both sides is still told
    return RunComparison(problem, tuple(compare(e, a, kinds=kinds, default=default, rounded=rounded) for e, a in pairs))


def _compare_tensor(name: str, kind: Kind, expected: object, actual: object, rounded: str | None) -> TensorResult:
    if expected is None or actual is None:
        side = "expected and missing" if actual is None else "not expected"
        known = expected if expected is not None else actual
        return _failed(name, kind, known, side)
    if not isinstance(expected, np.ndarray) or not isinstance(actual, np.ndarray):
        return _failed(name, kind, None, f"not arrays: {type(expected).__name__} and {type(actual).__name__}")
    problem = _structure(expected, actual)
    if problem is not None:
        return _failed(name, kind, expected, problem)
    extents = (extent(expected), extent(actual))
    if any(e.nan or e.inf for e in extents):
        (e, a) = extents
        text = f"not finite: expected has {e.nan} NaN and {e.inf} Inf, actual has {a.nan} NaN and {a.inf} Inf"
        return _failed(name, kind, expected, text)
    dtype = expected.dtype.name
    row: Kind = "integer" if dtype in EXACT_DTYPES else kind
    stats = statistics(expected, actual, largest=(extents[0].largest, extents[1].largest))
    if not math.isfinite(stats.max_abs):
        return _failed(name, row, expected, "the difference overflows float64")
    granted = rounded if rounded is not None and dtype == "float32" else dtype
    return TensorResult(name, row, dtype, expected.shape, None, stats, tolerance(granted, row))


def _structure(expected: NDArray[Any], actual: NDArray[Any]) -> str | None:
    if expected.dtype != actual.dtype:
        return f"dtype {expected.dtype.name} was expected, found {actual.dtype.name}"
    if expected.dtype.name not in (*FLOAT_DTYPES, *EXACT_DTYPES):
        return f"dtype {expected.dtype.name} cannot be compared"
    if expected.shape != actual.shape:
        return f"shape {list(expected.shape)} was expected, found {list(actual.shape)}"
    if expected.size == 0:
        return f"empty: shape {list(expected.shape)} has no element to compare"
    return None


def _failed(name: str, kind: Kind, known: object, problem: str) -> TensorResult:
    array = known if isinstance(known, np.ndarray) else None
    dtype, shape = (array.dtype.name, array.shape) if array is not None else ("?", ())
    return TensorResult(name, kind, dtype, shape, problem)
