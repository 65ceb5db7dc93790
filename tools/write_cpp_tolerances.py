"""Write the table of tolerances for the C++ runners: ``runtime/deploy/cpp/common/tolerances.inc``.

The table stays one, ``runtime/tolerances.py``; ``tests/runtime/deploy/test_cpp_runner.py`` fails where the file is not
what this writes.
"""

from __future__ import annotations

from pathlib import Path

from depthwire.runtime.tolerances import FLOAT_DTYPES, Kind, tolerance

TARGET = Path(__file__).resolve().parent.parent / "runtime/deploy/cpp/common/tolerances.inc"
KINDS: tuple[Kind, ...] = ("logits", "hidden")
"""The kinds that outputs of a graph have; integers are exact."""


def table() -> str:
    """Return the file's text: dtype, kind, relative and absolute part, shortest digits that give the same number."""
    lines = ["// Written by tools/write_cpp_tolerances.py from runtime/tolerances.py."]
    for dtype in FLOAT_DTYPES:
        for kind in KINDS:
            row = tolerance(dtype, kind)
            lines.append(f'{{"{dtype}", "{kind}", {row.rtol!r}, {row.atol!r}}},')
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(table(), encoding="utf-8")
