"""Runs the engine builder in a child process: starts it, follows it, and turns every way it can end into one value.

The other half is ``_build_worker``, which also states the protocol.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import depthwire
from depthwire.runtime._build_errors import crashed, refused
from depthwire.runtime._child import end_child, read_lines
from depthwire.runtime.memory import gigabytes, process_rss_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

WORKER_COMMAND = (sys.executable, "-m", "depthwire.runtime._build_worker")
_HEARTBEAT_SECONDS = 0.25


@dataclass(frozen=True)
class BuildRequest:
    """What the child is asked to do.

    Attributes:
        model: Absolute path of the ONNX file.
        engine: Absolute path to write the engine to.
        compute_capabilities: As ``SM86``.
        workspace_bytes: Limit of the builder's workspace, ``None`` for its default.
        optimization_level: 0 to 5, ``None`` for the builder's default.
        profile: Least, usual and greatest shape of every input whose shape is not static.
        strip_weights: Leave the weights out of the engine, to be put back where it is loaded.
        dtypes: ONNX's names of the types of values and weights, by their names: what the network is checked against.
        source: File to name in messages, where ``model`` is a copy of it that does not last.
    """

    model: str
    engine: str
    compute_capabilities: tuple[str, ...]
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    profile: dict[str, tuple[tuple[int, ...], ...]] = dataclasses.field(default_factory=dict)
    strip_weights: bool = False
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Progress:
    """Where a build stands; sent at every phase and at least every quarter of a second.

    Attributes:
        phase: The builder's own name for what it does.
        step: Steps of the phase that are done.
        steps: Steps of the phase; 0 when the builder does not say.
        elapsed_seconds: Since the child was started.
        eta_seconds: Estimated seconds to the end from the model's size, ``None`` once the estimate has run out. (The
            builder spends nearly all its time inside one step, so its steps give no usable estimate.)
        rss_bytes: Resident set of the child now.
    """

    phase: str
    step: int
    steps: int
    elapsed_seconds: float
    eta_seconds: float | None
    rss_bytes: int


@dataclass(frozen=True)
class BuildResult:
    """What the child measured: see ``depthwire.artifact.EngineInfo`` for the fields."""

    version: str
    bytes: int
    seconds: float
    peak_rss_bytes: int
    layers: dict[str, int]
    dtypes: dict[str, int]
    weights: dict[str, int]
    checked: int


def spawn(
    request: BuildRequest,
    *,
    log: Path,
    kept_log: Path,
    estimated_seconds: float,
    progress: Callable[[Progress], None] | None = None,
    command: Sequence[str] = WORKER_COMMAND,
) -> BuildResult:
    """Build one engine in a child process.

    Args:
        request: What to build.
        log: Where the child's stderr goes.
        kept_log: Where the caller keeps that file after a failure, for the error messages.
        estimated_seconds: Expected duration, for ``Progress.eta_seconds``.
        progress: Called from this thread; an exception from it cancels the build.
        command: The child's command line.

    Raises:
        BuildError: ``build.crashed``, ``build.backend-missing``, ``build.parse-failed``, ``build.dtype-mismatch``,
            ``build.turing-float32``, ``build.strip-needs-gpu``, ``build.refused`` or ``build.write-failed``.
        KeyboardInterrupt: After the child has been ended.
    """
    start = time.monotonic()
    with log.open("wb") as stderr, _child(command, stderr) as process:
        messages: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=read_lines, args=(process, messages), daemon=True).start()
        _send(process, request)
        follower = _Follower(process.pid, start, estimated_seconds, progress)
        final = follower.follow(messages)
        status = process.wait()
    if final is None:
        last = follower.last
        at = f"phase {last.phase!r}, after {last.elapsed_seconds:.1f} s, at {gigabytes(last.rss_bytes)}"
        raise crashed(status, at=f"{request.source or request.model}: {at}", log=log, kept_log=kept_log)
    if final["event"] == "error":
        raise refused(final, request, log=kept_log)
    names = ("version", "bytes", "peak_rss_bytes", "layers", "dtypes", "weights", "checked")
    fields = {name: final[name] for name in names}
    return BuildResult(seconds=time.monotonic() - start, **fields)


@contextlib.contextmanager
def _child(command: Sequence[str], stderr: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(  # noqa: S603 - our own module, run by the running interpreter
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        # The folder that holds the package: the child finds it without being installed, and no module in the user's
        # working directory (or in an artefact) can stand in for one of ours.
        cwd=Path(depthwire.__file__).resolve().parent.parent,
        # Ctrl-C reaches us alone; we then end the child.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end_child(process)


def _send(process: subprocess.Popen[bytes], request: BuildRequest) -> None:
    stdin = process.stdin
    if stdin is None:  # pragma: no cover - Popen was given a pipe
        return
    with contextlib.suppress(BrokenPipeError):  # the child died at once: its exit status tells the story
        stdin.write(json.dumps(dataclasses.asdict(request)).encode() + b"\n")
        stdin.flush()


class _Follower:
    """Reads the child's messages until the last one and keeps the latest progress."""

    def __init__(
        self, pid: int, start: float, estimated_seconds: float, progress: Callable[[Progress], None] | None
    ) -> None:
        self._pid = pid
        self._start = start
        self._estimated = estimated_seconds
        self._progress = progress
        self._steps: dict[str, int] = {}
        self.last = Progress("Starting", 0, 0, 0.0, estimated_seconds, 0)

    def follow(self, messages: queue.Queue[str | None]) -> dict[str, Any] | None:
        """Return the ``result`` or ``error`` message, ``None`` when the child ended without one."""
        final: dict[str, Any] | None = None
        while True:
            try:
                line = messages.get(timeout=_HEARTBEAT_SECONDS)
            except queue.Empty:
                self._report(self.last.phase, self.last.step)
                continue
            if line is None:
                return final
            message = json.loads(line)
            if message["event"] == "phase":
                self._steps[message["name"]] = message["steps"]
                self._report(message["name"], 0)
            elif message["event"] == "step":
                self._report(message["name"], message["step"])
            else:
                final = message

    def _report(self, phase: str, step: int) -> None:
        elapsed = time.monotonic() - self._start
        left = self._estimated - elapsed
        # 0 bytes means that the child has just ended: the last size it had is the one worth telling.
        rss = process_rss_bytes(self._pid) or self.last.rss_bytes
        self.last = Progress(phase, step, self._steps.get(phase, 0), elapsed, left if left > 0 else None, rss)
        if self._progress is not None:
            self._progress(self.last)
