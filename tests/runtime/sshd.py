"""A real OpenSSH server on loopback, with keys of its own, run by whoever runs the tests."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from depthwire.runtime.remote import Device

if TYPE_CHECKING:
    from collections.abc import Iterator

FOUND = Path(__file__).resolve().parents[2] / ".cache" / "sshd" / "path"
PRIVILEGE_SEPARATION = Path("/run/sshd")  # compiled into sshd, which wants it as root
CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthorizedKeysFile {folder}/user.pub
PermitRootLogin yes
MaxStartups 100
Subsystem sftp internal-sftp
"""


@dataclass
class Server:
    """An sshd, its keys, and the ways in which connections to it break."""

    sshd: Path
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def user(self) -> str:
        return pwd.getpwuid(os.getuid()).pw_name

    @property
    def identity(self) -> Path:
        return self.folder / "user"

    @property
    def options(self) -> tuple[str, ...]:
        known = f"UserKnownHostsFile={self.folder / 'known_hosts'}"
        return (known, "GlobalKnownHostsFile=/dev/null", "ControlPath=none")

    @property
    def address(self) -> str:
        return f"{self.user}@127.0.0.1:{self.port}"

    def device(self, python: str) -> Device:
        return Device("127.0.0.1", self.user, self.port, self.identity, python, self.options)

    def start(self) -> None:
        """Start it and wait until it answers."""
        root = self.sshd.parents[2]
        environment = dict(os.environ)
        if root.name == "root":  # fetched, not the system's
            folders = sorted({str(path.parent) for path in root.glob("**/lib*.so*")})
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(folders)
            if os.getuid() == 0:  # lend it the user that an installed server has
                environment["LD_PRELOAD"] = str(next(root.glob("**/libnss_wrapper.so")))
                environment["NSS_WRAPPER_PASSWD"] = str(self.folder / "passwd")
                environment["NSS_WRAPPER_GROUP"] = "/etc/group"
        with (self.folder / "sshd.log").open("ab") as log:
            command = [str(self.sshd), "-D", "-e", "-f", str(self.folder / "config")]
            self.process = subprocess.Popen(command, env=environment, stderr=log, start_new_session=True)
        end = time.monotonic() + 10
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise AssertionError((self.folder / "sshd.log").read_text())

    def stop(self) -> None:
        """Kill it, and every connection with it; what was started through it in sessions of its own goes on."""
        if self.process is None:
            return
        serving = self._serving()
        self.process.kill()
        self.process.wait()
        self.process = None
        _kill(serving)

    def cut(self) -> None:
        """Kill the processes that serve connections: both sides lose them."""
        _kill(self._serving())

    def freeze(self) -> list[psutil.Process]:
        """Stop the processes that serve connections without ending them, as a cable that is pulled; return them."""
        serving = self._serving()
        for process in serving:
            process.suspend()
        return serving

    def _serving(self) -> list[psutil.Process]:
        assert self.process is not None
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process] if process.name().startswith("sshd") else []
        return found


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Run a server while the body runs; skips where none was fetched."""
    if not FOUND.is_file() or not Path(FOUND.read_text().strip()).is_file():
        pytest.skip("no sshd: tools/fetch_sshd.py fetches one")
    for name in ("host", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sshd = Path(FOUND.read_text().strip())
    config = CONFIG.format(port=port, folder=folder)
    # From OpenSSH 9.8 on the server is several programs, which a fetched one looks for where it would be installed.
    for name, key in (("sshd-session", "SshdSessionPath"), ("sshd-auth", "SshdAuthPath")):
        part = sshd.parents[1] / "lib" / "openssh" / name
        config += f"{key} {part}\n" if part.is_file() else ""
    (folder / "config").write_text(config)
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "passwd").write_text(
        Path("/etc/passwd").read_text() + f"sshd:x:65534:65534::{PRIVILEGE_SEPARATION}:/bin/false\n"
    )
    if os.getuid() == 0:
        PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    server = Server(sshd, folder, port)
    server.start()
    try:
        yield server
    finally:
        server.stop()
