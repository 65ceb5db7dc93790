"""``depthwire explain``: what each pass does to a model, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import click

from depthwire.cli import _options
from depthwire.cli._ui import Ui, verb


@click.command("explain")
@_options.source_argument(required=True)
@_options.lift_options
@_options.route_options
@_options.schedule_options
@_options.target_options
@_options.source_options
@verb
def command(ui: Ui, *, source: str, **options: Any) -> None:
    """Capture and rewrite SOURCE in memory; list the rewrites of every pass and the reasons of what it left alone.

    SOURCE is a model as for convert. Nothing is written.
    """
    from depthwire.api import explain
    from depthwire.cli._show import show_explanation

    resolved = _options.resolve({"source": source, **options}, recipe=None)
    found = explain(recipe=resolved, stages=ui.stages())
    ui.result(found.as_dict(), *show_explanation(found.passes))
