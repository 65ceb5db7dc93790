"""``depthwire bundle --on``: the real bundle, the real script, a real SSH server; and how the command line ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import depthwire
from depthwire._remote import check_engines
from depthwire.api import verify_result
from depthwire.artifact import Artifact
from depthwire.cli.main import main
from depthwire.errors import RemoteError
from depthwire.runtime._remote_files import File
from depthwire.runtime.remote import RemoteResult
from tests.routed_tiny import write_routed
from tests.runtime.deploy.device import make_python
from tests.runtime.sshd import serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.runtime.sshd import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(scope="module")
def device_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter without torch and Depthwire, as on a device."""
    return make_python(tmp_path_factory.mktemp("device") / "venv")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A tiny routed decoder."""
    written = write_routed(tmp_path / "tiny", target="decomposed")
    written.manifest.source.task = "causal-lm"
    written.write_manifest()
    return written.root


def command(artifact: Path, server: Server, python: Path, there: Path, *more: str) -> list[str]:
    options = [part for option in server.options for part in ("--ssh-option", option)]
    where = ["--on", server.address, "--identity", str(server.identity), "--remote-dir", str(there), *options]
    return ["bundle", str(artifact), "--target", "rtx", *where, "--python", str(python), *more]


def test_python_does_the_same(artifact: Path, server: Server, device_python: Path, tmp_path: Path) -> None:
    info = depthwire.bundle(artifact, target="rtx")
    run = depthwire.run_bundle(
        artifact,
        info,
        on=server.address,
        identity=server.identity,
        python=str(device_python),
        ssh_options=server.options,
        remote_dir=str(tmp_path / "there"),
        skip_latency=True,
    )
    run.require_built()
    assert run.remote.exit_code == 9
    assert run.judged is not None
    assert not (tmp_path / "there").exists()


def has_gpu() -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
    return False


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_bundle_is_built_on_a_device_and_its_result_kept(
    artifact: Path, server: Server, device_python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    status = main(command(artifact, server, device_python, there, "--json"))
    found = document(capsys)
    assert status == found["device"]["exit_code"] == (0 if has_gpu() else 9), found
    assert found["result"]["verdict"] == ("verified" if has_gpu() else "not-verified")
    assert not there.exists()
    out = artifact / "engine" / "rtx" / "device"
    (built,) = found["result"]["builds"]
    assert (out / built["engine"]).stat().st_size == built["bytes"]
    assert {"result.json", "timing.cache", "build.log", "device.log", built["engine"]} <= {
        path.name for path in out.iterdir()
    }
    assert "engine/rtx/result.json" in Artifact.load(artifact).manifest.files
    judged = verify_result(artifact, out / "result.json")
    another = {built["engine"]: File(built["bytes"], "0" * 64)}
    remote = RemoteResult(9, "device", another, out, None, 0, 0, 0, resumed=False, tail="")
    with pytest.raises(RemoteError, match="not the one that the result speaks of"):
        check_engines(judged, remote)
    check_engines(judged, replace(remote, files={built["engine"]: File(built["bytes"], built["sha256"])}))


def test_an_interrupted_run_is_taken_up_by_the_same_command(
    artifact: Path, server: Server, device_python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the device builds; the bundle is made again, is the same one, and the build is not started again."""
    there = tmp_path / "there"
    words = command(artifact, server, device_python, there)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "depthwire", *words], env=environment, stderr=subprocess.PIPE, text=True
    ) as first:
        record = there / "run" / "run.json"
        end = time.monotonic() + 120
        while not record.exists() and time.monotonic() < end:
            assert first.poll() is None, first.communicate()
            time.sleep(0.02)
        first.send_signal(signal.SIGINT)
        _, said = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert "the same command takes it up again" in said
    started = json.loads(record.read_text())
    status = main([*words, "--json"])
    found = document(capsys)
    assert status == (0 if has_gpu() else 9)
    assert (found["device"]["resumed"], found["device"]["sent"]) == (True, 0)
    assert found["bundle"]["sha256"] == found["result"]["bundle_sha256"] == started["bundle"]
    assert len(list((artifact / "bundles").iterdir())) == 1


def test_a_device_that_fails_a_check_keeps_the_bundle(
    artifact: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Python without TensorRT: exit code 8, an error that says so, and nothing to copy the next time."""
    there = tmp_path / "there"
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    assert main(command(artifact, server, bare / "bin" / "python", there)) == 8
    said = capsys.readouterr()
    assert "The device fails a check  [result.not-verified]" in said.err
    assert "tensorrt_rtx" in said.err
    assert main(command(artifact, server, bare / "bin" / "python", there, "--json")) == 8
    assert document(capsys)["exit_code"] == 8
    assert (there / "bundle" / "model.onnx").is_file()
    assert main(command(artifact, server, bare / "bin" / "python", there, "--cancel")) == 0
    assert not there.exists()


def test_a_script_that_crashes(
    artifact: Path, server: Server, device_python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its interpreter ends it before it begins: an exit code that is none of its own, and no result."""
    (tmp_path / "sitecustomize.py").write_text("import os\nprint('no, thank you', flush=True)\nos._exit(3)\n")
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {device_python} "$@"\n')
    python.chmod(0o755)
    assert main(command(artifact, server, python, tmp_path / "there", "--json")) == 10
    found = document(capsys)
    assert (found["error"], found["found"]) == ("remote.script", "no, thank you")


def test_errors_end_with_their_own_exit_codes(
    artifact: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python3"
    stranger = ["--identity", str(server.folder / "stranger"), "--json"]
    assert main(command(artifact, server, python, tmp_path / "there", *stranger)) == 10
    assert document(capsys)["error"] == "remote.auth"
    assert main(command(artifact, server, python, tmp_path / "there", "--json")) == 10
    assert document(capsys)["error"] == "remote.no-python"
    assert main(["bundle", str(artifact), "--target", "rtx", "--on", "-oProxyCommand=id", "--json"]) == 2
    assert document(capsys)["error"] == "remote.address"
    assert main(["bundle", str(artifact), "--target", "rtx", "--remote-dir", "x", "--json"]) == 2
    assert document(capsys)["error"] == "remote.without-on"
