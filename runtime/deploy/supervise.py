"""Runs the work that TensorRT does in a child process, and ends it before the machine runs out of memory.

A builder is native code that can end its process, and on a board with unified memory it can end everything else too.
So it runs in a child, whose peak is measured, and which is ended when the machine's free memory falls below a floor.
The other half is ``worker``, which also states the protocol.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from depthwire.runtime._child import end_child, read_lines
from depthwire.runtime.deploy.probe import peak_rss, read_memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_POLL_SECONDS = 0.2
WORKER = "--worker"


@dataclass
class Outcome:
    """How a child ended.

    Attributes:
        result: Its ``result`` message, ``None`` where there is none.
        problem: What went wrong, empty where nothing did.
        seconds: Wall time.
        peak_rss_bytes: Its largest resident set.
        available_before: The machine's free memory when it started.
        lowest_available: The least the machine had free while it ran.
    """

    result: dict[str, Any] | None = None
    problem: str = ""
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    available_before: int | None = None
    lowest_available: int | None = None


def run_child(
    script: Path,
    request: dict[str, Any],
    log: BinaryIO,
    *,
    system: Path,
    floor_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Have one request served by a child.

    Args:
        script: ``build_and_verify.py``, which is also the child's.
        request: See ``worker``.
        log: Where its stderr goes.
        system: Root directory of the system's files.
        floor_bytes: End the child when the machine's free memory falls below this.
        progress: Called with the name of each phase.
    """
    outcome, started = Outcome(), time.monotonic()
    environment = {**os.environ, "POLYGRAPHY_AUTOINSTALL_DEPS": "0"}
    if request["package"] == "tensorrt_rtx":
        environment["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    process = subprocess.Popen(  # noqa: S603 - this script, by the interpreter that runs it
        [sys.executable, str(script), WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
    )
    messages: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=read_lines, args=(process, messages), daemon=True).start()
    try:
        _send(process, request)
        outcome.available_before = _available(system)
        _follow(process, messages, outcome, _Watch(system, floor_bytes, progress))
        status = process.wait()
    finally:
        end_child(process)
    outcome.seconds = round(time.monotonic() - started, 3)
    if outcome.result is not None:
        outcome.peak_rss_bytes = max(outcome.peak_rss_bytes, int(outcome.result.pop("peak_rss_bytes", 0)))
    elif not outcome.problem:
        outcome.problem = _crashed(status)
    return outcome


@dataclass(frozen=True)
class _Watch:
    """What is watched while a child runs."""

    system: Path
    floor_bytes: int | None
    progress: Callable[[str], None] | None


def _follow(
    process: subprocess.Popen[bytes], messages: queue.Queue[str | None], outcome: Outcome, watch: _Watch
) -> None:
    looked = 0.0
    while True:
        if time.monotonic() - looked >= _POLL_SECONDS:
            looked = time.monotonic()
            outcome.peak_rss_bytes = max(outcome.peak_rss_bytes, peak_rss(process.pid))
            if _below_floor(outcome, watch):
                return
        try:
            line = messages.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
        if line is None:
            return
        message = json.loads(line)
        event = message.pop("event")
        if event == "phase" and watch.progress is not None:
            watch.progress(message["name"])
        elif event == "result":
            outcome.result = message
        elif event == "error":
            outcome.problem = message["message"]


def _below_floor(outcome: Outcome, watch: _Watch) -> bool:
    available = _available(watch.system)
    if available is None:
        return False
    known = outcome.lowest_available
    outcome.lowest_available = available if known is None else min(known, available)
    if watch.floor_bytes is None or available >= watch.floor_bytes:
        return False
    outcome.problem = (
        f"ended: the machine's free memory fell to {available / 1e6:.0f} MB, below the floor of "
        f"{watch.floor_bytes / 1e6:.0f} MB; the builder had taken {outcome.peak_rss_bytes / 1e6:.0f} MB"
    )
    return True


def _available(system: Path) -> int | None:
    memory = read_memory(system)
    return None if memory is None else memory.available


def _send(process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
    if process.stdin is None:  # pragma: no cover - Popen was given a pipe
        return
    with contextlib.suppress(BrokenPipeError):  # the child died at once: its exit status tells the story
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()


def _crashed(status: int) -> str:
    if status >= 0:
        return f"its process ended with exit status {status} and no message"
    name = f"signal {-status}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
    hint = ": most often the system's out-of-memory killer" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"
