"""The directory of a bundle: may it be written, and it is there whole or not at all."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from depthwire._hash import sha256_file
from depthwire.errors import UsageError
from depthwire.runtime.deploy.manifest import BUNDLE, FileEntry

if TYPE_CHECKING:
    from pathlib import Path


def check_bundle_out(out: Path) -> None:
    """Refuse a directory that is neither new, nor empty, nor an earlier bundle.

    Raises:
        UsageError: ``bundle.output-exists``.
    """
    if not out.exists() and not out.is_symlink():
        return
    found = "a symbolic link" if out.is_symlink() else "a file" if not out.is_dir() else None
    if found is None and any(out.iterdir()):
        try:
            raw = json.loads((out / BUNDLE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raw = None
        if not (isinstance(raw, dict) and {"schema_version", "depthwire", "target"} <= set(raw)):
            found = f"a directory without a {BUNDLE} of ours"
    if found is not None:
        raise UsageError(
            "bundle.output-exists",
            "The output exists and is not a bundle",
            at=str(out),
            want="a new or empty directory, or a bundle to replace",
            got=found,
            todo="Choose another directory with -o, or remove this one yourself.",
        )


def list_files(root: Path) -> dict[str, FileEntry]:
    """Return size and hash of every file of a bundle."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): FileEntry(path.stat().st_size, sha256_file(path)) for path in files}
