"""How stages look: a live line on a terminal, plain lines elsewhere, and a table at the end.

Sizes are decimal megabytes (1 MB = 10^6 bytes), times are wall-clock seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from depthwire.stages import Stage, Stages


def megabytes(count: int) -> str:
    """Return a number of bytes as text in decimal units: ``12.3 kB``, ``0.4 MB``, ``820 MB``."""
    value = count / 1e6
    if value < 0.1:
        return f"{count / 1e3:.1f} kB"
    return f"{value:.1f} MB" if value < 10 else f"{value:,.0f} MB"


def marks(encoding: str | None) -> tuple[str, str]:
    """Return the (ok, failed) marks that a stream can encode."""
    try:
        "✓✗".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "ok", "FAILED"
    return "✓", "✗"


def _line(stage: Stage, mark: str) -> str:
    cells = [mark, f"{stage.name:<8}", f"{stage.seconds:7.1f} s", f"{megabytes(stage.peak_rss_bytes):>9} peak"]
    if stage.bytes is not None:
        cells.append(megabytes(stage.bytes))
    if stage.detail:
        cells.append(stage.detail)
    if stage.error is not None:
        cells.append(f"[{stage.error}]")
    return "  ".join(cells)


class PlainReporter:
    """One line per finished stage and per note, for pipes and logs."""

    def __init__(self, stream: TextIO) -> None:
        """Write to a text stream."""
        self._stream = stream
        self._ok, self._failed = marks(stream.encoding)

    def started(self, stage: Stage) -> None:
        """Show nothing: a log wants one line per stage."""

    def progressed(self, stage: Stage, text: str, fraction: float | None, eta_seconds: float | None) -> None:
        """Show nothing: a log wants one line per stage."""

    def noted(self, stage: Stage, text: str) -> None:
        """Write the finding, indented below its stage."""
        self._write(f"    {stage.name}: {text}")

    def ended(self, stage: Stage) -> None:
        """Write the stage's line."""
        self._write(_line(stage, self._ok if stage.ok else self._failed))

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "ascii"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


class LiveReporter:
    """A spinner with what is going on, the part done and the rest; it leaves the plain line behind."""

    def __init__(self, console: Console) -> None:
        """Draw on a rich console that is a terminal."""
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._ok, self._failed = marks(console.encoding)

    def started(self, stage: Stage) -> None:
        """Start the live line."""
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rest]}", style="dim", markup=False),
            console=self._console,
            transient=True,
            refresh_per_second=5,  # the exporter is bound by the interpreter lock: redrawing must stay cheap
        )
        self._task = self._progress.add_task(f"{stage.name:<8}", total=None, rest=stage.detail)
        self._progress.start()

    def progressed(self, stage: Stage, text: str, fraction: float | None, eta_seconds: float | None) -> None:
        """Move the live line."""
        if self._progress is None or self._task is None:
            return
        rest = text if eta_seconds is None else f"{text}  about {eta_seconds:.0f} s left"
        self._progress.update(self._task, rest=rest)
        if fraction is not None:
            label = f"{stage.name:<8} {fraction:4.0%}"
            self._progress.update(self._task, description=label, total=1.0, completed=fraction)

    def noted(self, stage: Stage, text: str) -> None:
        """Print the finding above the live line."""
        self._console.print(f"    {stage.name}: {text}", style="dim", markup=False, highlight=False)

    def ended(self, stage: Stage) -> None:
        """Replace the live line by the stage's line."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None
        mark = self._ok if stage.ok else self._failed
        style = "green" if stage.ok else "bold red"
        self._console.print(f"[{style}]{mark}[/]", end="")
        self._console.print(_line(stage, ""), markup=False, highlight=False, soft_wrap=True)


def stage_table(stages: Stages, *, encoding: str | None = "utf-8") -> Table:
    """Return the closing table: mark, stage, seconds, MB of its result, peak resident set."""
    from rich.table import Table
    from rich.text import Text

    ok, failed = marks(encoding)
    table = Table(show_footer=len(stages.records) > 1)
    table.add_column("")
    table.add_column("stage", footer="all")
    table.add_column("seconds", justify="right", footer=f"{stages.seconds:.1f}")
    table.add_column("MB", justify="right")
    table.add_column("peak RSS MB", justify="right", footer=f"{stages.peak_rss_bytes / 1e6:,.0f}")
    table.add_column("", overflow="fold")
    for stage in stages.records:
        table.add_row(
            Text(ok, style="green") if stage.ok else Text(failed, style="bold red"),
            stage.name,
            f"{stage.seconds:.1f}",
            "" if stage.bytes is None else f"{stage.bytes / 1e6:,.1f}",
            f"{stage.peak_rss_bytes / 1e6:,.0f}",
            Text("; ".join([stage.detail, *stage.notes] if stage.detail else stage.notes)),
        )
    return table
