"""Work on a device, over a real SSH server: whole, broken off and taken up again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from depthwire.runtime._remote_files import read_bundle
from depthwire.runtime.remote import cancel, default_folder, drive
from tests.runtime.remote.cases import QUICK, WEIGHTS, Once, make_bundle, refusal, result, run, size

if TYPE_CHECKING:
    from depthwire.runtime.remote import Device
    from tests.runtime.sshd import Server

MIB = 1 << 20
# What may be under way in pipes and socket buffers when a connection breaks.
UNDER_WAY = 16 * MIB


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


def test_a_network_that_falls_silent(tmp_path: Path, server: Server, device: Device, there: Path) -> None:
    """Nothing is closed, nothing comes: keep-alives find out, and the old connection's copy is displaced."""
    bundle = make_bundle(tmp_path / "bundle", weights=64 * MIB)
    frozen: list[psutil.Process] = []
    restless = replace(device, ssh_options=(*device.ssh_options, "ServerAliveInterval=1", "ServerAliveCountMax=1"))
    try:
        found = run(bundle, restless, there, Once("copy", lambda: frozen.extend(server.freeze()), fraction=0.5))
    finally:
        for process in frozen:
            process.kill()
    assert frozen
    assert found.reconnects >= 1
    assert found.exit_code == 9
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
