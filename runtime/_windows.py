"""The windows that go through the runners: their inputs, checked, in groups that bound memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from depthwire.artifact import Artifact, TensorInfo
    from depthwire.runtime._goldens import Goldens

    Arrays = Mapping[str, NDArray[Any]]

RESULT_BYTES = 768 << 20
"""Outputs held at a time, over all runners; a single window may need more."""


def window_feeds(artifact: Artifact, windows: Sequence[Arrays], goldens: Goldens | None) -> list[Arrays]:
    """Return the inputs of every window, checked against the manifest.

    Raises:
        UsageError: None is there, one does not fit (``verify.window``), or there are windows and nothing to compare
            with (``verify.no-reference``).
    """
    if goldens is not None and windows:
        raise UsageError(
            "verify.no-reference",
            "There is nothing to compare these windows with",
            at=str(artifact.root),
            want="the original or the rewritten program, or no windows (the goldens bring their own)",
            got=f"{len(windows)} windows and no program",
            todo="Give the source model, or leave the text away to compare with the artefact's goldens.",
        )
    feeds: list[Arrays] = list(windows)
    if goldens is not None:
        feeds = [goldens.inputs(index) for index in range(goldens.count)]
    if not feeds:
        raise _bad_window(artifact, "windows", "one window or more", "none")
    for index, feed in enumerate(feeds):
        _check_window(artifact, f"window {index}", feed)
    return feeds


def _check_window(artifact: Artifact, at: str, feed: Arrays) -> None:
    """Judge inputs before Polygraphy sees them: it casts and reshapes what does not fit, with a warning."""
    wanted = {info.name: (info.dtype, tuple(info.shape)) for info in artifact.manifest.inputs}
    if set(feed) != set(wanted):
        raise _bad_window(artifact, at, f"inputs {', '.join(sorted(wanted))}", ", ".join(sorted(feed)) or "none")
    for name, (dtype, shape) in wanted.items():
        found = feed[name]
        if (found.dtype.name, found.shape) != (dtype, shape):
            got = f"{found.dtype.name} {list(found.shape)}"
            raise _bad_window(artifact, f"{at}, input {name}", f"{dtype} {list(shape)}", got)


def _bad_window(artifact: Artifact, at: str, want: str, got: str) -> UsageError:
    todo = f"See 'depthwire inspect {artifact.root}' for the inputs."
    return UsageError(
        "verify.window", "A window does not fit the artefact's inputs", at=at, want=want, got=got, todo=todo
    )


def window_groups(artifact: Artifact, feeds: Sequence[Arrays], runners: int) -> list[range]:
    """Return ranges of windows whose outputs, from this many runners, stay below ``RESULT_BYTES``."""
    size = max(1, RESULT_BYTES // max(1, runners * _output_bytes(artifact.manifest.outputs)))
    return [range(start, min(start + size, len(feeds))) for start in range(0, len(feeds), size)]


def _output_bytes(outputs: Sequence[TensorInfo]) -> int:
    import ml_dtypes  # noqa: F401  # registers the name bfloat16 with numpy
    import numpy as np

    return sum(int(np.prod(info.shape, dtype=np.int64)) * np.dtype(info.dtype).itemsize for info in outputs)
