"""Every benchmark prints one JSON object a line: figure, value, unit, against, n."""

from __future__ import annotations

import json


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
