"""``depthwire doctor``: the surroundings."""

from __future__ import annotations

import click

from depthwire.cli._ui import Ui, verb


@click.command("doctor")
@click.option("--deep", is_flag=True, help="Import every package, in processes of their own (some seconds each).")
@verb
def command(ui: Ui, *, deep: bool) -> None:
    """Say what is present, what is missing or broken, and the exact command to get it."""
    from depthwire.api import doctor
    from depthwire.cli._show import show_findings

    findings = doctor(deep=deep)
    ui.result({"findings": [finding.as_dict() for finding in findings]}, *show_findings(findings))
