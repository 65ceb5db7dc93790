"""What is refused before or while a device works, over a real SSH server: one error for each."""

from __future__ import annotations

import ast
import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from depthwire.errors import DepthwireError, RemoteError, UsageError
from depthwire.runtime import _remote_agent
from depthwire.runtime.remote import cancel, parse_device
from tests.runtime.remote.cases import WEIGHTS, list_files, make_bundle, refusal, run

if TYPE_CHECKING:
    from depthwire.runtime.remote import Device
    from tests.runtime.sshd import Server

MIB = 1 << 20


def test_a_file_that_is_not_what_the_manifest_says(tmp_path: Path, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    weights = (bundle / WEIGHTS).read_bytes()
    (bundle / WEIGHTS).write_bytes(weights[::-1])
    assert WEIGHTS in str(refusal("remote.bad-bundle", lambda: run(bundle, device, there)).at)
    (bundle / WEIGHTS).write_bytes(weights[1:])
    assert "999 bytes" in str(refusal("remote.bad-bundle", lambda: run(bundle, device, there)).got)
    (bundle / WEIGHTS).unlink()
    assert refusal("remote.bad-bundle", lambda: run(bundle, device, there)).got == "no such file"
    (bundle / "bundle.json").write_text('{"files": {"../x": {"bytes": 1, "sha256": ""}}}')
    assert "../x" in str(refusal("remote.bad-bundle", lambda: run(bundle, device, there)).got)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, device: Device) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    assert "thesis.tex" in str(refusal("remote.not-ours", lambda: run(bundle, device, other)).got)
    cancel(bundle, device, folder=str(other))
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_a_disk_that_is_too_small(tmp_path: Path, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    large = bundle / "large"
    list_files(bundle)
    free = shutil.disk_usage(tmp_path).free
    with large.open("wb") as file:
        file.truncate(free)  # a hole: it takes no room here
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"]["large"] = {"bytes": free, "sha256": "0" * 64}
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    assert "MB needed" in str(refusal("remote.disk-full", lambda: run(bundle, device, there)).got)


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path, device: Device, there: Path) -> None:
    """The kernel's own device that is always full stands where the part would be written."""
    bundle = make_bundle(tmp_path / "bundle", weights=MIB)
    run(bundle, device, there, keep=True)
    (there / "bundle" / WEIGHTS).unlink()
    part = there / "bundle" / f"{WEIGHTS}.part"
    part.symlink_to("/dev/full")
    assert "No space left" in str(refusal("remote.disk-full", lambda: run(bundle, device, there)).got)
    part.unlink()
    assert run(bundle, device, there).sent == MIB


def test_connections_that_are_refused(tmp_path: Path, server: Server, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")

    def tried(code: str, **changed: object) -> DepthwireError:
        return refusal(code, lambda: run(bundle, replace(device, **changed), there))  # type: ignore[arg-type]

    stranger = server.folder / "stranger"
    assert "Permission denied" in str(tried("remote.auth", identity=stranger).got)
    empty = (f"UserKnownHostsFile={server.folder / 'none'}", *server.options[1:])
    assert "not known" in tried("remote.host-key", ssh_options=empty).what
    (server.folder / "changed").write_text(f"[127.0.0.1]:{server.port} {(server.folder / 'stranger.pub').read_text()}")
    changed = (f"UserKnownHostsFile={server.folder / 'changed'}", *server.options[1:])
    assert "has changed" in tried("remote.host-key", ssh_options=changed).what
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert "refused" in str(tried("remote.unreachable", port=closed.getsockname()[1]).got)
    assert tried("remote.unreachable", host="no-such-host.invalid").exit_code == RemoteError.exit_code
    assert "not found" in str(tried("remote.no-python", python="no-such python").got)
    assert "exit status 1" in str(tried("remote.no-python", python="false").got)
    assert not there.exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path, device: Device) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    assert "/proc/depthwire" in str(refusal("remote.system", lambda: run(bundle, device, Path("/proc/depthwire"))).got)


def test_a_machine_without_ssh(tmp_path: Path, device: Device, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    bundle = make_bundle(tmp_path / "bundle")
    refusal("remote.no-ssh", lambda: run(bundle, device, there))


def test_an_old_python_is_refused(tmp_path: Path, device: Device, there: Path) -> None:
    """An interpreter that says it is 3.8: the same one, with another version."""
    old = tmp_path / "python3.8"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} "$1" -c "import sys; sys.version_info = (3, 8, 10); $3"\n')
    old.chmod(0o755)
    bundle = make_bundle(tmp_path / "bundle")
    error = refusal("remote.no-python", lambda: run(bundle, replace(device, python=str(old)), there))
    assert error.got == "Python 3.8.10"
    ast.parse(Path(_remote_agent.__file__).read_text(), feature_version=(3, 8))  # it can say so


@pytest.mark.parametrize(
    ("address", "host", "user", "port"),
    [
        ("orin", "orin", None, None),
        ("nvidia@orin.local:2222", "orin.local", "nvidia", 2222),
        ("nvidia@192.168.55.1", "192.168.55.1", "nvidia", None),
        ("nvidia@[fe80::1%usb0]:22", "fe80::1%usb0", "nvidia", 22),
    ],
)
def test_addresses(address: str, host: str, user: str | None, port: int | None) -> None:
    device = parse_device(address)
    assert (device.host, device.user, device.port) == (host, user, port)


@pytest.mark.parametrize(
    "address",
    ["", "-oProxyCommand=touch x", "a@-b", "host name", "host;id", "$(id)", "a@b@c", "host:", "host:99999", "host:0",
     "user@ho`id`st", "fe80::1", "host\n"],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_device(address)
    assert caught.value.code == "remote.address"


def test_bad_keys_and_options_are_refused(tmp_path: Path) -> None:
    refusal("remote.identity", lambda: parse_device("orin", identity=tmp_path / "none"))
    refusal("remote.ssh-option", lambda: parse_device("orin", ssh_options=["-F/etc/passwd"]))
    refusal("remote.ssh-option", lambda: parse_device("orin", ssh_options=["Port=1\nProxyCommand=id"]))
