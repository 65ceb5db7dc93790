"""Stages of a run: what each took in seconds and memory, shown while it runs and kept for the report.

::

    stages = Stages(PlainReporter(sys.stderr))
    with stages.stage("export", "opset 18") as stage:
        ...
        stage.bytes = artifact_bytes
        stage.note("weights stay external")

Memory is the peak resident set *during* the stage. The kernel's high-water mark only ever grows, so it is exact for a
stage that raised it; for the others a thread samples the resident set every 50 ms.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from depthwire.errors import DepthwireError
from depthwire.runtime.memory import peak_rss_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLE_SECONDS = 0.05


@dataclass
class Stage:
    """One stage: facts that are known once it has ended, and channels to speak on while it runs.

    Attributes:
        name: ``capture``, ``rewrite``, …
        detail: What it works on, one short phrase.
        seconds: Wall time.
        peak_rss_bytes: Peak resident set during the stage, children included where they report it.
        bytes: Bytes of the stage's result (weights captured, files written), or ``None`` where that means nothing.
        ok: Whether it ended without an exception; ``None`` while it runs.
        error: Code of the error that ended it.
        notes: Findings worth a line in the report.
    """

    name: str
    detail: str = ""
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    bytes: int | None = None
    ok: bool | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    _reporter: Reporter | None = field(default=None, repr=False, compare=False)

    def note(self, text: str) -> None:
        """Keep a finding for the report, and show it."""
        self.notes.append(text)
        if self._reporter is not None:
            self._reporter.noted(self, text)

    def update(self, text: str) -> None:
        """Say what the stage is doing now."""
        self.progress(text)

    def progress(self, text: str, fraction: float | None = None, eta_seconds: float | None = None) -> None:
        """Say how far the stage is.

        Args:
            text: What it is doing now.
            fraction: Part done, 0 to 1, or ``None`` when unknown.
            eta_seconds: Expected rest in seconds, or ``None`` when unknown.
        """
        if self._reporter is not None:
            self._reporter.progressed(self, text, fraction, eta_seconds)

    def child_peak(self, peak_bytes: int) -> None:
        """Count the peak resident set of a child process that worked for this stage."""
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Return the stage as a JSON-ready mapping."""
        return {
            "name": self.name,
            "detail": self.detail,
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "bytes": self.bytes,
            "error": self.error,
            "notes": list(self.notes),
        }


class Reporter(Protocol):
    """Somewhere to show stages; ``depthwire.reporters`` has one for terminals and one for everything else."""

    def started(self, stage: Stage) -> None:
        """Show that a stage has begun."""

    def progressed(self, stage: Stage, text: str, fraction: float | None, eta_seconds: float | None) -> None:
        """Show how far it is."""

    def noted(self, stage: Stage, text: str) -> None:
        """Show a finding."""

    def ended(self, stage: Stage) -> None:
        """Show how it ended."""


class Stages:
    """The stages of one run, in order."""

    def __init__(self, reporter: Reporter | None = None) -> None:
        """Record stages; without a reporter nothing is shown."""
        self.records: list[Stage] = []
        self._reporter = reporter

    @contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[Stage]:
        """Run the body as one stage; an exception marks it failed and goes on."""
        stage = Stage(name, detail, _reporter=self._reporter)
        self.records.append(stage)
        if self._reporter is not None:
            self._reporter.started(stage)
        sampler = _PeakSampler()
        began = time.perf_counter()
        try:
            with sampler:
                yield stage
            stage.ok = True
        except BaseException as error:
            stage.ok = False
            stage.error = error.code if isinstance(error, DepthwireError) else type(error).__name__
            raise
        finally:
            stage.seconds = time.perf_counter() - began
            stage.child_peak(sampler.peak_bytes)
            if self._reporter is not None:
                self._reporter.ended(stage)

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.records)

    @property
    def peak_rss_bytes(self) -> int:
        """Highest peak of any stage, 0 when there is none."""
        return max((stage.peak_rss_bytes for stage in self.records), default=0)

    def as_list(self) -> list[dict[str, Any]]:
        """Return the stages as JSON-ready mappings."""
        return [stage.as_dict() for stage in self.records]


class _PeakSampler:
    """Peak resident set of this process between entry and exit, in bytes."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="depthwire-rss", daemon=True)

    def __enter__(self) -> None:
        self._mark_before = peak_rss_bytes()
        self._look()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        mark = peak_rss_bytes()
        if mark > self._mark_before:
            self.peak_bytes = mark

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, int(self._process.memory_info().rss))

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._look()
