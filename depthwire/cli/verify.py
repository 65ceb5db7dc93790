"""``depthwire verify``: the proof, again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from depthwire.cli import _options
from depthwire.cli._ui import Ui, verb

if TYPE_CHECKING:
    from pathlib import Path


@click.command("verify")
@click.argument("directory", type=_options.FILE)
@click.option("--source", help="Where the model lies now, if it has moved.")
@_options.window_options
@click.option("--result", type=_options.FILE, help="Read back what a device found (result.json); nothing else is run.")
@click.option("--goldens-only", is_flag=True, help="Compare with the stored outputs alone; needs no source.")
@verb
def command(
    ui: Ui,
    *,
    directory: Path,
    source: str | None,
    text: Path | None,
    inputs: Path | None,
    windows: int | None,
    result: Path | None,
    goldens_only: bool,
) -> None:
    """Compare the artefact DIRECTORY with the model it came from, layer by layer where they differ.

    Exit code 7 when they differ; the first diverging layer is named.
    """
    from depthwire.api import VerificationError, verify
    from depthwire.cli._show import show_comparison

    stages = ui.stages()
    if result is not None:
        given = {"--source": source, "--text": text, "--inputs": inputs, "--windows": windows}
        _read_back(ui, directory, result, [*(n for n, v in given.items() if v is not None), *_flag(goldens_only)])
        return
    try:
        report = verify(
            directory,
            source=source,
            text=text,
            inputs=inputs,
            windows=windows,
            goldens_only=goldens_only,
            stages=stages,
        )
    except VerificationError as error:
        ui.show(*show_comparison(error.report))
        raise
    ui.result({**report.as_dict(), "stages": stages.as_list()}, *show_comparison(report))


def _flag(goldens_only: bool) -> list[str]:  # noqa: FBT001 - the option's value
    return ["--goldens-only"] if goldens_only else []


def _read_back(ui: Ui, directory: Path, result: Path, others: list[str]) -> None:
    from depthwire.api import verify_result
    from depthwire.cli._show_device import show_device_result
    from depthwire.errors import UsageError

    if others:
        raise UsageError(
            "verify.result-alone",
            "A device's result brings its own inputs and outputs",
            at="--result",
            want="no other option",
            got=", ".join(others),
            todo="Leave them out; without --result the artefact itself is compared.",
        )
    judged = verify_result(directory, result, stages=ui.stages())
    if not judged.passed:
        ui.show(*show_device_result(judged))
    judged.require_passed()
    ui.result(judged.as_dict(), *show_device_result(judged))
