"""``depthwire bundle``: what a device needs to build and prove an engine, from an artefact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from depthwire.cli import _options
from depthwire.cli._bundle_on import device_of, remote_options, run_there
from depthwire.cli._ui import Ui, verb

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from depthwire.runtime.bundle import BundleInfo
    from depthwire.stages import Stages


@click.command("bundle")
@click.argument("directory", type=_options.FILE)
@click.option("--target", metavar="NAME", required=True, help="The device; see 'depthwire targets'.")
@click.option("-o", "--out", type=_options.FILE, help="Where to write it (default: DIRECTORY-TARGET beside it).")
@click.option(
    "--jetpack", metavar="VERSION", help="JetPack of a Jetson, such as 7.2; the target's default when absent."
)
@click.option(
    "--form", type=click.Choice(["function", "plugin"]), help="Of the custom operators; the target's default."
)
@click.option("--flavour", type=click.Choice(["tensorrt", "tensorrt_rtx"]), help="The builder; the target's default.")
@click.option(
    "--capacity", "capacities", multiple=True, metavar="SHARE", help="Graphs of a routed model; all if absent."
)
@click.option("--workspace", metavar="SIZE", help="Most scratch memory of the engine, such as 1GiB.")
@click.option("--optimization-level", type=int, help="Builder effort, 0 to 5.")
@click.option("--latency-runs", type=int, help="Runs that are measured (default 200).")
@remote_options
@verb
def command(
    ui: Ui,
    *,
    directory: Path,
    target: str,
    out: Path | None,
    jetpack: str | None,
    form: str | None,
    flavour: str | None,
    capacities: tuple[str, ...],
    workspace: str | None,
    optimization_level: int | None,
    latency_runs: int | None,
    **remote: Any,
) -> None:
    """Write what the device TARGET needs to build the artefact DIRECTORY's engine, prove it and measure it.

    On the device 'python3 build_and_verify.py' does that; at home 'depthwire verify DIRECTORY --result result.json'
    reads back what it found. With --on all of that happens from here, over ssh, and the exit code is the script's.
    """
    from depthwire._bundle import place_of
    from depthwire.api import bundle
    from depthwire.recipe import make_recipe
    from depthwire.runtime.target import load_target

    build = make_recipe({"workspace": workspace, "optimization_level": optimization_level}, flags=True).build

    def make(stages: Stages) -> BundleInfo:
        return bundle(
            directory,
            target=target,
            out=out,
            jetpack=jetpack,
            form=form,
            flavour=flavour,
            capacities=capacities,
            workspace=build.workspace,
            optimization_level=build.optimization_level,
            latency_runs=latency_runs,
            stages=stages,
        )

    device = device_of(remote)
    if device is not None:
        place = place_of(directory, load_target(target, jetpack).name, out)
        run_there(ui, directory, device, remote, place=place, make=make)
        return
    info = make(ui.stages())
    ui.result(info.as_dict(), *_show(info))


def _show(info: BundleInfo) -> list[RenderableType]:
    from depthwire.cli._show import pairs_table
    from depthwire.reporters import megabytes

    bundle, platform = info.bundle, info.bundle.platform
    proxies = [
        f"{p.model}: {'not run' if p.passed is None else 'yes' if p.passed else p.detail}" for p in bundle.proxies
    ]
    table = pairs_table(
        [
            ("target", f"{bundle.target} ({bundle.title})"),
            ("JetPack", platform.jetpack and f"{platform.jetpack} (L4T {platform.l4t})"),
            ("builder", f"{platform.package} {platform.tensorrt_at_least} or later, below {platform.tensorrt_below}"),
            ("precision", bundle.precision),
            ("custom ops", bundle.form),
            ("engines to build", ", ".join(model.engine for model in bundle.models)),
            ("goldens", f"{bundle.models[0].windows} windows, from {bundle.models[0].reference}"),
            ("parsed by TensorRT-RTX, a proxy", ", ".join(proxies)),
            ("size", megabytes(info.bytes)),
        ],
        "device bundle (nothing was run on the device)",
    )
    return [table, f"bundle: {info.root}", "on the device: python3 build_and_verify.py"]
