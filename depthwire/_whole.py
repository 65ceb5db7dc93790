"""Directories that appear whole or not at all: written beside their place, and renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def temporary_sibling(out: Path) -> Iterator[Path]:
    """Give a directory beside the one to write, and remove it unless it was renamed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    root = out.with_name(f".{out.name}.writing-{os.getpid()}")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def put_in_place(root: Path, out: Path, *, keep: str | None = None) -> None:
    """Rename a finished directory into place; an old one there is moved aside first and deleted last.

    Args:
        root: The finished directory, beside ``out``.
        out: Where it belongs.
        keep: A directory in the old one that moves into the new one.

    Raises:
        OSError: It cannot be renamed; the old one is then where it was.
    """
    if not out.exists():
        root.rename(out)
        return
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    out.rename(old)
    try:
        root.rename(out)
    except OSError:
        old.rename(out)
        raise
    if keep is not None and (old / keep).is_dir():
        (old / keep).rename(out / keep)
    shutil.rmtree(old, ignore_errors=True)
