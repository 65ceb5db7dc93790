"""``depthwire targets``: what can be built for."""

from __future__ import annotations

import click

from depthwire.cli._ui import Ui, verb


@click.command("targets")
@click.argument("name", required=False)
@verb
def command(ui: Ui, *, name: str | None) -> None:
    """List the targets, or show everything known of one NAME."""
    from depthwire.api import targets
    from depthwire.cli._show import pairs_table, show_targets
    from depthwire.runtime.target import load_target

    if name is None:
        found = targets()
        ui.result({"targets": [target.model_dump(mode="json") for target in found]}, show_targets(found))
        return
    facts = load_target(name).model_dump(mode="json")
    ui.result(facts, pairs_table((label.replace("_", " "), _text(value)) for label, value in facts.items()))


def _text(value: object) -> object:
    if isinstance(value, list):
        return "\n".join(str(item) for item in value)
    if isinstance(value, dict):
        return "\n".join(f"{key}: {item}" for key, item in value.items())
    return value
