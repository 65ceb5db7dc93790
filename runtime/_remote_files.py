"""Files to and from a device: only what is missing or differs, from the byte where it broke off, hashes checked."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from depthwire._hash import sha256_file
from depthwire.runtime import _remote_errors as errors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from depthwire.errors import RemoteError
    from depthwire.runtime._remote_ssh import Connection, Session

MANIFEST = "bundle.json"
SCRIPT = "build_and_verify.py"
_CHUNK = 256 << 10
_MARGIN = 64 << 20  # records, logs and what else the device writes meanwhile


@dataclass(frozen=True)
class File:
    """Size and hash of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Progress:
    """Where work on the device stands.

    Attributes:
        text: What is being done now.
        fraction: Part done, 0 to 1, ``None`` when unknown.
        eta_seconds: Expected rest, ``None`` when unknown.
        note: Worth a line of its own: a broken connection, a build that was started again.
    """

    text: str
    fraction: float | None = None
    eta_seconds: float | None = None
    note: bool = False


def read_bundle(bundle: Path) -> dict[str, File]:
    """Return the files of a bundle, its manifest included, after a look at their names and sizes.

    Hashes are checked where they matter: on the device, once everything has arrived.

    Raises:
        RemoteError: ``remote.bad-bundle``.
    """
    manifest = bundle / MANIFEST
    try:
        listed: dict[str, dict[str, Any]] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        files = {name: File(int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad(manifest, f"a manifest that cannot be read: {error}") from error
    for name, file in files.items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or not name or name.endswith(".part"):
            raise _bad(manifest, f"the file name {name!r}")
        path = bundle / name
        if not path.is_file():
            raise _bad(path, "no such file")
        if path.stat().st_size != file.bytes:
            raise _bad(path, f"{path.stat().st_size} bytes in place of {file.bytes}")
    if SCRIPT not in files:
        raise _bad(manifest, f"no {SCRIPT} in it")
    files[MANIFEST] = File(manifest.stat().st_size, sha256_file(manifest))
    return files


def _bad(path: Path, found: str) -> RemoteError:
    return errors.refused(str(path), "bad-bundle", found)


def upload(connection: Connection, bundle: Path, files: Mapping[str, File], show: Callable[[Progress], None]) -> None:
    """Bring the device's copy of the bundle up to date.

    Raises:
        LostError: The connection broke; call again.
        RemoteError: ``remote.disk-full``, ``remote.not-ours``, ``remote.bad-bundle``.
    """
    show(Progress("comparing with what is there"))
    entries = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in files.items()}
    offsets: dict[str, int] = {}
    with connection.request("copy", files=entries) as session:
        for answer in session.answers(until="space"):
            if answer["kind"] == "part":
                name, have = str(answer["file"]), int(answer["bytes"])
                same = 0 < have <= files[name].bytes and _head(bundle / name, have) == answer["sha256"]
                offsets[name] = have if same else 0
            elif answer["kind"] == "space":
                space = int(answer["bytes"])
        total = sum(files[name].bytes - offset for name, offset in offsets.items())
        if offsets and space < total + _MARGIN:
            found = f"{space / 1e6:,.0f} MB free, {(total + _MARGIN) / 1e6:,.0f} MB needed for the bundle alone"
            raise errors.refused(f"{connection.root} on {connection.device}", "disk-full", found)
        session.tell(offsets)
        _pour(session, bundle, offsets, _Meter("copying", total, show))
        session.end_input()
        bad = {str(answer["file"]): str(answer["sha256"]) for answer in session.answers() if answer["kind"] == "bad"}
    for name, digest in bad.items():
        # A part that was there may have changed while the rest came; a file that came whole was wrong here already.
        if not offsets[name]:
            raise _bad(bundle / name, f"sha256 {digest[:16]}… as it arrived")
    if bad:
        upload(connection, bundle, files, show)


def _head(path: Path, size: int) -> str:
    """Return the SHA-256 of the first ``size`` bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (chunk := file.read(min(8 << 20, size))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def _pour(session: Session, bundle: Path, offsets: Mapping[str, int], meter: _Meter) -> None:
    for name, offset in offsets.items():
        with (bundle / name).open("rb") as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK):
                if not session.write(chunk):
                    return
                meter.add(len(chunk), name)


def download(
    connection: Connection, patterns: Sequence[str], out: Path, show: Callable[[Progress], None]
) -> dict[str, File]:
    """Fetch files from the device into a folder, each whole or not at all.

    Args:
        connection: The connection.
        patterns: Paths below the folder on the device, with ``*`` in the last part; what is not there is left out.
        out: Folder to write into.
        show: Called as the work goes on.

    Returns:
        Name in ``out`` → size and hash.

    Raises:
        LostError: The connection broke; call again.
        RemoteError: ``remote.system``: a file changes while it is fetched.
    """
    out.mkdir(parents=True, exist_ok=True)
    offsets: dict[str, int] = {}
    with connection.request("fetch", patterns=list(patterns)) as session:
        listed = [answer for answer in session.answers(until="listed") if answer["kind"] == "file"]
        there = {str(answer["file"]): File(answer["bytes"], answer["sha256"]) for answer in listed}
        for name, file in there.items():
            path = out / PurePosixPath(name).name
            if not (path.is_file() and path.stat().st_size == file.bytes and sha256_file(path) == file.sha256):
                part = _part(path)
                have = part.stat().st_size if part.is_file() else 0
                offsets[name] = have if have < file.bytes else 0
        meter = _Meter("fetching", sum(there[name].bytes - offset for name, offset in offsets.items()), show)
        session.tell(offsets)
        session.end_input()
        for name, offset in offsets.items():
            _take(session, _part(out / PurePosixPath(name).name), offset, meter)
        list(session.answers())
    again = False
    for name, offset in offsets.items():
        path = out / PurePosixPath(name).name
        if sha256_file(_part(path)) == there[name].sha256:
            _part(path).replace(path)
            continue
        _part(path).unlink()
        if not offset:
            raise errors.refused(f"{name} on {connection.device}", "system", "a file that changes while it is fetched")
        again = True  # the part was of something else: once more, from its start
    if again:
        return download(connection, patterns, out, show)
    return {PurePosixPath(name).name: file for name, file in there.items()}


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _take(session: Session, part: Path, offset: int, meter: _Meter) -> None:
    rest = int(next(iter(session.answers()))["bytes"])
    with part.open("r+b" if offset else "wb") as sink:
        sink.seek(offset)
        while rest:
            data = session.read(min(_CHUNK, rest))
            sink.write(data)
            rest -= len(data)
            meter.add(len(data), part.name[1 : -len(".part")])


class _Meter:
    """Bytes done, and how long the rest will take at the speed so far."""

    def __init__(self, verb: str, total: int, show: Callable[[Progress], None]) -> None:
        self._verb, self._total, self._show = verb, total, show
        self._began = time.monotonic()
        self.done = 0

    def add(self, count: int, name: str) -> None:
        self.done += count
        rest = (time.monotonic() - self._began) * (self._total - self.done) / self.done if self.done else None
        fraction = min(self.done / self._total, 1.0) if self._total else 1.0
        self._show(Progress(f"{self._verb} {name}", fraction, None if rest is None else max(rest, 0.0)))
