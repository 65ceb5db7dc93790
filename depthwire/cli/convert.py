"""``depthwire convert``: all stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from depthwire.cli import _options
from depthwire.cli._ui import Ui, verb

if TYPE_CHECKING:
    from pathlib import Path


@click.command("convert")
@_options.source_argument(required=False)
@click.option("-o", "--out", type=_options.FILE, help="Directory to write; an artefact there is replaced.")
@_options.lift_options
@_options.route_options
@_options.schedule_options
@_options.precision_options
@_options.target_options
@_options.source_options
@_options.window_options
@_options.quality_options
@_options.engine_options
@click.option("--no-verify", "verify", flag_value=False, default=None, help="Do not compare.")
@click.option("--no-build", "build", flag_value=False, default=None, help="Do not build an engine.")
@_options.recipe_options
@click.option("--dry-run", is_flag=True, help="Capture and analyse, show what would be done, write nothing.")
@click.option("--force", is_flag=True, help="Replace an artefact even if its manifest cannot be read.")
@verb
def command(
    ui: Ui, *, recipe: Path | None, save_recipe: Path | None, dry_run: bool, force: bool, **options: Any
) -> None:
    """Convert SOURCE into an artefact with a verdict and an engine.

    SOURCE is a Hugging Face directory or cached id, a .gguf file, package.module:factory, or a .pt2 file.
    """
    resolved = _options.resolve(options, recipe=recipe, save_recipe=None if dry_run else save_recipe)
    if dry_run:
        from depthwire.api import dry_run as run_dry
        from depthwire.cli._show import show_dry_run

        intended = run_dry(recipe=resolved, stages=ui.stages(), force=force)
        ui.result(intended.as_dict(), *show_dry_run(intended))
        return
    from depthwire.api import VerificationError, convert
    from depthwire.cli._show import show_comparison, show_result
    from depthwire.reporters import stage_table

    stages = ui.stages()
    try:
        result = convert(recipe=resolved, stages=stages, force=force)
    except VerificationError as error:
        ui.show(*show_comparison(error.report), stage_table(stages))
        raise
    ui.result(result.report, *show_result(result))
