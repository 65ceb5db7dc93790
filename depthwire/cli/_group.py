"""The verb table: names and one-line helps are known without importing the verbs."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, NamedTuple

import click

from depthwire.errors import UsageError

if TYPE_CHECKING:
    from click import Command, Context, HelpFormatter


class Verb(NamedTuple):
    """One verb: where its command is and what it does."""

    module: str
    summary: str


VERBS = {
    "convert": Verb("convert", "All stages: capture, rewrite, export, verify, build, report."),
    "inspect": Verb("inspect", "Show a model's residual stream, or what an artefact holds."),
    "explain": Verb("explain", "Show what each pass does to a model, and what it leaves alone and why."),
    "rewrite": Verb("rewrite", "Capture and rewrite; write a trainable .pt2."),
    "export": Verb("export", "Capture, rewrite and write the artefact, without verify and build."),
    "verify": Verb("verify", "Compare an artefact with the model it came from."),
    "build": Verb("build", "Build an engine from an artefact."),
    "bundle": Verb("bundle", "Write what a device needs to build, prove and measure an engine."),
    "plan": Verb("plan", "Predict size and memory of an artefact's engines, before anything is built."),
    "kernels": Verb("kernels", "Compile GPU kernels for the custom ops of an artefact."),
    "targets": Verb("targets", "List what can be built for."),
    "doctor": Verb("doctor", "Say what is installed, what is missing, and how to get it."),
}


class VerbGroup(click.Group):
    """A group that imports a verb's module when the verb is used."""

    def list_commands(self, ctx: Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the verbs in the order of the work."""
        return list(VERBS)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:  # noqa: ARG002 - click's signature
        """Import and return a verb's command, ``None`` when there is no such verb."""
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        command: Command = importlib.import_module(f"depthwire.cli.{verb.module}").command
        return command

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        """Find the verb, or say which one was probably meant."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], VERBS, n=1)
            raise UsageError(
                "cli.unknown-verb",
                f"There is no verb '{args[0]}'",
                at="depthwire",
                want="one of " + ", ".join(VERBS),
                got=args[0],
                todo=f"Did you mean 'depthwire {close[0]}'?" if close else "Try 'depthwire --help'.",
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        """List the verbs without importing them."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.summary) for name, verb in VERBS.items()])
