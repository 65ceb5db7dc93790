"""``depthwire plan``: engine size and memory, before anything is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from depthwire.cli import _options
from depthwire.cli._ui import Ui, verb

if TYPE_CHECKING:
    from pathlib import Path


@click.command("plan")
@click.argument("directories", type=_options.FILE, nargs=-1, required=True, metavar="DIRECTORY...")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME",
    help="Where it is to run; repeat for several. The artefact's own when absent.",
)
@verb
def command(ui: Ui, *, directories: tuple[Path, ...], targets: tuple[str, ...]) -> None:
    """Predict size and memory of the engines of the artefacts DIRECTORY... for every capacity and precision.

    What was measured of engines that are built already stands beside it.
    """
    from depthwire.api import plan
    from depthwire.cli._show_plan import show_plan

    found = plan(directories, target=targets, stages=ui.stages())
    ui.result(found.as_dict(), *show_plan(found))
