"""The comparison, mostly by what it must not accept."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, cast

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthwire.errors import UsageError
from depthwire.runtime import _statistics
from depthwire.runtime.compare import TensorResult, compare, compare_runs
from depthwire.runtime.tolerances import Kind, Tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray


def rng() -> np.random.Generator:
    """The same numbers for every test, whatever the order of the tests."""
    return np.random.default_rng(7)


NAN, INF = math.nan, math.inf


def one(expected: NDArray[Any], actual: NDArray[Any], kind: Kind = "hidden") -> TensorResult:
    return compare({"y": expected}, {"y": actual}, kinds={"y": kind})["y"]


def floats(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


# What fails before a value is compared.


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("sides", ["expected", "actual", "both"])
def test_what_is_not_finite_fails_even_on_both_sides(bad: float, sides: str) -> None:
    broken, sound = floats(1, bad, 3), floats(1, 2, 3)
    result = one(broken if sides != "actual" else sound, broken if sides != "expected" else sound)
    assert not result
    assert result.problem is not None
    assert "not finite" in result.problem
    assert result.stats is None


def test_the_numbers_of_nan_and_inf_are_told_per_side() -> None:
    result = one(floats(NAN, NAN, 1, 2), floats(INF, 0, 1, -INF))
    assert result.problem == "not finite: expected has 2 NaN and 0 Inf, actual has 0 NaN and 2 Inf"


@pytest.mark.parametrize(
    ("expected", "actual"),
    [((3, 1), (1, 3)), ((3,), (3, 1)), ((1, 3), (3,)), ((2, 3), (3, 2)), ((), (1,)), ((4,), (1,))],
)
def test_shapes_that_would_broadcast_fail(expected: tuple[int, ...], actual: tuple[int, ...]) -> None:
    result = one(np.ones(expected, np.float32), np.ones(actual, np.float32))
    assert not result
    assert result.problem == f"shape {list(expected)} was expected, found {list(actual)}"


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5)])
def test_empty_arrays_fail(shape: tuple[int, ...]) -> None:
    result = one(np.ones(shape, np.float32), np.ones(shape, np.float32))
    assert not result
    assert result.problem is not None
    assert result.problem.startswith("empty")


def test_nothing_to_compare_fails() -> None:
    assert not compare({}, {})


@pytest.mark.parametrize(
    ("expected", "actual"),
    [("float32", "float64"), ("float32", "float16"), ("int64", "int32"), ("int8", "uint8"), ("bool", "uint8")],
)
def test_equal_values_of_another_dtype_fail(expected: str, actual: str) -> None:
    result = one(np.ones(3, expected), np.ones(3, actual))
    assert not result
    assert result.problem == f"dtype {expected} was expected, found {actual}"


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.ones(2, np.complex64)])
def test_dtypes_without_an_order_cannot_be_compared(array: NDArray[Any]) -> None:
    result = one(array, array)
    assert not result
    assert result.problem == f"dtype {array.dtype.name} cannot be compared"


def test_what_is_no_array_fails() -> None:
    assert not compare({"y": cast("NDArray[Any]", [1.0])}, {"y": cast("NDArray[Any]", [1.0])})


def test_a_missing_output_fails_and_the_others_are_still_judged() -> None:
    both = {"a": floats(1), "b": floats(2)}
    result = compare(both, {"a": floats(1)})
    assert not result
    assert result["a"]
    assert result["b"].problem == "expected and missing"


def test_an_extra_output_fails() -> None:
    result = compare({"a": floats(1)}, {"a": floats(1), "c": floats(3)})
    assert not result
    assert result["c"].problem == "not expected"


def test_a_renamed_output_fails_twice() -> None:
    problems = {r.name: r.problem for r in compare({"a": floats(1)}, {"b": floats(1)}).tensors}
    assert problems == {"a": "expected and missing", "b": "not expected"}


def test_different_numbers_of_iterations_fail() -> None:
    runs = [{"y": floats(1)}, {"y": floats(2)}]
    result = compare_runs(runs, runs[:1])
    assert not result
    assert result.problem == "2 iterations were expected, 1 were run"
    assert len(result.iterations) == 1


def test_no_iteration_fails() -> None:
    assert not compare_runs([], [])


def test_one_bad_iteration_fails_the_run() -> None:
    result = compare_runs([{"y": floats(1)}, {"y": floats(2)}], [{"y": floats(1)}, {"y": floats(3)}])
    assert not result
    assert [bool(iteration) for iteration in result.iterations] == [True, False]


# What fails by its values.


def test_a_thousand_times_the_reference_fails() -> None:
    x = rng().normal(size=64).astype(np.float32)
    result = one(x, 1000 * x)
    assert not result
    assert result.stats is not None
    assert result.stats.max_rel == pytest.approx(999)
    assert result.stats.cosine == pytest.approx(1.0)


def test_the_budget_scales_with_the_reference_not_with_the_judged() -> None:
    assert not one(floats(1e-3, 0), floats(1e-3, 1e-3))
    assert not one(floats(0, 0), floats(1e-30, 0))


def test_uint8_does_not_wrap_around() -> None:
    result = one(np.array([0, 7], np.uint8), np.array([1, 7], np.uint8))
    assert not result
    assert result.stats is not None
    assert (result.stats.max_abs, result.stats.unequal) == (1.0, 1)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "int64", "uint64"])
def test_integers_are_exact(dtype: str) -> None:
    x = np.array([0, 1, 1], dtype)
    assert one(x, x)
    assert not one(x, np.array([0, 1, 0], dtype), kind="logits")


def test_integers_that_are_one_number_in_fp64_still_differ() -> None:
    result = one(np.array([2**53 + 1]), np.array([2**53]))
    assert not result
    assert result.stats is not None
    assert (result.stats.max_abs, result.stats.unequal) == (0.0, 1)
    assert result.required_rtol is None


def test_a_difference_beyond_fp64_fails() -> None:
    result = one(np.array([1e308]), np.array([-1e308]))
    assert not result
    assert result.problem == "the difference overflows float64"


def test_huge_values_have_a_cosine() -> None:
    result = one(np.array([1e300, 1.0]), np.array([1e300, 1.0]))
    assert result
    assert result.stats is not None
    assert result.stats.cosine == pytest.approx(1.0)


def test_the_sign_is_compared() -> None:
    assert not one(floats(1, -2), floats(1, 2))


@pytest.mark.parametrize(("excess", "passes"), [(0.9, True), (1.1, False)])
def test_the_edge_of_the_fp32_budget(excess: float, passes: bool) -> None:
    x = np.linspace(-8, 8, 4096, dtype=np.float32)
    y = x.copy()
    y[77] += np.float32(excess * 2e-5 * 8)
    assert bool(one(x, y, kind="logits")) is passes


def test_float16_that_overflowed_fails() -> None:
    x = np.array([60000.0], np.float16)
    with np.errstate(over="ignore"):
        assert not one(x, x * np.float16(2))


def test_bfloat16_is_compared_in_fp64() -> None:
    x = np.array([1.0, 256.0], ml_dtypes.bfloat16)
    assert one(x, x)
    result = one(x, np.array([1.0, 300.0], ml_dtypes.bfloat16))
    assert not result
    assert result.stats is not None
    assert result.stats.max_abs == 44.0


def test_a_dtype_without_a_budget_is_an_error() -> None:
    with pytest.raises(UsageError, match="no tolerance"):
        one(floats(1), floats(1), kind="integer")


# The numbers.


def test_the_numbers_against_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_statistics, "CHUNK", 100)
    e, a = rng().normal(size=(2, 3, 7, 113))
    d = np.abs(e - a)
    stats = one(e, a).stats
    assert stats is not None
    assert stats.count == d.size
    assert stats.max_abs == d.max()
    assert stats.mean_abs == pytest.approx(d.mean(), rel=1e-12)
    assert stats.p99_abs == pytest.approx(np.quantile(d, 0.99), rel=1e-12)
    assert (stats.max_expected, stats.max_actual) == (np.abs(e).max(), np.abs(a).max())
    assert stats.cosine == pytest.approx((e * a).sum() / np.linalg.norm(e) / np.linalg.norm(a), rel=1e-12)
    assert stats.worst_index == np.unravel_index(d.argmax(), d.shape)
    assert stats.unequal == d.size


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(1, 64))
def test_the_quantile_is_numpys_for_any_length_and_chunk(values: list[float], chunk: int) -> None:
    array = np.array(values)
    tail = _statistics._Tail(array.size)
    for start in range(0, array.size, chunk):
        tail.add(array[start : start + chunk])
    assert tail.quantile() == pytest.approx(np.quantile(array, 0.99), rel=1e-9, abs=1e-9)


def test_all_zero_references_have_no_relative_error() -> None:
    same = one(floats(0, 0), floats(0, 0))
    assert same
    assert same.stats is not None
    assert (same.stats.max_rel, same.stats.cosine, same.required_rtol) == (None, None, 0.0)
    assert one(floats(0, 0), floats(0, 1)).required_rtol is None


def test_a_scalar_and_a_transposed_view_are_compared() -> None:
    assert one(np.array(1.0), np.array(1.0))
    x = rng().normal(size=(5, 6))
    assert one(x.T, np.ascontiguousarray(x.T))
    assert not one(x.T, np.ascontiguousarray(x.T)[:, ::-1])


def test_the_required_tolerance_is_the_smallest_that_passes() -> None:
    x = rng().normal(size=1000).astype(np.float32)
    result = one(x, x + np.float32(1e-3))
    assert not result
    assert result.required_rtol is not None
    assert result.judge(Tolerance(result.required_rtol * (1 + 1e-12), 0.0, "just enough"))
    assert not result.judge(Tolerance(result.required_rtol * (1 - 1e-12), 0.0, "not enough"))


def test_the_stored_numbers_suffice_to_judge_again() -> None:
    x = rng().normal(size=1000).astype(np.float32)
    for noise in (1e-6, 1e-2):
        result = one(x, x + np.float32(noise))
        stored = json.loads(json.dumps(result.as_dict(), allow_nan=False))
        assert stored["passed"] is bool(result)
        assert (stored["max_abs"] <= stored["atol"] + stored["rtol"] * stored["max_expected"]) is bool(result)


def test_a_failed_structure_is_json_too() -> None:
    stored = json.loads(json.dumps(one(floats(NAN), floats(1)).as_dict(), allow_nan=False))
    assert stored["passed"] is False
    assert "not finite" in stored["problem"]
