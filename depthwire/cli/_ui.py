"""What a verb speaks through: results on stdout, stages on stderr, one JSON document with ``--json``."""

from __future__ import annotations

import functools
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import click

from depthwire.cli._quiet import quiet_third_parties
from depthwire.reporters import LiveReporter, PlainReporter
from depthwire.stages import Stages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console, RenderableType

    from depthwire.stages import Reporter


class Ui:
    """The chosen way to speak: for people, quiet, or JSON."""

    def __init__(self, *, as_json: bool, quiet: bool, verbose: int, no_color: bool) -> None:
        """Keep the choice; nothing is written yet."""
        self.as_json = as_json
        self.silent = quiet or as_json
        self.verbose = verbose
        self._no_color = no_color

    def console(self, *, stderr: bool = False) -> Console:
        """Return a rich console on stdout or stderr; without a terminal, lines may be 120 columns wide."""
        from rich.console import Console

        stream = sys.stderr if stderr else sys.stdout
        width = None if stream.isatty() else 120
        return Console(file=stream, no_color=self._no_color or None, width=width, highlight=False)

    def stages(self) -> Stages:
        """Return a recorder of stages that shows them the chosen way."""
        return Stages(self._reporter())

    def _reporter(self) -> Reporter | None:
        if self.silent:
            return None
        if sys.stderr.isatty():
            return LiveReporter(self.console(stderr=True))
        return PlainReporter(sys.stderr)

    def result(self, document: Mapping[str, Any], *renderables: RenderableType) -> None:
        """Write the verb's result: the document with ``--json``, else what people read, nothing when quiet."""
        if self.as_json:
            sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")
        self.show(*renderables)

    def show(self, *renderables: RenderableType) -> None:
        """Write what people read; nothing when quiet or with ``--json``."""
        if self.silent:
            return
        console = self.console()
        for renderable in renderables:
            console.print(renderable, soft_wrap=isinstance(renderable, str), markup=False)


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that every verb has, and hand it a ``Ui`` as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Write one JSON document to stdout, errors included.")
    @click.option("-q", "--quiet", is_flag=True, help="Write nothing unless something fails.")
    @click.option("-v", "--verbose", count=True, help="Log what happens (-vv: everything), with tracebacks.")
    @click.option("--no-color", is_flag=True, help="Plain text; the NO_COLOR variable does the same.")
    @functools.wraps(function)
    def wrapper(*, as_json: bool, quiet: bool, verbose: int, no_color: bool, **options: Any) -> None:
        ui = Ui(as_json=as_json, quiet=quiet, verbose=verbose, no_color=no_color)
        if verbose:
            level = logging.DEBUG if verbose > 1 else logging.INFO
            logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
            function(ui, **options)
            return
        with quiet_third_parties():
            function(ui, **options)

    return wrapper
