"""The directory that ``inspect -o`` writes: ``report.json`` and pictures, never into an artefact."""

from __future__ import annotations

import datetime as dt
import json
import os
from typing import TYPE_CHECKING, Any

import depthwire
from depthwire._outdir import check_out
from depthwire.artifact import MANIFEST, REPORT
from depthwire.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from depthwire.recipe import Recipe

SCHEMA_VERSION = 1


def require_inputs(recipe: Recipe, code: str, what: str, option: str) -> None:
    """Raise UsageError unless the recipe names a text or a file of inputs."""
    if recipe.goldens.text is None and recipe.goldens.inputs is None:
        raise UsageError(
            code,
            what,
            at=option,
            want="--text FILE, or --inputs FILE",
            got="neither",
            todo="Name a text of the kind that the model reads.",
        )


def check_inspection_out(out: Path, files: set[str]) -> None:
    """Refuse a directory that holds anything but an earlier inspection: an artefact's files are hashed."""
    foreign = out.is_dir() and {path.name for path in out.iterdir()} - {REPORT, *files}
    if foreign:
        raise UsageError(
            "export.output-exists",
            "The output directory exists and holds other files",
            at=str(out),
            want="a new or empty directory, or one of an earlier inspection",
            got="an artefact" if MANIFEST in foreign else ", ".join(sorted(foreign)[:3]),
            todo="Choose another directory with -o.",
        )
    if not out.is_dir():
        check_out(out)


def write_inspection(
    out: Path, source: Mapping[str, Any], sections: Mapping[str, Any], files: Mapping[str, Callable[[Path], None]]
) -> None:
    """Write ``report.json`` and the files, each under a temporary name first.

    Args:
        out: The directory.
        source: Where the model came from, JSON-ready.
        sections: What was found, by its name in the report.
        files: What writes each further file, by name.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, write in files.items():
        temporary = out / f".{os.getpid()}.{name}"
        try:
            write(temporary)
            temporary.replace(out / name)
        finally:
            temporary.unlink(missing_ok=True)
    report = {
        "schema_version": SCHEMA_VERSION,
        "depthwire": depthwire.__version__,
        "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "source": dict(source),
        **sections,
    }
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
