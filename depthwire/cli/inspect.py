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
@_options.route_options
@click.option("--depth-weights", is_flag=True, help="Run an AttnRes model and show which read takes which source.")
@click.option("--routing", is_flag=True, help="Run a routed model and show which layer computes which token.")
@click.option("--text", type=_options.FILE, help="Text to run it on.")
@click.option("--inputs", type=_options.FILE, help="Inputs to run it on (.safetensors or .npz).")
@click.option("--windows", type=int, help="Windows of the text to run it on (default 4).")
@click.option("-o", "--out", type=_options.FILE, help="Directory for report.json and the pictures.")
@verb
def command(ui: Ui, *, source: str, depth_weights: bool, routing: bool, out: Path | None, **options: Any) -> None:
    """Show the residual stream of SOURCE: origin, sublayers, norms, and what breaks the structure.

    SOURCE is a model as for convert, or an artefact, of which the manifest is summed up, and what a routed one computes
    by layer. With --depth-weights, SOURCE is a model with Attention Residuals, which is run on a text; with --routing
    it is one that routes tokens, or that the --route options route.
    """
    for name, value in (("--out", out), *((f"--{key}", options[key]) for key in ("text", "inputs", "windows"))):
        if value is not None and not (depth_weights or routing):
            raise click.UsageError(f"{name} belongs to --depth-weights and --routing.")
    routes = [name for name, value in options.items() if name.startswith(("route", "capacit")) and value is not None]
    if routes and not routing:
        raise click.UsageError(f"--{routes[0].replace('_', '-')} belongs to --routing.")
    from depthwire.api import inspect
    from depthwire.cli._show import show_inspection
    from depthwire.cli._show_route import show_compute, show_routing

    resolved = _options.resolve({"source": source, **options}, recipe=None)
    inspection = inspect(recipe=resolved, stages=ui.stages(), depth_weights=depth_weights, routing=routing, out=out)
    compute = show_compute(inspection.compute) if inspection.compute else ()
    routed = [show_routing(inspection.routing)] if inspection.routing else []
    ui.result(inspection.as_dict(), *show_inspection(inspection), *compute, *routed)
