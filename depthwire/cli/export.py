"""``depthwire export``: the artefact alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from depthwire.cli import _options
from depthwire.cli._ui import Ui, verb

if TYPE_CHECKING:
    from pathlib import Path


@click.command("export")
@_options.source_argument(required=False)
@click.option("-o", "--out", type=_options.FILE, help="Directory to write; an artefact there is replaced.")
@_options.lift_options
@_options.route_options
@_options.schedule_options
@_options.precision_options
@_options.target_options
@_options.source_options
@click.option("--text", type=_options.FILE, help="Text for the goldens; random inputs when absent.")
@click.option("--inputs", type=_options.FILE, help="Inputs for the goldens (.safetensors or .npz).")
@_options.recipe_options
@click.option("--force", is_flag=True, help="Replace an artefact even if its manifest cannot be read.")
@verb
def command(ui: Ui, *, recipe: Path | None, save_recipe: Path | None, force: bool, **options: Any) -> None:
    """Capture, rewrite and write the artefact of SOURCE; 'verify' and 'build' go on from there."""
    from depthwire.api import export
    from depthwire.reporters import stage_table

    resolved = _options.resolve(options, recipe=recipe, save_recipe=save_recipe)
    stages = ui.stages()
    artifact = export(recipe=resolved, stages=stages, force=force)
    document = {"directory": str(artifact.root), "manifest": artifact.manifest.model_dump(mode="json")}
    ui.result({**document, "stages": stages.as_list()}, stage_table(stages), f"wrote {artifact.root}")
