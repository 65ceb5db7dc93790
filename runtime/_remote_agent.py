"""What runs on the device: one request in, answers out, over the standard streams of ``ssh``.

Nothing is installed for it: the source of this file travels ahead of the request, so it is self-contained and uses the
standard library alone. A request is one line of JSON; each answer is one line of JSON with a key ``kind``. File
contents are raw bytes; ``copy`` and ``fetch`` say what there is and then read one more line, which says what of it is
wanted. The folder that it works in::

    ROOT/.depthwire     says that the folder is ours: nothing else is ever removed or overwritten
    ROOT/bundle/        the files of the bundle; ``NAME.part`` while one is on its way
    ROOT/work/          what ``build_and_verify.py`` writes
    ROOT/run/           lock (held while the script runs), run.json, exit.json, bundle.json (whose work/ is), device.log

The script runs in a session of its own under a small supervisor, which outlives the connection and writes down how it
ended. Whether it still runs is told by the lock alone, which the kernel releases with the last process that holds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = ".depthwire"
CHUNK = 1 << 20
_POLL_SECONDS = 0.2
_BEAT_SECONDS = 5.0
_STOP_SECONDS = 10.0


class RefusedError(Exception):
    """An answer that ends the request: a reason that the other side knows, and what was found."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.found = found


def say(kind: str, **fields: object) -> None:
    """Send one answer."""
    sys.stdout.buffer.write(json.dumps({"kind": kind, **fields}).encode() + b"\n")
    sys.stdout.buffer.flush()


class Folder:
    """The folder on the device, with the paths inside it."""

    def __init__(self, root: str) -> None:
        self.root = Path(root).expanduser().resolve()

    def path(self, *parts: str) -> Path:
        """Return a path inside; a part that would leave the folder is refused."""
        whole = Path(os.path.normpath(self.root.joinpath(*parts)))
        if self.root not in whole.parents:
            raise RefusedError("outside", str(whole))
        return whole

    def exists(self) -> bool:
        """Whether the folder is there and ours."""
        return self.path(MARK).is_file()

    def make(self) -> None:
        """Make the folder, or take one that is empty or ours."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        others = sorted(path.name for path in self.root.iterdir())
        if others and MARK not in others:
            raise RefusedError("not-ours", ", ".join(others[:5]))
        self.path(MARK).write_text("Made by depthwire bundle --on, which removes it.\n", encoding="utf-8")
        for name in ("bundle", "work", "run"):
            self.path(name).mkdir(exist_ok=True)

    def remove(self, parents: int) -> None:
        """Remove what is ours, and the folder and up to ``parents`` folders above it if that leaves them empty."""
        for name in ("bundle", "work", "run"):
            shutil.rmtree(self.path(name), ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path(MARK).unlink()
            for folder in (self.root, *list(self.root.parents)[:parents]):
                folder.rmdir()

    def lock(self, name: str, patience: float = 0.0) -> int | None:
        """Take a lock; ``None`` while another process holds it. Closing the descriptor gives it back."""
        handle = os.open(self.path("run", name), os.O_RDWR | os.O_CREAT, 0o600)
        end = time.monotonic() + patience
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return handle
            if time.monotonic() >= end:
                os.close(handle)
                return None
            time.sleep(0.05)

    def read(self, name: str) -> dict[str, object] | None:
        """Return a record of the last run, ``None`` where there is none."""
        try:
            record: dict[str, object] = json.loads(self.path("run", name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record

    def write(self, name: str, record: dict[str, object]) -> None:
        """Write a record, whole or not at all."""
        part = self.path("run", name + ".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path("run", name))

    def forget(self) -> None:
        """Drop the records of the last run."""
        for name in ("run.json", "exit.json"):
            self.path("run", name).unlink(missing_ok=True)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def boot() -> str:
    """Return what tells one boot of the device from the next; nothing where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def status(folder: Folder) -> None:
    """Say what there is: nothing, a run that goes on, one that ended, or one that vanished."""
    run, ended = folder.read("run.json"), folder.read("exit.json")
    state = "idle"
    if run is not None:
        handle = folder.lock("lock")
        state = "running" if handle is None else "ended" if ended is not None else "vanished"
        if handle is not None:
            os.close(handle)
            # It may have ended between the first look and the lock.
            ended = folder.read("exit.json")
            state = "ended" if ended is not None else state
    say(
        "status",
        state=state,
        run=run,
        exit=ended,
        boot=boot(),
        python=list(sys.version_info[:3]),
        root=str(folder.root),
    )


def _displace(folder: Folder) -> int:
    """Take the copying lock; an earlier connection that still holds it is broken, and its process is ended."""
    for _ in range(20):
        handle = folder.lock("copy.lock", patience=0.25)
        if handle is not None:
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            return handle
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(folder.path("run", "copy.lock").read_text(encoding="ascii")), signal.SIGKILL)
    raise RefusedError("busy", "another copy into this folder")


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def copy(folder: Folder, files: dict[str, dict[str, object]]) -> None:
    """Say what is here of the bundle, be told what comes, and take it.

    What comes is the rest of each file, in order; a file is put in its place if its hash is right.
    """
    source = sys.stdin.buffer
    assert isinstance(source, io.BufferedReader)  # noqa: S101 - so it is by default; says so to the type checker
    folder.make()
    handle = _displace(folder)
    _inventory(folder, files)
    for name, offset in json.loads(source.readline() or b"{}").items():
        path, size = folder.path("bundle", name), int(str(files[name]["bytes"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        part, rest = _part(path), size - offset
        with part.open("ab" if offset else "wb", buffering=0) as file:
            while rest:
                # read1 hands over what has come, so that little is lost when the connection breaks
                chunk = source.read1(min(CHUNK, rest))
                if not chunk:
                    return  # the connection is broken; what has come so far stays
                rest -= len(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        found = digest(part)
        if found == files[name]["sha256"]:
            part.replace(path)
        else:
            part.unlink()
            say("bad", file=name, sha256=found)
    os.close(handle)


def _inventory(folder: Folder, files: dict[str, dict[str, object]]) -> None:
    """Say how much there is of each file that is not here whole, and how much room; remove what is no part of it."""
    base = folder.path("bundle")
    wanted = {folder.path("bundle", name): (name, entry) for name, entry in files.items()}
    kept = {*wanted, *(_part(path) for path in wanted)}
    for path in base.rglob("*"):
        if path not in kept and not path.is_dir():
            path.unlink()
    for path, (name, entry) in wanted.items():
        if path.is_file() and path.stat().st_size == entry["bytes"] and digest(path) == entry["sha256"]:
            continue
        part = _part(path)
        have = part.stat().st_size if part.is_file() else 0
        say("part", file=name, bytes=have, sha256=digest(part) if have else "")
    space = os.statvfs(base)
    say("space", bytes=space.f_bavail * space.f_frsize)


def start(folder: Folder, *, labels: dict[str, str], script: str, arguments: list[str], offset: int) -> None:
    """Run the script, unless the same request did so before, and follow it."""
    if (folder.read("run.json") or {}).get("once") != labels["once"]:
        _start(folder, labels, [sys.executable, "-u", script, *arguments])
    follow(folder, offset)


def _start(folder: Folder, labels: dict[str, str], command: list[str]) -> None:
    """Start a supervisor that outlives this connection."""
    handle = folder.lock("lock", patience=2.0)
    if handle is None:
        if (folder.read("run.json") or {}).get("once") == labels["once"]:
            return
        raise RefusedError("busy", "a script that was started meanwhile")
    if (folder.read("bundle.json") or {}).get("bundle") != labels["bundle"]:
        shutil.rmtree(folder.path("work"))  # of another bundle
        folder.path("work").mkdir()
        folder.write("bundle.json", {"bundle": labels["bundle"]})
    folder.path("work", "result.json").unlink(missing_ok=True)
    folder.forget()
    ready, done = os.pipe()
    if os.fork():
        os.close(done)
        os.close(handle)
        answer = os.read(ready, 4096).decode()  # empty when the supervisor died first
        if answer != "ok":
            raise RefusedError("not-started", answer or "the supervising process ended")
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    try:
        code = 1
        _supervise(folder, handle, done, labels, command)
        code = 0
    finally:
        os._exit(code)


def _supervise(folder: Folder, lock: int, done: int, labels: dict[str, str], command: list[str]) -> None:
    empty = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(empty, stream)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        folder.write("run.json", {**labels, "group": os.getpgrp(), "boot": boot(), "started": time.time()})
        with folder.path("run", "device.log").open("wb") as log:
            # The script inherits the lock: it is free only when both have ended.
            child = subprocess.Popen(  # noqa: S603 - the bundle's own script, without a shell
                command, cwd=folder.path("bundle"), stdin=empty, stdout=log, stderr=log, pass_fds=(lock,)
            )
    except OSError as error:
        folder.forget()
        os.write(done, str(error).encode()[:4096])
        return
    os.write(done, b"ok")
    os.close(done)
    code = child.wait()
    ended: dict[str, object] = {"code": code} if code >= 0 else {"signal": -code}
    folder.write("exit.json", {**ended, **labels, "ended": time.time()})


def follow(folder: Folder, offset: int) -> None:
    """Send the console log from an offset on, until the run has ended; a beat now and then shows that we live."""
    beat = time.monotonic()
    while True:
        handle = folder.lock("lock")
        text = b""
        with contextlib.suppress(FileNotFoundError), folder.path("run", "device.log").open("rb") as log:
            log.seek(offset)
            text = log.read(CHUNK)
        if text:
            offset += len(text)
            say("log", text=text.decode("utf-8", "replace"), offset=offset)
        elif handle is not None:
            say("ended", exit=folder.read("exit.json"), run=folder.read("run.json"), boot=boot())
            return
        elif time.monotonic() - beat > _BEAT_SECONDS:
            beat = time.monotonic()
            say("beat")
        if handle is not None:
            os.close(handle)
        if not text:
            time.sleep(_POLL_SECONDS)


def fetch(folder: Folder, patterns: list[str]) -> None:
    """Say which files match some patterns, be told which are wanted from which byte on, and send them."""
    for pattern in patterns:
        for path in sorted(folder.path(pattern).parent.glob(Path(pattern).name)):
            if path.is_file():
                name = str(path.relative_to(folder.root))
                say("file", file=name, bytes=path.stat().st_size, sha256=digest(path))
    say("listed")
    for name, offset in json.loads(sys.stdin.buffer.readline() or b"{}").items():
        with folder.path(name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(offset)
            say("bytes", file=name, bytes=size - offset)
            shutil.copyfileobj(file, sys.stdout.buffer, CHUNK)
    sys.stdout.buffer.flush()


def stop(folder: Folder) -> None:
    """End a run that goes on: first politely, then not."""
    run = folder.read("run.json")
    if not folder.exists() or run is None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        handle = folder.lock("lock", patience=0.0 if number == signal.SIGTERM else _STOP_SECONDS)
        if handle is not None:
            os.close(handle)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(str(run["group"])), number)
    handle = folder.lock("lock", patience=_STOP_SECONDS)
    if handle is None:
        raise RefusedError("busy", "the script does not end")
    os.close(handle)


def handle_request(request: dict[str, object]) -> None:
    """Do what one request asks for."""
    folder = Folder(str(request.pop("root")))
    verb = request.pop("verb")
    if verb == "finish":
        if request["keep"]:
            folder.forget()
        elif folder.exists():
            folder.remove(int(str(request["parents"])))
    else:
        verbs = {
            "status": status,
            "copy": copy,
            "start": start,
            "follow": follow,
            "fetch": fetch,
            "stop": stop,
        }
        verbs[str(verb)](folder, **request)  # type: ignore[operator]
    say("done")


def main() -> None:
    """Read the request, answer it, and turn what the system refuses into an answer too."""
    request = json.loads(sys.stdin.buffer.readline())
    sys.stdout.buffer.write(b"depthwire-agent 1\n")
    sys.stdout.buffer.flush()
    try:
        handle_request(request)
    except RefusedError as refused:
        say("refused", reason=refused.reason, found=refused.found)
    except BrokenPipeError:
        os._exit(1)  # nobody listens any more
    except OSError as error:
        reason = "disk-full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "system"
        say("refused", reason=reason, found=str(error))


if __name__ == "__main__":
    main()
