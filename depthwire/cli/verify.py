"""``depthwire verify``: the proof, again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from depthwire.cli import _options
from depthwire.cli._ui import Ui, verb

if TYPE_CHECKING:
    from pathlib import Path


@click.command("verify")
@click.argument("directory", type=_options.FILE)
@click.option("--source", help="Where the model lies now, if it has moved.")
@_options.window_options
@click.option("--goldens-only", is_flag=True, help="Compare with the stored outputs alone; needs no source.")
@verb
def command(
    ui: Ui,
    *,
    directory: Path,
    source: str | None,
    text: Path | None,
    inputs: Path | None,
    windows: int | None,
    goldens_only: bool,
) -> None:
    """Compare the artefact DIRECTORY with the model it came from, layer by layer where they differ.

    Exit code 7 when they differ; the first diverging layer is named.
    """
    from depthwire.api import VerificationError, verify
    from depthwire.cli._show import show_comparison

    stages = ui.stages()
    try:
        report = verify(
            directory,
            source=source,
            text=text,
            inputs=inputs,
            windows=windows,
            goldens_only=goldens_only,
            stages=stages,
        )
    except VerificationError as error:
        ui.show(*show_comparison(error.report))
        raise
    ui.result({**report.as_dict(), "stages": stages.as_list()}, *show_comparison(report))
