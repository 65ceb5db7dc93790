"""The options of ``depthwire bundle`` that run the bundle on a device over ssh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from depthwire.cli import _options
from depthwire.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from depthwire.cli._ui import Ui
    from depthwire.runtime.bundle import BundleInfo
    from depthwire.runtime.remote import Device
    from depthwire.stages import Stages

F = TypeVar("F", bound="Callable[..., Any]")

_OPTIONS = (
    click.option("--on", metavar="[USER@]HOST[:PORT]", help="Run the bundle on this device over ssh; resumes."),
    click.option("--identity", type=_options.FILE, help="With --on: the private key to log in with."),
    click.option("--remote-dir", metavar="PATH", help="With --on: folder on the device (default: in ~/.cache)."),
    click.option("--python", metavar="COMMAND", help="With --on: Python of the device (default python3)."),
    click.option("--ssh-option", "ssh_options", multiple=True, metavar="KEY=VALUE", help="With --on: as for ssh -o."),
    click.option("--keep", is_flag=True, help="With --on: leave the folder on the device."),
    click.option("--cancel", is_flag=True, help="With --on: end what runs there, remove its folder, and stop."),
    click.option("--ignore-board", is_flag=True, help="With --on: go on with another board, memory size or L4T."),
    click.option("--skip-latency", is_flag=True, help="With --on: do not measure."),
)


def remote_options(function: F) -> F:
    """Add the options; the command takes them as keywords and hands them on."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def device_of(given: Mapping[str, Any]) -> Device | None:
    """Return the device that the options name, ``None`` without ``--on``.

    Raises:
        UsageError: ``remote.without-on``, or what ``parse_device`` raises.
    """
    from depthwire.runtime.remote import parse_device

    if given["on"] is None:
        alone = [name for name, value in given.items() if value]
        if not alone:
            return None
        name = "--" + alone[0].replace("ssh_options", "ssh-option").replace("_", "-")
        raise UsageError(
            "remote.without-on",
            f"{name} is about a device that the bundle runs on",
            at=name,
            want="--on [USER@]HOST[:PORT] beside it",
            got="no --on",
            todo="Add --on, or leave the option out.",
        )
    return parse_device(
        given["on"],
        identity=given["identity"],
        python=given["python"] or "python3",
        ssh_options=given["ssh_options"],
    )


def run_there(
    ui: Ui,
    directory: Path,
    device: Device,
    given: Mapping[str, Any],
    *,
    place: Path,
    make: Callable[[Stages], BundleInfo],
) -> None:
    """Run the bundle on the device, or cancel it there, and show what came of it.

    The exit code is that of ``build_and_verify.py``.
    """
    from depthwire._remote import run_on_device
    from depthwire.cli._show_device import show_device_result
    from depthwire.runtime.remote import cancel

    stages = ui.stages()
    if given["cancel"]:
        cancel(place, device, folder=given["remote_dir"], stages=stages)
        ui.result({"cancelled": str(device)}, f"nothing of {place} runs on {device} any more")
        return
    run = run_on_device(
        directory,
        make(stages),
        device,
        stages,
        folder=given["remote_dir"],
        arguments=[f"--{name.replace('_', '-')}" for name in ("ignore_board", "skip_latency") if given[name]],
        keep=given["keep"],
    )
    shown = [] if run.judged is None else list(show_device_result(run.judged))
    try:
        run.require_built()
    except BaseException:
        ui.show(*shown)
        raise
    left = [] if run.remote.folder is None else [f"left on the device: {run.remote.folder}"]
    ui.result(run.as_dict(), *shown, f"fetched: {run.remote.out}", *left)
    click.get_current_context().exit(run.remote.exit_code)
