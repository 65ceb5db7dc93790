"""``depthwire targets``: what can be built for."""

from __future__ import annotations

import click

from depthwire.cli._ui import Ui, verb


@click.command("targets")
@click.argument("name", required=False)
@click.option("--jetpack", metavar="VERSION", help="With NAME: the board under this JetPack, such as 7.2.")
@verb
def command(ui: Ui, *, name: str | None, jetpack: str | None) -> None:
    """List the targets, or show everything known of one NAME."""
    from depthwire.api import targets
    from depthwire.cli._show_targets import show_target, show_targets
    from depthwire.errors import UsageError
    from depthwire.runtime.target import load_target

    if name is not None:
        target = load_target(name, jetpack)
        ui.result(target.model_dump(mode="json"), *show_target(target))
        return
    if jetpack is not None:
        raise UsageError(
            "capture.option-without-effect",
            "a JetPack belongs to one board",
            at="--jetpack",
            want="the name of a target",
            got=jetpack,
            todo="Name the board, or leave the option out.",
        )
    found = targets()
    ui.result({"targets": [target.model_dump(mode="json") for target in found]}, show_targets(found))
