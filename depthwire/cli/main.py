"""The entry point: the only place that prints errors and decides the exit code."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from depthwire.cli._errors import INTERRUPTED, as_error, bug, interrupted, print_error
from depthwire.cli._group import VerbGroup
from depthwire.errors import DepthwireError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM as an exception, so that temporary directories are removed on the way out."""


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="depthwire", prog_name="depthwire")
def cli() -> None:
    """Compile a trained transformer into an engine that reads its depth by attention, with proof.

    Exit codes: 0 done, 2 usage, 3 capture, 4 rewrite, 5 export or artefact, 6 engine build, 7 parity failed,
    8 device check failed, 9 built on the device but not verified, 10 device out of reach, 70 a bug of Depthwire,
    130 interrupted, 143 terminated.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    flags = args[: args.index("--")] if "--" in args else args
    as_json, no_color = "--json" in flags, "--no-color" in flags
    verbose = any(flag in flags for flag in ("-v", "-vv", "--verbose"))
    try:
        with _terminate_as_exception():
            status = cli.main(args, prog_name="depthwire", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        print_error(interrupted("Interrupted"), exit_code=INTERRUPTED, as_json=as_json, no_color=no_color)
        return INTERRUPTED
    except Terminated:
        print_error(interrupted("Terminated"), exit_code=TERMINATED, as_json=as_json, no_color=no_color)
        return TERMINATED
    except (click.ClickException, DepthwireError) as error:
        shown = as_error(error)
    except Exception as error:  # noqa: BLE001 - the last resort: whatever arrives here is a bug of ours, and is shown as one
        shown = bug(error, verbose=verbose)
    else:
        return status if isinstance(status, int) else 0
    print_error(shown, exit_code=shown.exit_code, as_json=as_json, no_color=no_color)
    return shown.exit_code


@contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """Turn SIGTERM into ``Terminated`` while the body runs (only the main thread may set handlers)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(_signal: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
