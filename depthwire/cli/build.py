"""``depthwire build``: an engine from an artefact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from depthwire.cli import _options
from depthwire.cli._ui import Ui, verb

if TYPE_CHECKING:
    from pathlib import Path


@click.command("build")
@click.argument("directory", type=_options.FILE)
@click.option("--target", metavar="NAME", help="What to build for; the artefact's own when absent.")
@click.option(
    "--provider",
    type=click.Choice(["auto", "tensorrt", "nv-tensorrt-rtx"]),
    help="With --target ort-cuda: let this provider of ONNX Runtime compile the graph; needs the GPU.",
)
@_options.engine_options
@verb
def command(
    ui: Ui,
    *,
    directory: Path,
    target: str | None,
    provider: Literal["auto", "tensorrt", "nv-tensorrt-rtx"] | None,
    compute_capabilities: tuple[str, ...],
    workspace: str | None,
    optimization_level: int | None,
    check_memory: bool | None,
    route_inputs: bool | None,
    all_capacities: bool | None,
    max_batch: int | None,
    strip_weights: bool | None,
) -> None:
    """Build an engine from the artefact DIRECTORY and list it in its manifest."""
    from depthwire.api import build
    from depthwire.cli._show import show_engine
    from depthwire.recipe import make_recipe

    options = make_recipe(
        {
            "compute_capabilities": list(compute_capabilities) or None,
            "workspace": workspace,
            "optimization_level": optimization_level,
            "check_memory": check_memory,
            "route_inputs": route_inputs,
            "all_capacities": all_capacities,
            "max_batch": max_batch,
            "strip_weights": strip_weights,
        },
        flags=True,
    ).build
    engine = build(
        directory,
        target=target,
        provider=provider,
        compute_capabilities=options.compute_capabilities,
        workspace=options.workspace,
        optimization_level=options.optimization_level,
        check_memory=options.check_memory,
        route_inputs=route_inputs,
        all_capacities=all_capacities,
        max_batch=options.max_batch,
        strip_weights=strip_weights,
        stages=ui.stages(),
    )
    ui.result(engine.model_dump(mode="json"), show_engine(engine))
