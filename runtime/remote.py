"""Drives a device bundle over ssh: copies it, runs it there, follows it, and brings back what came out.

::

    device = parse_device("nvidia@orin.local", identity=Path("~/.ssh/orin").expanduser())
    result = drive(Path("out/bundle"), device, Path("out/engine/jetson-agx-orin-64"))
    result.exit_code        # of build_and_verify.py: 0 verified, 7 parity failed, 9 built but not verified, …

The build runs detached: a connection that breaks does not end it. Every step can be asked for again and goes on where
it was, so a broken connection is made again here, and an interrupted call is resumed by the same call. The device needs
an SSH server, Python 3.10 and what the bundle itself needs; docs/remote.md is the user's page.
"""

from __future__ import annotations

import functools
import hashlib
import json
import signal
import time
import uuid
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from depthwire.errors import RemoteError
from depthwire.runtime import _remote_errors as errors
from depthwire.runtime._remote_files import MANIFEST, SCRIPT, File, Progress, download, read_bundle, upload
from depthwire.runtime._remote_ssh import Connection, Device, LostError, parse_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from depthwire.stages import Stage, Stages

__all__ = ["Device", "Patience", "RemoteResult", "cancel", "drive", "parse_device"]

T = TypeVar("T")

HOME = ".cache/depthwire"
_RESULTS = ("work/result.json", "work/*.engine", "work/timing.cache", "work/build.log", "run/device.log")
# The script gave an answer that another run would only repeat: 0 verified, 7 parity failed, 9 built, not verified.
_FINAL = (0, 7, 9)
_TAIL_LINES = 6
_RESTARTS = 3
_PYTHON = (3, 10)


@dataclass(frozen=True)
class Patience:
    """How often a broken connection is made again before we give up.

    Attributes:
        attempts: In a row, without anything having come through.
        first_seconds: Wait before the first; each next is twice as long.
        longest_seconds: Longest wait.
    """

    attempts: int = 12
    first_seconds: float = 1.0
    longest_seconds: float = 60.0

    def wait(self, attempt: int) -> float:
        """Return the seconds to wait before an attempt, counted from 1."""
        return float(min(self.first_seconds * 2 ** (attempt - 1), self.longest_seconds))


@dataclass(frozen=True)
class RemoteResult:
    """What came of a run on a device.

    Attributes:
        exit_code: Of ``build_and_verify.py``.
        host: Where it ran.
        files: Name → size and hash of what was fetched.
        out: Where it lies.
        folder: The folder on the device; ``None`` when it was removed.
        sent: Bytes of the bundle that were sent in this call.
        received: Bytes that were fetched in this call.
        reconnects: How often the connection was made again.
        resumed: Whether a run that had been started before was taken up.
        tail: The last lines that the script printed.
    """

    exit_code: int
    host: str
    files: Mapping[str, File]
    out: Path
    folder: str | None
    sent: int
    received: int
    reconnects: int
    resumed: bool
    tail: str


def default_folder(target: str, files: Mapping[str, File]) -> str:
    """Return the folder on the device for a bundle: the same for the same files, relative to the home folder."""
    named = {name: file.sha256 for name, file in sorted(files.items()) if name != MANIFEST}
    return f"{HOME}/{target}-{hashlib.sha256(json.dumps(named).encode()).hexdigest()[:12]}"


def drive(
    bundle: Path,
    device: Device,
    out: Path,
    *,
    folder: str | None = None,
    arguments: Sequence[str] = (),
    keep: bool = False,
    stages: Stages | None = None,
    patience: Patience | None = None,
) -> RemoteResult:
    """Run a bundle on a device and fetch the results.

    A KeyboardInterrupt leaves the device's side running; the same call takes it up again.

    Args:
        bundle: Directory with ``bundle.json``.
        device: Where to run it.
        out: Folder for the results.
        folder: Folder on the device; one named after the bundle's content by default.
        arguments: Further arguments of ``build_and_verify.py``.
        keep: Leave the folder on the device.
        stages: Told of the progress.
        patience: With broken connections.

    Raises:
        RemoteError: See ``_remote_errors``; the first connection is tried once, a broken one again and again.
    """
    from depthwire.stages import Stages

    files = read_bundle(bundle)
    target = str(json.loads((bundle / MANIFEST).read_text(encoding="utf-8")).get("target", "bundle"))
    root = folder if folder is not None else default_folder(target, files)
    run = _Run(bundle, files, [*arguments], patience or Patience(), stages or Stages(), Connection(device, root))
    with run.connection_step() as state:
        return run.whole(state, out, keep=keep, parents=0 if folder is not None else 1)


def cancel(
    bundle: Path,
    device: Device,
    *,
    folder: str | None = None,
    stages: Stages | None = None,
    patience: Patience | None = None,
) -> None:
    """End what runs on a device for a bundle and remove its folder there; nothing to end is no error.

    Raises:
        RemoteError: The device cannot be reached, or the script does not end.
    """
    from depthwire.stages import Stages

    files = read_bundle(bundle)
    target = str(json.loads((bundle / MANIFEST).read_text(encoding="utf-8")).get("target", "bundle"))
    root = folder if folder is not None else default_folder(target, files)
    run = _Run(bundle, files, [], patience or Patience(), stages or Stages(), Connection(device, root))
    with run.step("cancel", f"{root} on {device}"), run.connection:
        run.ask("stop")
        run.ask("finish", keep=False, parents=0 if folder is not None else 1)


@dataclass
class _Run:
    """One bundle on one device; every step can be repeated."""

    bundle: Path
    files: dict[str, File]
    arguments: list[str]
    patience: Patience
    stages: Stages
    connection: Connection
    reconnects: int = 0
    restarts: int = 0
    offset: int = 0
    signs_of_life: int = 0
    begun: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    stage: Stage | None = None

    @property
    def key(self) -> str:
        """What tells this run from others in the same folder."""
        return hashlib.sha256(json.dumps([self.files[MANIFEST].sha256, *self.arguments]).encode()).hexdigest()

    @contextmanager
    def connection_step(self) -> Iterator[dict[str, Any]]:
        """Connect, look at what there is, and stay connected while the body runs."""
        with ExitStack() as stack:
            with self.step("connect", str(self.connection.device)):
                stack.enter_context(self.connection)
                state = self._state()
            yield state

    def whole(self, state: dict[str, Any], out: Path, *, keep: bool, parents: int) -> RemoteResult:
        """Do all steps behind the first."""
        resumed = state["state"] in {"running", "ended"}
        if not resumed:
            with self.step("copy", state["root"]) as stage:
                self._again(lambda: upload(self.connection, self.bundle, self.files, self._show))
                stage.bytes = self.connection.sent
        with self.step("device", SCRIPT) as stage:
            try:
                code = self._build(state["root"], started=resumed)
            except BaseException as error:
                if not isinstance(error, Exception):
                    stage.note("the build goes on there: the same command takes it up again, with --cancel it is ended")
                raise
            stage.detail = f"{SCRIPT}: exit code {code}"
        with self.step("fetch", str(out)) as stage:
            files = self._again(lambda: download(self.connection, _RESULTS, out, self._show))
            stage.bytes = self.connection.received
        stays = keep or code not in _FINAL
        self.ask("finish", keep=stays, parents=parents)
        return RemoteResult(
            exit_code=code,
            host=str(self.connection.device),
            files=files,
            out=out,
            folder=state["root"] if stays else None,
            sent=self.connection.sent,
            received=self.connection.received,
            reconnects=self.reconnects,
            resumed=resumed,
            tail="\n".join(self.lines),
        )

    def ask(self, verb: str, **fields: object) -> list[dict[str, Any]]:
        """Return the answers to a request."""

        def once() -> list[dict[str, Any]]:
            with self.connection.request(verb, **fields) as session:
                return list(session.answers())

        return self._again(once)

    def _state(self) -> dict[str, Any]:
        state = self.ask("status")[0]
        if tuple(state["python"]) < _PYTHON:
            found = "Python " + ".".join(str(part) for part in state["python"])
            raise errors.no_python(str(self.connection.device), self.connection.device.python, found)
        if state["run"] is not None and state["run"]["key"] != self.key:
            if state["state"] == "running":
                raise errors.refused(self._where(state["root"]), "busy", "another bundle, or other options")
            state["state"] = "idle"
        return state

    def _build(self, root: str, *, started: bool) -> int:
        """Start the script unless that is done, and follow it to its exit code."""
        request: dict[str, Any] = {"verb": "follow"}
        while True:
            if not started:
                self.offset = 0
                # Asked twice because the answer was lost, it is started once.
                labels = {"key": self.key, "once": uuid.uuid4().hex, "bundle": self.files[MANIFEST].sha256}
                request = {"verb": "start", "labels": labels, "script": SCRIPT}
                request |= {"arguments": ["--work", f"{root}/work", *self.arguments]}
            end = self._again(functools.partial(self._follow, request))
            ended = end["exit"]
            if ended is not None and "code" in ended:
                return int(ended["code"])
            if ended is None and end["boot"] != (end["run"] or {}).get("boot") and self.restarts < _RESTARTS:
                self.restarts += 1
                started = False
                self._show(Progress("the device was restarted: the build is started again", note=True))
                continue
            how = "it vanished" if ended is None else f"signal {_signal(int(ended['signal']))}"
            self.ask("finish", keep=True, parents=0)
            raise errors.killed(self._where(root), how, " | ".join(self.lines))

    def _follow(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.connection.request(**request, offset=self.offset) as session:
            for answer in session.answers():
                self.signs_of_life += 1
                if answer["kind"] == "ended":
                    self._print("\n")
                    return answer
                if answer["kind"] == "log":
                    self.offset = answer["offset"]
                    self._print(answer["text"])
        raise LostError("the log ended")

    def _print(self, text: str) -> None:
        *whole, self.begun = (self.begun + text).split("\n")
        self.lines.extend(line.strip() for line in whole if line.strip())
        if self.lines:
            self._show(Progress(self.lines[-1]))

    def _again(self, work: Callable[[], T]) -> T:
        """Do what can be repeated; where the connection breaks, make it again and repeat."""
        failed = 0
        while True:
            before = self._came_through()
            try:
                self.connection.ensure()
                return work()
            except LostError as lost:
                why = str(lost)
            except RemoteError as error:
                if error.code != "remote.unreachable":
                    raise
                why = str(error.got)
            self.connection.close()
            failed = 1 if self._came_through() != before else failed + 1
            if failed > self.patience.attempts:
                raise errors.lost(str(self.connection.device), self.patience.attempts, why)
            wait = self.patience.wait(failed)
            self._show(Progress(f"the connection broke ({why}); connecting again in {wait:.0f} s", note=True))
            time.sleep(wait)
            self.reconnects += 1

    def _came_through(self) -> tuple[int, int, int]:
        return self.connection.sent, self.connection.received, self.signs_of_life

    def _where(self, root: str) -> str:
        return f"{root} on {self.connection.device}"

    @contextmanager
    def step(self, name: str, detail: str) -> Iterator[Stage]:
        """Run the body as a stage that notes and progress go to."""
        with self.stages.stage(name, detail) as stage:
            self.stage = stage
            yield stage

    def _show(self, progress: Progress) -> None:
        if self.stage is None:
            return
        if progress.note:
            self.stage.note(progress.text)
        else:
            self.stage.progress(progress.text, progress.fraction, progress.eta_seconds)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
