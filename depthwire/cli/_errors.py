"""Errors as text for people and as JSON for programs."""

from __future__ import annotations

import difflib
import json
import sys
import traceback

import click

from depthwire.errors import DepthwireError, InternalError, UsageError

INTERRUPTED = 130


def as_error(error: click.ClickException | DepthwireError) -> DepthwireError:
    """Return click's own complaints in our form; ours stay as they are."""
    if isinstance(error, DepthwireError):
        return error
    context = getattr(error, "ctx", None)
    at = context.command_path if context is not None else "depthwire"
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        known = sorted({opt for p in context.command.params for opt in (*p.opts, *p.secondary_opts)}) if context else []
        known = [name for name in known if name.startswith("--")]
        close = difflib.get_close_matches(error.option_name, known, n=1, cutoff=0.5)
        return UsageError(
            "cli.unknown-option",
            f"There is no option '{error.option_name}'",
            at=at,
            want="one of " + ", ".join(known),
            got=error.option_name,
            todo=f"Did you mean '{close[0]}'?" if close else f"Try '{at} --help'.",
        )
    code = "cli.bad-value" if isinstance(error, click.BadParameter) else "cli.usage"
    return UsageError(code, message, at=at, todo=f"Try '{at} --help'.")


def bug(error: Exception, *, verbose: bool) -> InternalError:
    """Return an unexpected exception as our bug; its traceback goes to the log with ``-v`` only."""
    if verbose:
        sys.stderr.write("".join(traceback.format_exception(error)))
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = last.filename.replace("\\", "/").rpartition("/")[2]
    return InternalError(
        "internal.unexpected",
        "Depthwire failed in a way it does not know: this is a bug of ours, not a mistake of yours",
        at=f"{place}:{last.lineno} in {last.name}",
        got=f"{type(error).__name__}: {error}".strip().splitlines()[0],
        todo="Run the same command with -v and report the traceback together with the output of 'depthwire doctor'.",
    )


def interrupted(how: str) -> DepthwireError:
    """Return the error shown for an interrupt."""
    return DepthwireError(
        "cli.interrupted",
        how,
        got="a signal before the end",
        todo="Run the command again; temporary files are removed.",
    )


def print_error(error: DepthwireError, *, exit_code: int, as_json: bool, no_color: bool) -> None:
    """Show an error: on stderr for people, or as the one JSON document on stdout."""
    if as_json:
        sys.stdout.write(json.dumps({**error.as_dict(), "exit_code": exit_code}, indent=2) + "\n")
        sys.stdout.flush()
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, no_color=no_color or None, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), (error.what, "bold"), (f"  [{error.code}]", "dim")))
    for label, text in error.lines():
        console.print(Text.assemble((f"  {label:>6}: ", "cyan"), text.replace("\n", "\n          ")))
