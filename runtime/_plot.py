"""Pictures: matplotlib, which is optional, or one error that says what to install."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthwire.errors import BuildError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


def require_figure(file: Path, what: str, otherwise: str) -> type[Figure]:
    """Return matplotlib's ``Figure``, which needs no display.

    Args:
        file: The picture that is to be written.
        what: What it shows, for the error.
        otherwise: What does without it, for the error.

    Raises:
        BuildError: ``runtime.no-matplotlib``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BuildError(
            "runtime.no-matplotlib",
            f"matplotlib, which draws {what}, is not installed",
            at=str(file),
            want="matplotlib",
            got=str(error),
            todo=f"pip install 'depthwire[plot]'{otherwise}",
        ) from error
    return Figure
