"""A child process that holds native code, and its parent: what the two of them share.

Lines of JSON go from the child to the parent, each with an ``event``; the log goes to stderr. stdin stays open: when it
closes, the parent is gone and the child ends. Standard library only, for a device has no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import queue

_TERMINATE_SECONDS = 5.0
_DUPLICATE_NAME = "already exists, the output tensors of this new instance will not be queryable"
_PARSING = re.compile(r"(?:Static check for parsing|Parsing) node: (.*)")


class Channel:
    """Writes messages to the parent on a private copy of stdout; what native code prints goes to the log."""

    def __init__(self) -> None:
        """Take stdout; only the child of a parent that reads it may."""
        self._file = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()  # progress may be reported from several builder threads

    def send(self, event: str, **fields: object) -> None:
        """Send one message."""
        with self._lock:
            self._file.write(json.dumps({"event": event, **fields}) + "\n")
            self._file.flush()


def end_with_parent() -> None:
    """Wait, in a thread of its own, until the parent is gone, and end the process."""
    # os.read, not sys.stdin: a buffered reader would keep its lock into the interpreter's shutdown.
    while os.read(0, 1024):
        pass
    os._exit(1)


def make_logger(trt: Any) -> Any:
    """Return a TensorRT logger that writes to stderr and keeps the errors and the name of the node being parsed.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
    """
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.node = ""

        def log(self, level: Any, message: str) -> None:
            if level == severity.VERBOSE:
                match = _PARSING.match(message)
                self.node = match[1] if match else self.node
                return
            # One such line for every node of every repeated function body: true and of no consequence.
            if _DUPLICATE_NAME in message:
                return
            if level in {severity.ERROR, severity.INTERNAL_ERROR}:
                self.errors.append(message)
            sys.stderr.write(f"[{level.name}] {message}\n")
            sys.stderr.flush()

    return Logger()


def read_lines(process: subprocess.Popen[bytes], messages: queue.Queue[str | None]) -> None:
    """Hand the child's lines on, and ``None`` behind the last; for a thread of its own."""
    # ValueError: the main thread closed the pipe while this one was reading, after a cancellation.
    with contextlib.suppress(ValueError, OSError):
        for line in process.stdout or ():
            messages.put(line.decode("utf-8"))
    messages.put(None)


def end_child(process: subprocess.Popen[bytes]) -> None:
    """End a child that may have ended already, by force if it does not listen, and close its pipes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        # A child that died before reading its request leaves the pipe broken; its exit status tells the story.
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
