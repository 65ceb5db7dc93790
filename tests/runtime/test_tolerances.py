"""The table of tolerances: complete, never loose, and as the documentation shows it."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest

from depthwire.errors import UsageError
from depthwire.runtime.tolerances import (
    EXACT_DTYPES,
    FLOAT_DTYPES,
    KINDS,
    LOOSEST_RTOL,
    Kind,
    Tolerance,
    as_markdown,
    tolerance,
)

DOCS = Path(__file__).parents[2] / "docs" / "verify.md"


@pytest.mark.parametrize(("dtype", "kind"), list(product(FLOAT_DTYPES, KINDS[:-1])))
def test_every_float_row_is_a_test_with_a_reason(dtype: str, kind: Kind) -> None:
    row = tolerance(dtype, kind)
    assert row.rtol < LOOSEST_RTOL
    assert row.rtol > 0 or row.atol > 0
    assert len(row.reason) > 10


@pytest.mark.parametrize(("dtype", "kind"), list(product(EXACT_DTYPES, KINDS)))
def test_integers_are_exact_whatever_the_kind(dtype: str, kind: Kind) -> None:
    assert tolerance(dtype, kind).allowed(1e30) == 0.0


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_wider_dtype_never_gets_a_wider_budget(kind: Kind) -> None:
    rows = [tolerance(dtype, kind) for dtype in FLOAT_DTYPES]
    assert [(r.rtol, r.atol) for r in rows] == sorted((r.rtol, r.atol) for r in rows)


def test_the_budgets_that_are_promised() -> None:
    assert tolerance("float32", "logits").allowed(40.0) == pytest.approx(8e-4)
    assert tolerance("float32", "nll").allowed(3.0) == 1e-5


@pytest.mark.parametrize(
    ("rtol", "atol"),
    [(0.05, 0.0), (1.0, 0.0), (math.nan, 0.0), (-1e-9, 0.0), (0.0, -1.0), (0.0, math.inf), (0.0, math.nan)],
)
def test_a_budget_that_cannot_fail_is_refused(rtol: float, atol: float) -> None:
    with pytest.raises(UsageError) as caught:
        Tolerance(rtol, atol, "because")
    assert caught.value.code == "verify.tolerance"


def test_just_below_the_loosest_is_granted() -> None:
    assert Tolerance(math.nextafter(LOOSEST_RTOL, 0), 0.0, "because").rtol < LOOSEST_RTOL


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "integer"), ("float8_e4m3fn", "logits"), ("<U3", "hidden")])
def test_what_the_table_lacks_is_an_error(dtype: str, kind: Kind) -> None:
    with pytest.raises(UsageError) as caught:
        tolerance(dtype, kind)
    assert caught.value.code == "verify.no-tolerance"


def test_the_documentation_shows_this_table() -> None:
    assert as_markdown() in DOCS.read_text(encoding="utf-8")
