"""``depthwire kernels``: GPU kernels for the custom ops of an artefact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from depthwire.cli import _options
from depthwire.cli._ui import Ui, verb

if TYPE_CHECKING:
    from pathlib import Path


@click.command("kernels")
@click.argument("directory", type=_options.FILE)
@click.option(
    "--cc",
    "compute_capabilities",
    multiple=True,
    metavar="SM87",
    help="Compute capability to compile for; repeat for several.",
)
@verb
def command(ui: Ui, *, directory: Path, compute_capabilities: tuple[str, ...]) -> None:
    """Compile GPU kernels for the depth-attention operators of the artefact DIRECTORY, into its folder kernels/."""
    from depthwire.api import kernels
    from depthwire.cli._show import show_kernels

    info = kernels(directory, compute_capabilities=compute_capabilities, stages=ui.stages())
    ui.result(info.model_dump(mode="json"), show_kernels(info))
