"""``depthwire inspect``: the residual stream of a model, or the contents of an artefact."""

from __future__ import annotations

from typing import Any

import click

from depthwire.cli import _options
from depthwire.cli._ui import Ui, verb


@click.command("inspect")
@_options.source_argument(required=True)
@_options.source_options
@verb
def command(ui: Ui, *, source: str, **options: Any) -> None:
    """Show the residual stream of SOURCE: origin, sublayers, norms, and what breaks the structure.

    SOURCE is a model as for convert, or an artefact, of which the manifest is summed up.
    """
    from depthwire.api import inspect
    from depthwire.cli._show import show_inspection

    resolved = _options.resolve({"source": source, **options}, recipe=None)
    inspection = inspect(recipe=resolved, stages=ui.stages())
    ui.result(inspection.as_dict(), *show_inspection(inspection))
