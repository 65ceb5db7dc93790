"""The output directory: may it be written, is there room, and nothing half-written stays behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from depthwire.artifact import MANIFEST, MODEL
from depthwire.errors import DepthwireError, ExportError, InternalError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FULL = {errno.ENOSPC, errno.EDQUOT}


def check_out(out: Path | None, *, force: bool = False) -> Path:
    """Check, before anything slow, that an artefact may be written to a directory.

    Args:
        out: The directory; it must be absent, empty, or an artefact of ours.
        force: Accept a directory with a model and a manifest that cannot be read. Anything less is never replaced.

    Raises:
        UsageError: ``export.no-output``, ``export.output-name``, ``export.output-exists`` or
            ``export.output-not-writable``.
    """
    if out is None:
        raise UsageError(
            "export.no-output",
            "No output directory was given",
            at="-o/--out",
            want="a directory to write the artefact to",
            got="nothing",
            todo="Add '-o DIR', or 'out: DIR' to the recipe.",
        )
    out = Path(out)
    if out.name in {"", ".."}:
        raise UsageError(
            "export.output-name",
            "The output directory needs a name of its own",
            at=str(out),
            want="a path that ends in the directory's name",
            got=str(out),
            todo="Give a name such as -o out.",
        )
    if out.is_symlink() or out.exists():
        found = _foreign(out, force=force)
        if found is not None:
            raise UsageError(
                "export.output-exists",
                "The output directory exists and is not a Depthwire artefact",
                at=str(out),
                want="a new or empty directory, or an artefact to replace",
                got=found,
                todo="Choose another directory with -o, or remove this one yourself.",
            )
    _require_writable(out)
    return out


def _foreign(out: Path, *, force: bool) -> str | None:
    """Return what stands at ``out`` if it is not ours, ``None`` if it may be replaced."""
    if out.is_symlink() or not out.is_dir():
        return "a symbolic link" if out.is_symlink() else "a file"
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return None
    if MANIFEST not in names:
        return f"{len(names)} entries and no {MANIFEST}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
    try:
        raw = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raw = None
    ours = isinstance(raw, dict) and "depthwire" in raw and "schema_version" in raw
    if ours or (force and MODEL in names):
        return None
    hint = " (--force replaces the directory)" if MODEL in names else f", and no {MODEL}"
    return f"a {MANIFEST} that cannot be read as ours{hint}"


def _require_writable(out: Path) -> None:
    parent = _existing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            "export.output-not-writable",
            "The output cannot be created there",
            at=str(out),
            want="a place that may be written",
            got=f"{parent} is {'not writable' if parent.is_dir() else 'not a directory'}",
            todo="Choose another place with -o.",
        )


def _existing_parent(out: Path) -> Path:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def free_bytes(out: Path) -> int:
    """Return the bytes that are free where ``out`` will lie."""
    return shutil.disk_usage(_existing_parent(out)).free


def require_space(out: Path, needed: int) -> None:
    """Refuse to start writing what cannot fit.

    Args:
        out: Where it will be written.
        needed: Bytes that will be written.

    Raises:
        ExportError: ``export.disk-full``, with both numbers.
    """
    if free_bytes(out) < needed:
        raise _disk_full(out, needed)


@contextmanager
def disk_full_as_error(out: Path, needed: int) -> Iterator[None]:
    """Turn "no space left", in whatever words a writer has for it, into ``ExportError`` ``export.disk-full``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _disk_full(out, needed) from error
    except Exception as error:
        # safetensors and torch wrap the system's error in their own, with nothing but its text.
        if "No space left" not in str(error) and "os error 28" not in str(error):
            raise
        raise _disk_full(out, needed) from error


def _disk_full(out: Path, needed: int) -> ExportError:
    free = free_bytes(out)
    return ExportError(
        "export.disk-full",
        "The disk is full",
        at=str(out),
        want=f"about {needed / 1e6:,.0f} MB free",
        got=f"{free / 1e6:,.0f} MB free",
        todo=f"Free {max(needed - free, 0) / 1e6:,.0f} MB, or choose another disk with -o. Nothing was left behind.",
    )


@contextmanager
def removed_unless_vouched(out: Path) -> Iterator[None]:
    """Remove what the body put at ``out`` when it is interrupted or breaks in an unknown way.

    Our own errors pass: a failed comparison or build keeps the directory, marked as failed, for the user to look at. A
    directory that was there before and was not replaced yet stays.
    """
    before = _identity(out)
    try:
        yield
    except BaseException as error:
        known = isinstance(error, DepthwireError) and not isinstance(error, InternalError)
        if not known and _identity(out) != before:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _identity(out: Path) -> tuple[int, int] | None:
    if not out.exists():
        return None
    status = out.stat()
    return status.st_dev, status.st_ino


def check_file(out: Path, suffix: str) -> None:
    """Check, before anything slow, that a file may be written.

    Args:
        out: The file; one that exists is replaced.
        suffix: What its name must end in.

    Raises:
        UsageError: ``export.output-name`` or ``export.output-not-writable``.
    """
    if out.suffix != suffix or out.is_dir():
        raise UsageError(
            "export.output-name",
            "The file cannot be written under this name",
            at=str(out),
            want=f"a file name that ends in {suffix}",
            got="a directory" if out.is_dir() else out.name,
            todo=f"Give a name such as -o {out.with_suffix(suffix).name}.",
        )
    _require_writable(out)
