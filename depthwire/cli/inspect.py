"""``depthwire inspect``: the residual stream of a model, or the contents of an artefact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from depthwire.cli import _options
from depthwire.cli._ui import Ui, verb

if TYPE_CHECKING:
    from pathlib import Path


@click.command("inspect")
@_options.source_argument(required=True)
@_options.source_options
@click.option("--depth-weights", is_flag=True, help="Run an AttnRes model and show which read takes which source.")
@click.option("--text", type=_options.FILE, help="Text to run it on.")
@click.option("--inputs", type=_options.FILE, help="Inputs to run it on (.safetensors or .npz).")
@click.option("--windows", type=int, help="Windows of the text to run it on (default 4).")
@click.option("-o", "--out", type=_options.FILE, help="Directory for report.json and the heat map of the weights.")
@verb
def command(ui: Ui, *, source: str, depth_weights: bool, out: Path | None, **options: Any) -> None:
    """Show the residual stream of SOURCE: origin, sublayers, norms, and what breaks the structure.

    SOURCE is a model as for convert, or an artefact, of which the manifest is summed up. With --depth-weights, SOURCE
    is a model with Attention Residuals, which is run on a text.
    """
    for name, value in (("--out", out), *((f"--{key}", options[key]) for key in ("text", "inputs", "windows"))):
        if value is not None and not depth_weights:
            raise click.UsageError(f"{name} belongs to --depth-weights.")
    from depthwire.api import inspect
    from depthwire.cli._show import show_inspection

    resolved = _options.resolve({"source": source, **options}, recipe=None)
    inspection = inspect(recipe=resolved, stages=ui.stages(), depth_weights=depth_weights, out=out)
    ui.result(inspection.as_dict(), *show_inspection(inspection))
