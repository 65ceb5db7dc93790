"""``depthwire rewrite``: a lifted, trainable program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from depthwire.cli import _options
from depthwire.cli._ui import Ui, verb

if TYPE_CHECKING:
    from pathlib import Path


@click.command("rewrite")
@_options.source_argument(required=True)
@click.option("-o", "--out", "file", type=_options.FILE, required=True, help="The .pt2 file to write.")
@_options.lift_options
@_options.route_options
@_options.source_options
@verb
def command(ui: Ui, *, source: str, file: Path, **options: Any) -> None:
    """Capture and rewrite SOURCE; write a .pt2 whose depth queries are parameters to train.

    The file goes back into convert, and torch.export.load reads it.
    """
    from depthwire._flow import passes_list
    from depthwire.api import rewrite
    from depthwire.cli._show import show_passes

    resolved = _options.resolve({"source": source, **options}, recipe=None)
    program = rewrite(recipe=resolved, out=file, stages=ui.stages())
    passes = passes_list(program)
    ui.result({"file": str(file), "bytes": file.stat().st_size, "passes": passes}, show_passes(passes), f"wrote {file}")
