"""One shared connection to a device, through the OpenSSH client alone.

``ssh`` is started once as the master of a private control socket; every request is a session over it, so the device
authenticates us once. Host keys, algorithms, jump hosts and aliases are the user's own configuration: nothing here
weakens it. Whatever is asked of the device goes in on standard input; its shell sees one fixed command line with one
quoted word, the interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from depthwire.errors import RemoteError, UsageError
from depthwire.runtime import _remote_errors as errors
from depthwire.runtime._child import end_child

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

_ADDRESS = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.+\\-]*\$?)@)?"
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\]|(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]*))"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_BOOTSTRAP = 'import sys;s=sys.stdin.buffer;exec(compile(s.read(int(s.readline())),"depthwire-agent","exec"))'
_MARK = b"depthwire-agent 1\n"
_NOISE = 200  # lines that a start-up file of the login shell may print before our first
# Ours first: ssh takes the first value that it is given.
_FIXED = (
    "BatchMode=yes", "LogLevel=ERROR", "RemoteCommand=none", "ClearAllForwardings=yes", "ForwardX11=no",
    "PermitLocalCommand=no", "RequestTTY=no",
)  # fmt: skip
_DEFAULTS = ("ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=3", "ForwardAgent=no")
_SOCKET_SECONDS = 0.02


@dataclass(frozen=True)
class Device:
    """Where a device is and how to log in.

    Attributes:
        host: Name, alias of the user's configuration, or address.
        user: ``None`` for what the configuration says.
        port: ``None`` for what the configuration says.
        identity: Private key; ``None`` for the configuration's and the agent's keys.
        python: Interpreter on the device.
        ssh_options: ``KEY=VALUE`` as for ``ssh -o``.
    """

    host: str
    user: str | None = None
    port: int | None = None
    identity: Path | None = None
    python: str = "python3"
    ssh_options: tuple[str, ...] = ()

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host and self.port else self.host
        return (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")


def parse_device(
    address: str, *, identity: Path | None = None, python: str = "python3", ssh_options: Sequence[str] = ()
) -> Device:
    """Read ``[user@]host[:port]``.

    Raises:
        UsageError: ``remote.address``; ``remote.identity`` for a key that is not there; ``remote.ssh-option``.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise errors.address(address, "an address that starts with '-'" if address.startswith("-") else address)
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 0 < port < 1 << 16:
        raise errors.address(address, f"port {port}")
    if identity is not None and not identity.is_file():
        raise UsageError(
            "remote.identity",
            "The key is not there",
            at=f"--identity {identity}",
            want="the file of a private key",
            got="no such file",
            todo="Make one with 'ssh-keygen -t ed25519' and install it with 'ssh-copy-id'.",
        )
    for option in ssh_options:
        if not re.fullmatch(r"[A-Za-z0-9]+=[^\r\n]+", option):
            raise UsageError(
                "remote.ssh-option",
                "This is not an option of ssh",
                at=f"--ssh-option {option!r}",
                want="KEY=VALUE as for 'ssh -o'",
                got=option,
                todo="See 'man ssh_config' for the keys.",
            )
    return Device(match["six"] or match["host"], match["user"], port, identity, python, tuple(ssh_options))


class LostError(Exception):
    """The connection broke; everything asked of the device can be asked again."""


class Connection:
    """The master connection, and sessions over it. A context manager: leaving it ends the master.

    Attributes:
        device: Where it leads.
        root: Folder on the device that every request is about; relative to the home folder.
        sent: Bytes of files sent so far.
        received: Bytes of files received so far.
    """

    def __init__(self, device: Device, root: str) -> None:
        self.device = device
        self.root = root
        self.sent = 0
        self.received = 0
        self._folder: Path | None = None
        self._master: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Connection:  # noqa: PYI034 - typing.Self is Python 3.11's
        """Open the connection.

        Raises:
            RemoteError: ``remote.unreachable``, ``remote.auth``, ``remote.host-key`` or ``remote.no-ssh``.
        """
        windows = os.name == "nt"
        if windows or shutil.which("ssh") is None:
            raise RemoteError(
                "remote.no-ssh",
                "There is no OpenSSH client here that can share a connection",
                at="PATH",
                want="ssh of OpenSSH, on Linux or macOS",
                got="Windows, whose ssh has no control sockets" if windows else "no such command",
                todo="Install it: on Debian and Ubuntu 'apt install openssh-client'; on Windows use WSL.",
            )
        try:
            self.ensure()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def master(self) -> int:
        """Process id of the master."""
        return self._master.pid if self._master is not None else -1

    def ensure(self) -> None:
        """Make the connection, unless there is one."""
        if self._master is not None and self._master.poll() is None:
            return
        self.close()
        # A socket's path may have little more than 100 characters: long temporary folders are of no use.
        base = None if len(tempfile.gettempdir()) < 48 else "/tmp"  # noqa: S108 - mkdtemp makes a private folder
        self._folder = Path(tempfile.mkdtemp(prefix="depthwire-", dir=base))
        device = self.device
        command = ["ssh", "-M", "-N", "-T", "-S", str(self._socket), "-o", "ControlPersist=no"]
        options = [*_FIXED, *device.ssh_options, *_DEFAULTS]
        if device.identity is not None:
            command += ["-i", str(device.identity)]
            options.append("IdentitiesOnly=yes")
        command += [part for option in options for part in ("-o", option)]
        command += ["-l", device.user] if device.user else []
        command += ["-p", str(device.port)] if device.port else []
        said = self._folder / "stderr"
        with said.open("wb") as stderr:
            self._master = _spawn([*command, "--", device.host], stdin=subprocess.DEVNULL, stderr=stderr)
        while not self._socket.exists():
            if self._master.poll() is not None:
                raise errors.connection(str(device), said.read_text(encoding="utf-8", errors="replace"))
            time.sleep(_SOCKET_SECONDS)

    @property
    def _socket(self) -> Path:
        if self._folder is None:
            raise LostError("there is no connection")
        return self._folder / "s"

    def close(self) -> None:
        """End the master, and with it every session."""
        if self._master is not None:
            end_child(self._master)
            self._master = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @contextlib.contextmanager
    def request(self, verb: str, **fields: object) -> Iterator[Session]:
        """Ask the device's side for something; the body reads the answers.

        Raises:
            LostError: The connection broke before the answers were complete.
            RemoteError: ``remote.no-python``, or what the device's side refuses.
        """
        # Without the master ssh would connect by itself: a proxy that fails prevents that.
        command = ["ssh", "-S", str(self._socket), "-o", "ControlMaster=no", "-o", "ProxyCommand=false"]
        command += [part for option in _FIXED for part in ("-o", option)]
        # Neither the environment nor site-packages: ours needs none, and starts in half the time. The script gets both.
        line = f"{shlex.quote(self.device.python)} -IS -c {shlex.quote(_BOOTSTRAP)}"
        with tempfile.TemporaryFile() as stderr:
            process = _spawn(
                [*command, "--", self.device.host, line], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
            )
            try:
                yield Session(self, process, stderr).begin({"verb": verb, "root": self.root, **fields})
            finally:
                end_child(process)


class Session:
    """One request under way."""

    def __init__(self, connection: Connection, process: subprocess.Popen[bytes], stderr: BinaryIO) -> None:
        self._connection = connection
        self._device = connection.device
        self._process = process
        self._stderr = stderr
        assert process.stdin is not None  # noqa: S101 - Popen was given pipes
        assert process.stdout is not None  # noqa: S101
        self._in: BinaryIO = process.stdin  # type: ignore[assignment]
        self._out: BinaryIO = process.stdout  # type: ignore[assignment]

    def begin(self, request: dict[str, object]) -> Session:
        """Send our side's program and the request, and wait until it answers at all."""
        code = Path(__file__).with_name("_remote_agent.py").read_bytes()
        with contextlib.suppress(BrokenPipeError):  # the exit status tells the story
            self._in.write(b"%d\n" % len(code) + code + json.dumps(request).encode() + b"\n")
            self._in.flush()
        for _ in range(_NOISE):
            line = self._out.readline()
            if line == _MARK:
                return self
            if not line:
                break
        else:
            self._process.terminate()
        status = self._process.wait()
        said = self._said()
        if status == 255 or status < 0:
            raise LostError(said or f"ssh ended with status {status}")
        raise errors.no_python(str(self._device), self._device.python, said or f"exit status {status}")

    def tell(self, document: object) -> None:
        """Send one more line of JSON."""
        with contextlib.suppress(BrokenPipeError):  # the answers say why
            self._in.write(json.dumps(document).encode() + b"\n")
            self._in.flush()

    def write(self, data: bytes) -> bool:
        """Send raw bytes of a file; false once the other side takes no more (the answers say why)."""
        try:
            self._in.write(data)
        except BrokenPipeError:
            return False
        self._connection.sent += len(data)
        return True

    def end_input(self) -> None:
        """Say that no more bytes come."""
        with contextlib.suppress(BrokenPipeError):
            self._in.close()

    def answers(self, *, until: str = "done") -> Iterator[dict[str, Any]]:
        """Yield the answers up to the last, or up to and with the first of a kind.

        Raises:
            LostError: They end before the last one.
            RemoteError: The device's side refused.
        """
        while line := self._out.readline():
            try:
                answer: dict[str, Any] = json.loads(line)
            except ValueError:
                break  # cut off
            if answer["kind"] == "refused":
                raise errors.refused(str(self._device), answer["reason"], answer["found"])
            if answer["kind"] == "done":
                return
            yield answer
            if answer["kind"] == until:
                return
        status = self._process.wait()
        said = self._said()
        if status in (0, 1) and "Traceback" in said:
            raise errors.refused(str(self._device), "system", said.splitlines()[-1])
        raise LostError(said or f"the session ended with status {status}")

    def read(self, size: int) -> bytes:
        """Return up to ``size`` raw bytes.

        Raises:
            LostError: There are none left.
        """
        data = self._out.read(size)
        if not data:
            raise LostError(self._said() or "the session ended")
        self._connection.received += len(data)
        return data

    def _said(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode("utf-8", "replace").strip()


def _spawn(command: list[str], **streams: Any) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches us alone, and there is no terminal that ssh could ask on.
    return subprocess.Popen(command, start_new_session=True, **streams)  # noqa: S603 - arguments, no shell
