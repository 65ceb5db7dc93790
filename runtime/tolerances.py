"""The one table of tolerances: how far two correct implementations may lie apart, and why.

Every budget is relative to the largest magnitude of the reference tensor (``rtol``) plus an absolute part
(``atol``): the judged number is ``max|expected - actual| <= atol + rtol * max|expected|``. It is not numpy's
element-wise rule, under which small elements of a tensor with large outliers can never pass.

The measured figures are from SmolLM2-135M (30 layers, hidden size 576, 49152 tokens of vocabulary) on 512 tokens of
English text, torch 2.13 against ONNX Runtime 1.31 on a CPU; every hidden-sized value of the graph was compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from depthwire.errors import UsageError

Kind = Literal["logits", "hidden", "layer", "nll", "integer"]

KINDS: Final = get_args(Kind)
QUANTIZED: Final = "quantized"
"""Row of floating-point values behind layers whose inputs are rounded to int8, whatever their own dtype."""
FLOAT_DTYPES: Final = ("float64", "float32", "float16", "bfloat16")
EXACT_DTYPES: Final = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

LOOSEST_RTOL: Final = 0.05
"""A relative budget from here on accepts models that are simply wrong, so none is ever granted."""


@dataclass(frozen=True)
class Tolerance:
    """How far ``actual`` may lie from ``expected``.

    Attributes:
        rtol: Part relative to ``max|expected|`` of the whole tensor, in [0, 0.05).
        atol: Absolute part, in the unit of the tensor, finite and not negative.
        reason: Why this much and no more.

    Raises:
        UsageError: ``rtol`` is 0.05 or more, or a part is negative or not finite (``verify.tolerance``).
    """

    rtol: float
    atol: float
    reason: str

    def __post_init__(self) -> None:
        """Refuse a budget that could not fail."""
        parts = (self.rtol, self.atol)
        if all(math.isfinite(part) and part >= 0 for part in parts) and self.rtol < LOOSEST_RTOL:
            return
        raise UsageError(
            "verify.tolerance",
            "This tolerance is not a test",
            at=f"rtol {self.rtol}, atol {self.atol}",
            want=f"0 <= rtol < {LOOSEST_RTOL} and a finite atol >= 0",
            got=f"rtol {self.rtol}, atol {self.atol}",
            todo="Use the table's value, or find the layer that is wrong instead of widening the budget.",
        )

    def allowed(self, largest: float) -> float:
        """Return the largest absolute difference that passes; ``largest`` is ``max|reference|``."""
        return self.atol + self.rtol * largest


_EXACT = Tolerance(0.0, 0.0, "Indices, masks and counts are right or wrong; nothing is rounded.")

_TABLE: Final[dict[tuple[str, Kind], Tolerance]] = {
    ("float64", "logits"): Tolerance(
        1e-9, 0.0, "The algebra of a rewrite, free of rounding: unit roundoff 1.1e-16 over 1e4 terms stays below 1e-12."
    ),
    ("float64", "hidden"): Tolerance(1e-9, 0.0, "As for logits."),
    ("float64", "layer"): Tolerance(1e-9, 0.0, "As for logits."),
    ("float64", "nll"): Tolerance(0.0, 1e-9, "Nats, mean over a window; follows the logits."),
    ("float32", "logits"): Tolerance(
        2e-5, 0.0, "Another order of summation, accumulated over the layers: 2.0e-6 measured; ten times that."
    ),
    ("float32", "hidden"): Tolerance(2e-5, 0.0, "As for logits: the value just before the last matrix product."),
    ("float32", "layer"): Tolerance(
        2e-5,
        0.0,
        "Worst of 365 values 7.3e-6, after all layers before it. One weight matrix that is off by 2e-4 shows as 2e-4.",
    ),
    ("float32", "nll"): Tolerance(
        0.0, 1e-5, "Nats, mean over a window: 4.0e-8 measured. A perplexity of 20 moves by less than 2e-4."
    ),
    ("float16", "logits"): Tolerance(
        1e-2, 0.0, "Unit roundoff 4.9e-4 at every store, against a runtime that computes in fp32: 3.1e-3 measured."
    ),
    ("float16", "hidden"): Tolerance(1e-2, 0.0, "As for logits; 8.7e-3 measured against fp32 arithmetic."),
    ("float16", "layer"): Tolerance(
        3e-2, 0.0, "Worst of 304 values 1.1e-2; a layer that is wrong differs by its size."
    ),
    ("float16", "nll"): Tolerance(0.0, 1e-3, "Nats, mean over a window: 1.6e-4 measured."),
    ("bfloat16", "logits"): Tolerance(
        4.5e-2, 0.0, "Unit roundoff 3.9e-3 at every store: 2.1e-2 measured against fp32 arithmetic."
    ),
    ("bfloat16", "hidden"): Tolerance(4.5e-2, 0.0, "As for logits."),
    ("bfloat16", "layer"): Tolerance(
        4.9e-2,
        0.0,
        "The loosest that is granted. A sound layer has reached 1.3e-1 on one outlier: find a wrong layer at float32.",
    ),
    ("bfloat16", "nll"): Tolerance(0.0, 1e-2, "Nats, mean over a window: 3.6e-3 measured."),
    (QUANTIZED, "logits"): Tolerance(
        4.9e-2,
        0.0,
        "The loosest that is granted. An input half-way between two integers falls to either side; a sound model of "
        "width 64 has reached 5.2e-2: prove it with its source.",
    ),
    (QUANTIZED, "hidden"): Tolerance(4.9e-2, 0.0, "As for logits."),
    (QUANTIZED, "nll"): Tolerance(
        0.0, 1e-2, "Nats, mean over a window: 5.2e-4 measured on 63 tokens; fewer average less."
    ),
}


def tolerance(dtype: str, kind: Kind) -> Tolerance:
    """Return the budget for a tensor.

    Args:
        dtype: numpy spelling of the reference's dtype; ``bfloat16`` for bf16.
        kind: ``logits`` (the last output of a language model or classifier), ``hidden`` (any other floating output),
            ``layer`` (a value inside the graph), ``nll`` (mean negative log-likelihood in nats, judged at the dtype of
            the logits) or ``integer`` (exact; every integer and boolean dtype is exact whatever the kind).

    Raises:
        UsageError: The table has no entry (``verify.no-tolerance``).
    """
    if dtype in EXACT_DTYPES:
        return _EXACT
    try:
        return _TABLE[dtype, kind]
    except KeyError:
        raise UsageError(
            "verify.no-tolerance",
            "There is no tolerance for this kind of tensor",
            at=f"dtype {dtype}, kind {kind}",
            want=f"one of {', '.join(FLOAT_DTYPES)} with {', '.join(KINDS[:-1])}, or an integer dtype",
            got=f"{dtype}, {kind}",
            todo="Give the graph outputs of these dtypes, or add a row with its reason to the table.",
        ) from None


def as_markdown() -> str:
    """Return the table as ``docs/verify.md`` shows it."""
    rows = ["| dtype | kind | relative to max\\|reference\\| | absolute | reason |", "|---|---|---|---|---|"]
    for (dtype, kind), entry in _TABLE.items():
        rows.append(f"| {dtype} | {kind} | {_number(entry.rtol)} | {_number(entry.atol)} | {entry.reason} |")
    rows.append(f"| integers, bool | integer | 0 | 0 | {_EXACT.reason} |")
    return "\n".join(rows)


def _number(value: float) -> str:
    return f"{value:g}"
