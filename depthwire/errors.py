"""One error for one failure: what failed, where, what was wanted, what was found, what to do.

::

    DepthwireError                exit code
    ├── UsageError                2   the request itself cannot be meant (bad option, unknown target)
    ├── CaptureError              3   the source is missing, unsafe, or torch.export refuses it
    ├── PassError                 4   the model's structure does not allow the rewrite
    ├── ExportError               5   the ONNX file or the artefact cannot be written or read
    ├── BuildError                6   a back end is absent, or cannot build the engine
    ├── ParityError               7   the compiled model computes something else
    ├── DeviceError               8   a device is not what the bundle was made for, or lacks something
    ├── RemoteError               10  a device cannot be reached, or cannot be worked on
    └── InternalError             70  a broken invariant of ours

Business code raises; exactly one place (``depthwire.cli.main``) prints and exits. Every ``code`` is a heading of
``docs/troubleshooting.md``, which a test checks.
"""

from __future__ import annotations

from typing import ClassVar


class DepthwireError(Exception):
    """A failure with everything a reader needs to act on it.

    Attributes:
        code: Stable identifier, ``stage.reason``; a heading of ``docs/troubleshooting.md``.
        what: One sentence: what failed.
        at: Where: module path, node, file or option.
        want: What was wanted there.
        got: What was found there.
        todo: What the user can do about it.
        exit_code: Exit status of the command line.
    """

    exit_code: ClassVar[int] = 70

    def __init__(
        self,
        code: str,
        what: str,
        *,
        at: str | None = None,
        want: str | None = None,
        got: str | None = None,
        todo: str | None = None,
    ) -> None:
        """Keep the fields apart, so that ``--json`` can print them as fields."""
        super().__init__(what)
        self.code = code
        self.what = what
        self.at = at
        self.want = want
        self.got = got
        self.todo = todo

    def lines(self) -> list[tuple[str, str]]:
        """Return the (label, text) pairs that are present, in reading order."""
        pairs = (("at", self.at), ("wanted", self.want), ("found", self.got), ("do", self.todo))
        return [(label, text) for label, text in pairs if text is not None]

    def as_dict(self) -> dict[str, str | int | None]:
        """Return the error as a JSON-ready mapping."""
        return {
            "error": self.code,
            "what": self.what,
            "at": self.at,
            "wanted": self.want,
            "found": self.got,
            "do": self.todo,
            "exit_code": self.exit_code,
        }

    def __str__(self) -> str:
        return "\n".join([f"{self.what} [{self.code}]", *(f"  {label}: {text}" for label, text in self.lines())])


class UsageError(DepthwireError):
    """The request cannot be meant: a bad option, a bad recipe, an unknown target."""

    exit_code = 2


class CaptureError(DepthwireError):
    """The model cannot be loaded, is unsafe to load, or ``torch.export`` refuses it."""

    exit_code = 3


class PassError(DepthwireError):
    """The structure of the model does not allow the rewrite that was asked for."""

    exit_code = 4


class ExportError(DepthwireError):
    """The ONNX file or the artefact cannot be written, or does not pass its own checks."""

    exit_code = 5


class BuildError(DepthwireError):
    """A back end is absent, or cannot build or load the engine."""

    exit_code = 6


class ParityError(DepthwireError):
    """The compiled model does not compute what the original computes."""

    exit_code = 7


class DeviceError(DepthwireError):
    """A device fails a check of ``build_and_verify.py``. Its exit code 9, built but not verified, is no error."""

    exit_code = 8


class RemoteError(DepthwireError):
    """A device cannot be reached over ssh, or does not let us work on it; the build itself has its own exit codes."""

    exit_code = 10


class InternalError(DepthwireError):
    """An invariant of Depthwire itself is broken; never the user's fault."""

    exit_code = 70
