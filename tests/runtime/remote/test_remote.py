"""Work on a device, over a real SSH server: whole, broken off and taken up again, refused."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from depthwire.errors import DepthwireError, RemoteError, UsageError
from depthwire.runtime import _remote_agent
from depthwire.runtime._remote_files import read_bundle
from depthwire.runtime.remote import Patience, RemoteResult, cancel, default_folder, drive, parse_device
from depthwire.stages import Stages
from tests.runtime.remote_cases import WEIGHTS, Once, list_files, make_bundle, result, size
from tests.runtime.sshd import serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from depthwire.runtime.remote import Device
    from tests.runtime.sshd import Server

MIB = 1 << 20
# What may be under way in pipes and socket buffers when a connection breaks.
UNDER_WAY = 16 * MIB
QUICK = Patience(attempts=8, first_seconds=0.1, longest_seconds=0.5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def device(server: Server) -> Device:
    return server.device(sys.executable)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The folder on the device, with what a shell would trip over in its name."""
    return tmp_path / "it's $HOME; there"


def run(
    bundle: Path,
    device: Device,
    there: Path,
    reporter: Once | None = None,
    *,
    arguments: tuple[str, ...] = (),
    keep: bool = False,
) -> RemoteResult:
    return drive(
        bundle,
        device,
        bundle.parent / "out",
        folder=str(there),
        arguments=arguments,
        keep=keep,
        stages=Stages(reporter),
        patience=QUICK,
    )


def refusal(code: str, call: Callable[[], object]) -> DepthwireError:
    with pytest.raises(DepthwireError) as caught:
        call()
    assert caught.value.code == code
    return caught.value


def test_a_whole_round_trip(tmp_path: Path, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", weights=3 * MIB, steps=2, engine_kib=2048)
    found = run(bundle, device, there, arguments=("--skip-latency",))
    assert found.exit_code == 9
    assert found.sent == size(bundle)
    assert found.tail == "step 0\nstep 1"
    assert result(found.out) == {"starts": 1, "arguments": ["--work", str(there / "work"), "--skip-latency"]}
    assert (found.out / "model.engine").read_bytes() == bytes(range(256)) * 8192
    assert sorted(path.name for path in found.out.iterdir()) == [
        "build.log", "device.log", "model.engine", "result.json", "timing.cache",
    ]  # fmt: skip
    assert not there.exists()
    assert found.folder is None


@pytest.mark.parametrize(("code", "stays"), [(7, False), (8, True), (3, True)])
def test_the_exit_code_comes_through(tmp_path: Path, device: Device, there: Path, code: int, stays: bool) -> None:
    """Where the device gave no verdict, a second run need not copy again; it does run again."""
    bundle = make_bundle(tmp_path / "bundle", code=code)
    found = run(bundle, device, there)
    assert found.exit_code == code
    assert there.exists() == stays
    if stays:
        again = run(bundle, device, there)
        assert (again.sent, again.resumed, result(again.out)["starts"]) == (0, False, 2)


def test_keep_leaves_everything_there(tmp_path: Path, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    found = run(bundle, device, there, keep=True)
    assert found.folder == str(there)
    assert (there / "work" / "state.json").is_file()
    assert (there / "bundle" / WEIGHTS).read_bytes() == (bundle / WEIGHTS).read_bytes()


def test_the_default_folder_is_named_after_the_content(tmp_path: Path) -> None:
    files = read_bundle(make_bundle(tmp_path / "a"))
    assert default_folder("rtx", files).startswith(".cache/depthwire/rtx-")
    assert default_folder("rtx", files) == default_folder("rtx", read_bundle(make_bundle(tmp_path / "b")))
    assert default_folder("rtx", files) != default_folder("rtx", read_bundle(make_bundle(tmp_path / "c", weights=7)))


def test_the_default_folder_is_removed_with_its_parents(tmp_path: Path, device: Device) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    folder = Path.home() / default_folder("rtx", read_bundle(bundle))
    before = folder.parent.exists()
    found = drive(bundle, device, tmp_path / "out", patience=QUICK)
    assert found.exit_code == 9
    assert not folder.exists()
    assert folder.parent.exists() == before


def test_a_connection_that_breaks_while_copying(tmp_path: Path, server: Server, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", weights=64 * MIB)
    cut = Once("copy", server.cut, fraction=0.5)
    found = run(bundle, device, there, cut)
    assert found.exit_code == 9
    assert found.reconnects >= 1
    assert any("the connection broke" in note for note in cut.notes)
    assert size(bundle) <= found.sent < size(bundle) + UNDER_WAY


def test_a_client_that_is_killed_while_copying(tmp_path: Path, device: Device, there: Path) -> None:
    """The master connection of this process alone; the bytes that arrived are not sent again."""
    bundle = make_bundle(tmp_path / "bundle", weights=64 * MIB)

    def kill() -> None:
        for process in _clients():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    found = run(bundle, device, there, Once("copy", kill, fraction=0.5))
    assert found.exit_code == 9
    assert found.reconnects >= 1
    assert size(bundle) <= found.sent < size(bundle) + UNDER_WAY


def _clients() -> list[psutil.Process]:
    """The ssh processes that this process has started."""
    running = psutil.process_iter(["name", "ppid"])
    return [process for process in running if process.info["name"] == "ssh" and process.info["ppid"] == os.getpid()]


def test_a_connection_that_breaks_during_the_build(tmp_path: Path, server: Server, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", steps=10, seconds=0.2)
    cut = Once("device", server.cut, text="step 2")
    found = run(bundle, device, there, cut)
    assert cut.acted
    assert found.reconnects >= 1
    assert result(found.out)["starts"] == 1
    assert found.sent == size(bundle)
    assert found.tail.splitlines()[-2:] == ["step 8", "step 9"]


def test_a_connection_that_breaks_while_fetching(tmp_path: Path, server: Server, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", engine_kib=64 * 1024)
    found = run(bundle, device, there, Once("fetch", server.cut, fraction=0.5))
    assert found.reconnects >= 1
    assert (found.out / "model.engine").stat().st_size == 64 * MIB
    assert 64 * MIB <= found.received < 64 * MIB + UNDER_WAY


def test_a_server_that_goes_away_and_comes_back(tmp_path: Path, server: Server, device: Device, there: Path) -> None:
    """Given up on, the build goes on; the same call takes it up, without a second copy or a second build."""
    bundle = make_bundle(tmp_path / "bundle", steps=8, seconds=0.2)
    away = Once("device", server.stop, text="step 1")
    try:
        error = refusal("remote.lost", lambda: run(bundle, device, there, away))
    finally:
        server.start()
    assert "8 attempts" in str(error.got)
    found = run(bundle, device, there)
    assert (found.resumed, found.sent) == (True, 0)
    assert result(found.out)["starts"] == 1
    assert not there.exists()


def test_an_interrupt_leaves_the_build_running(tmp_path: Path, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", steps=1000, seconds=0.2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    stopped = Once("device", interrupt, text="step 1")
    with pytest.raises(KeyboardInterrupt):
        run(bundle, device, there, stopped)
    assert "the same command takes it up again" in stopped.notes[-1]
    refusal("remote.busy", lambda: run(bundle, device, there, arguments=("--skip-latency",)))
    (there / "work" / "enough").touch()
    found = run(bundle, device, there)
    assert (found.resumed, result(found.out)["starts"]) == (True, 1)


def test_cancel_ends_the_build_and_removes_the_folder(tmp_path: Path, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", steps=1000, seconds=0.2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(bundle, device, there, Once("device", interrupt, text="step 1"))
    scripts = _scripts(there)
    assert scripts
    cancel(bundle, device, folder=str(there))
    assert not there.exists()
    psutil.wait_procs(scripts, timeout=5)
    assert _scripts(there) == []
    cancel(bundle, device, folder=str(there))  # nothing to end


def _scripts(there: Path) -> list[psutil.Process]:
    """The scripts that run in a folder."""
    running = psutil.process_iter(["cmdline", "cwd"])
    return [process for process in running if str(there) in (process.info["cwd"] or "") and process.info["cmdline"]]


def test_a_script_that_is_killed(tmp_path: Path, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", steps=1, kills=1)
    error = refusal("remote.killed", lambda: run(bundle, device, there))
    assert "SIGKILL" in str(error.got)
    assert "about to be killed" in str(error.got)
    found = run(bundle, device, there)
    assert (found.sent, found.exit_code, result(found.out)["starts"]) == (0, 9, 2)


def test_a_supervisor_that_is_killed_with_its_script(tmp_path: Path, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", steps=1000, seconds=0.2)

    def kill() -> None:
        os.killpg(json.loads((there / "run" / "run.json").read_text())["group"], signal.SIGKILL)

    error = refusal("remote.killed", lambda: run(bundle, device, there, Once("device", kill, text="step 1")))
    assert "it vanished" in str(error.got)


def test_a_device_that_restarts(tmp_path: Path, server: Server, device: Device, there: Path) -> None:
    """The processes are gone, and the device says that it was booted since: the build is started again."""
    bundle = make_bundle(tmp_path / "bundle", steps=1000, seconds=0.2)

    def reboot() -> None:
        path = there / "run" / "run.json"
        record = json.loads(path.read_text())
        os.killpg(record["group"], signal.SIGKILL)
        path.write_text(json.dumps({**record, "boot": "before"}))
        (there / "work" / "enough").touch()
        server.cut()

    once = Once("device", reboot, text="step 1")
    found = run(bundle, device, there, once)
    assert any("restarted" in note for note in once.notes)
    assert (found.exit_code, result(found.out)["starts"]) == (9, 2)


def test_only_what_differs_is_sent(tmp_path: Path, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", weights=2 * MIB)
    run(bundle, device, there, keep=True)
    weights = there / "bundle" / WEIGHTS
    weights.write_bytes(b"damaged" + weights.read_bytes()[7:])
    (there / "bundle" / "left over.onnx").write_bytes(b"of another bundle")
    found = run(bundle, device, there, keep=True)
    assert found.sent == 2 * MIB
    assert weights.read_bytes() == (bundle / WEIGHTS).read_bytes()
    assert not (there / "bundle" / "left over.onnx").exists()


def test_a_part_that_is_damaged_is_not_built_upon(tmp_path: Path, device: Device, there: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", weights=2 * MIB)
    run(bundle, device, there, keep=True)
    weights = there / "bundle" / WEIGHTS
    weights.rename(weights.with_name(f"{WEIGHTS}.part"))
    os.truncate(weights.with_name(f"{WEIGHTS}.part"), MIB)
    assert run(bundle, device, there, keep=True).sent == MIB
    weights.unlink()
    weights.with_name(f"{WEIGHTS}.part").write_bytes(bytes(MIB))
    assert run(bundle, device, there).sent == 2 * MIB


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


def test_nothing_of_ours_stays_behind(tmp_path: Path, device: Device, there: Path) -> None:
    folder = Path(tempfile.gettempdir())
    before = set(folder.glob("depthwire-*"))
    run(make_bundle(tmp_path / "bundle"), device, there)
    assert set(folder.glob("depthwire-*")) <= before
    assert _clients() == []


def test_a_login_shell_that_talks(tmp_path: Path, device: Device, there: Path) -> None:
    """Lines that a start-up file prints before us are passed over."""
    talking = tmp_path / "python"
    talking.write_text(f'#!/bin/sh\necho "Welcome to the device"\nexec {sys.executable} "$@"\n')
    talking.chmod(0o755)
    assert run(make_bundle(tmp_path / "bundle"), replace(device, python=str(talking)), there).exit_code == 9
