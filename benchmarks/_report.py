"""What the benchmarks share: their arguments, and one JSON object a line (figure, value, unit, against, n)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

_MODELS = Path(__file__).resolve().parent.parent / ".cache" / "models"


def common_arguments(description: str | None, *, runs: int) -> argparse.ArgumentParser:
    """Return a parser for the model, its sequence length and the number of runs a side."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, default=_MODELS / "smollm2-135m-instruct")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--runs", type=int, default=runs)
    return parser


def report(figure: str, value: float, unit: str, against: str, n: int) -> None:
    """Print one figure.

    Args:
        figure: Its name, as the documentation quotes it.
        value: The median.
        unit: Unit of the value; ``ratio`` where it is a quotient of two medians.
        against: What it is measured against, or how it was measured.
        n: Runs on each side.
    """
    line = {"figure": figure, "value": round(value, 4), "unit": unit, "against": against, "n": n}
    print(json.dumps(line), flush=True)
