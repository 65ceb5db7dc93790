"""The script as shipped, on a Python without torch and Depthwire: to the end of the build, and into every refusal."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from depthwire._hash import sha256_file
from tests.runtime.deploy.device import ORIN, command, edit, files_of, make_system, run
from tests.signals import skip_if_ignored

if TYPE_CHECKING:
    from pathlib import Path

WORK = {".lock", "build.log", "result.json", "state.json", "timing.cache", "model.engine", "model.c25.engine"}


@pytest.fixture(scope="module")
def built(device_python: Path, rtx_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished run; not to be changed."""
    work = tmp_path_factory.mktemp("work") / "work"
    assert run(device_python, rtx_bundle, "--work", str(work)).code == 9
    return work


@pytest.mark.parametrize("module", ["torch", "depthwire", "onnx", "onnxruntime", "tensorrt"])
def test_the_device_has_nothing_of_ours(device_python: Path, module: str) -> None:
    statement = [str(device_python), "-c", f"import {module}"]
    done = subprocess.run(statement, capture_output=True, text=True, check=False, cwd="/")
    assert "ModuleNotFoundError" in done.stderr


def test_builds_every_engine_and_says_that_nothing_was_verified(
    device_python: Path, rtx_bundle: Path, built: Path
) -> None:
    result = json.loads((built / "result.json").read_text(encoding="utf-8"))
    assert (result["exit_code"], result["verdict"]) == (9, "not-verified")
    assert "no GPU" in result["reason"]
    assert result["bundle_sha256"] == sha256_file(rtx_bundle / "bundle.json")
    assert (result["comparisons"], result["latency"]) == ([], [])
    assert [build["engine"] for build in result["builds"]] == ["model.engine", "model.c25.engine"]
    for build in result["builds"]:
        engine = built / build["engine"]
        assert (engine.stat().st_size, sha256_file(engine)) == (build["bytes"], build["sha256"])
        assert build["peak_rss_bytes"] > 100e6
        assert 0 < build["lowest_available"] <= build["available_before"]
        assert build["dtypes"]["FLOAT"] > 0
    environment = result["environment"]
    assert environment["tensorrt"].startswith("1.")
    assert environment["gpu"] is None
    assert files_of(built) == WORK
    log = (built / "build.log").read_text(encoding="utf-8")
    assert "[INFO]" in log
    assert "model.c25.engine: building" in log
    # A second run builds nothing: the engines are there and unchanged.
    again = run(device_python, rtx_bundle, "--work", str(built))
    assert again.code == 9
    assert [build["resumed"] for build in again.result["builds"]] == [True, True]
    assert again.check("free memory")["want"] == "nothing: every engine is built"


def test_a_dry_run_only_checks(device_python: Path, rtx_bundle: Path, tmp_path: Path) -> None:
    ran = run(device_python, rtx_bundle, "--work", str(tmp_path / "work"), "--dry-run")
    assert (ran.code, ran.result["verdict"], ran.failed) == (0, "checked", [])
    assert ran.result["builds"] == []
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_was_killed_goes_on_where_it_was(
    device_python: Path, rtx_bundle: Path, built: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    process = subprocess.Popen(
        command(device_python, rtx_bundle, "--work", str(work)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "model.c25.engine: building" in line and "from" not in line:
            os.killpg(process.pid, signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert files_of(work) >= {"model.engine", "state.json", "timing.cache"}
    assert not (work / "model.c25.engine").exists()
    assert not (work / "result.json").exists()
    (work / ".model.c25.engine.partial").write_bytes(b"half an engine")

    ran = run(device_python, rtx_bundle, "--work", str(work))
    assert ran.code == 9
    assert [build["resumed"] for build in ran.result["builds"]] == [True, False]
    assert ran.result["builds"][1]["timing_cache"]["loaded_bytes"] > 0
    assert files_of(work) == WORK
    for name in ("model.engine", "model.c25.engine"):
        assert (work / name).stat().st_size == (built / name).stat().st_size


def test_an_engine_that_was_changed_is_built_again(
    device_python: Path, rtx_bundle: Path, built: Path, tmp_path: Path
) -> None:
    work = shutil.copytree(built, tmp_path / "work")
    engine = work / "model.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    (work / "state.json").with_name("left-over.txt").write_text("mine", encoding="utf-8")
    ran = run(device_python, rtx_bundle, "--work", str(work))
    assert [build["resumed"] for build in ran.result["builds"]] == [False, True]
    assert sha256_file(engine) == ran.result["builds"][0]["sha256"]
    assert (work / "left-over.txt").exists()


def test_a_damaged_state_is_no_state(device_python: Path, rtx_bundle: Path, built: Path, tmp_path: Path) -> None:
    work = shutil.copytree(built, tmp_path / "work")
    (work / "state.json").write_text('{"schema_version": 1, "engi', encoding="utf-8")
    (work / "timing.cache").write_bytes(b"no cache")
    system = make_system(tmp_path / "system", available=100 << 20)
    ran = run(device_python, rtx_bundle, "--work", str(work), "--sysroot", str(system))
    assert (ran.code, ran.failed) == (8, ["free memory"])


def test_a_changed_weight_is_found(device_python: Path, bundle: Path) -> None:
    weights = bundle / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    ran = run(device_python, bundle)
    assert (ran.code, ran.failed) == (8, ["hashes"])
    assert "model.onnx.data" in ran.check("hashes")["got"]
    assert not (bundle / "work" / "model.engine").exists()
    assert json.loads((bundle / "work" / "result.json").read_text(encoding="utf-8"))["verdict"] == "check-failed"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"models__0__file": "../model.onnx"}, "outside the bundle: '../model.onnx'"),
        ({"models__0__goldens": "/etc"}, "outside the bundle: '/etc'"),
        ({"models__0__engine": "../../model.engine"}, "outside the work directory"),
        ({"models__0__plugins": "/opt/evil.py"}, "outside the bundle"),
        ({"models__0__plugins": "plugins/unlisted.py"}, "without its hash"),
        ({"schema_version": 2}, "schema version 2"),
        ({"latency": {"warmup_runs": 1, "warmup_seconds": 1, "runs": "many"}}, "latency.runs: int was expected"),
        ({"models": []}, "names no model"),
    ],
)
def test_a_bundle_that_was_tampered_with(
    device_python: Path, bundle: Path, fields: dict[str, object], words: str
) -> None:
    edit(bundle, **fields)
    ran = run(device_python, bundle)
    assert ran.code == 8
    assert words in ran.result["reason"]
    assert not (bundle / "work").exists()


def test_a_link_that_leaves_the_bundle(device_python: Path, bundle: Path, tmp_path: Path) -> None:
    (bundle / "model.onnx.data").rename(tmp_path / "weights")
    (bundle / "model.onnx.data").symlink_to(tmp_path / "weights")
    ran = run(device_python, bundle)
    assert ran.code == 8
    assert "outside the bundle: 'model.onnx.data'" in ran.result["reason"]


def test_another_tensorrt(device_python: Path, bundle: Path) -> None:
    edit(bundle, platform__tensorrt_at_least="1.99", platform__tensorrt_below="2")
    ran = run(device_python, bundle)
    assert (ran.code, ran.failed) == (8, ["TensorRT"])
    assert "1.99 or later" in ran.check("TensorRT")["want"]
    edit(bundle, platform__package="tensorrt", platform__tensorrt_at_least="10.3", platform__tensorrt_below="11")
    ran = run(device_python, bundle)
    assert ran.code == 8
    assert ran.failed == ["TensorRT", "GPU"]
    assert "no module tensorrt" in ran.check("TensorRT")["got"]


def test_too_little_memory(device_python: Path, bundle: Path, tmp_path: Path) -> None:
    system = make_system(tmp_path / "system", available=300 << 20)
    ran = run(device_python, bundle, "--sysroot", str(system))
    assert (ran.code, ran.failed) == (8, ["free memory"])
    assert "315 MB" in ran.check("free memory")["got"]
    # Swap on disk helps, compressed memory does not.
    zram = {"proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 1048576 0 5\n"}
    make_system(system, available=300 << 20, swap=1 << 30, files=zram)
    ran = run(device_python, bundle, "--sysroot", str(system), "--dry-run")
    assert (ran.code, ran.failed) == (8, ["free memory"])
    assert "zram" in ran.check("free memory")["got"]
    (system / "proc" / "swaps").unlink()
    assert run(device_python, bundle, "--sysroot", str(system), "--dry-run").code == 0


def test_a_build_is_ended_before_the_memory_is_gone(device_python: Path, bundle: Path, tmp_path: Path) -> None:
    system, work = make_system(tmp_path / "system"), bundle / "work"
    process = subprocess.Popen(
        command(device_python, bundle, "--sysroot", str(system)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "model.engine: parsing" in line:
            make_system(system, available=50 << 20)
            break
    out, _ = process.communicate(timeout=60)
    result = json.loads(out)
    assert (process.returncode, result["verdict"]) == (6, "build-failed")
    assert "fell to 52 MB, below the floor of 200 MB" in result["reason"]
    assert files_of(work, ["timing.cache"]) == {".lock", "build.log", "result.json"}


def test_a_disk_that_is_full(device_python: Path, bundle: Path) -> None:
    def small_files_only() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes then fail as they do on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    ran = run(device_python, bundle, preexec_fn=small_files_only)
    assert (ran.code, ran.result["verdict"]) == (6, "build-failed")
    assert "a file cannot be read or written" in ran.result["reason"]
    assert files_of(bundle / "work") == {".lock", "build.log", "result.json"}
    edit(bundle, builder__disk_bytes=1 << 60)
    assert run(device_python, bundle, "--dry-run").failed == ["free disk"]


def test_a_work_directory_that_cannot_be_used(device_python: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    ran = run(device_python, bundle, "--work", str(tmp_path / "file" / "work"))
    assert ran.code == 8
    assert "--work" in ran.result["reason"]


def test_two_runs_in_one_work_directory(device_python: Path, rtx_bundle: Path, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ran = run(device_python, rtx_bundle, "--work", str(tmp_path))
    assert (ran.code, ran.result["verdict"]) == (2, "usage")
    assert "another run" in ran.result["reason"]


def test_a_graph_that_the_builder_refuses(device_python: Path, bundle: Path) -> None:
    model = bundle / "model.onnx"
    model.write_bytes(model.read_bytes().replace(b"ScatterElements", b"ScutterElements"))
    edit(bundle, files=_entries(bundle))
    ran = run(device_python, bundle)
    assert (ran.code, ran.result["verdict"]) == (6, "build-failed")
    assert "the parser refuses the graph" in ran.result["builds"][0]["problem"]
    assert "ScutterElements" in (bundle / "work" / "build.log").read_text(encoding="utf-8")


def _entries(bundle: Path) -> dict[str, dict[str, object]]:
    raw = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["files"]
    paths = {name: bundle / name for name in raw}
    return {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in paths.items()}


def test_an_unknown_option(device_python: Path, rtx_bundle: Path) -> None:
    done = subprocess.run(
        [str(device_python), str(rtx_bundle / "build_and_verify.py"), "--fast"], capture_output=True, check=False
    )
    assert done.returncode == 2


def test_a_ctrl_c_ends_the_child_and_keeps_the_rest(device_python: Path, rtx_bundle: Path, tmp_path: Path) -> None:
    skip_if_ignored(signal.SIGINT)
    process = subprocess.Popen(
        command(device_python, rtx_bundle, "--work", str(tmp_path)), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "model.engine: building" in line:
            process.send_signal(signal.SIGINT)
            break
    began = time.monotonic()
    rest = process.stderr.read()
    assert process.wait(30) == 130
    assert time.monotonic() - began < 20
    assert "interrupted" in rest
    process.stderr.close()
    assert "model.engine" not in files_of(tmp_path)


def test_a_jetson_that_is_another(device_python: Path, bundle: Path, tmp_path: Path) -> None:
    """Board, L4T and memory, as a Jetson's own files tell them; --ignore-board goes on, and says so."""
    edit(bundle, platform__boards=["p3767-0004"], platform__l4t="36.4", platform__jetpack="6.2")
    edit(bundle, platform__memory_bytes=4_000_000_000)
    orin = make_system(tmp_path / "orin", total=64 << 30, files=ORIN)
    ran = run(device_python, bundle, "--sysroot", str(orin), "--dry-run")
    assert (ran.code, ran.failed) == (8, ["board"])
    assert "AGX Orin" in ran.check("board")["got"]
    ran = run(device_python, bundle, "--sysroot", str(orin), "--dry-run", "--ignore-board")
    assert ran.code == 0
    assert ran.check("board")["ignored"]
    edit(bundle, platform__boards=["p3701-0005"], platform__l4t="39.2", platform__memory_bytes=128_000_000_000)
    ran = run(device_python, bundle, "--sysroot", str(orin), "--dry-run")
    assert ran.failed == ["L4T", "memory of the board"]
    assert ran.check("L4T")["got"] == "36.4.3"
    edit(bundle, platform__l4t="36.4", platform__memory_bytes=64_000_000_000)
    assert run(device_python, bundle, "--sysroot", str(orin), "--dry-run").failed == []
    edit(bundle, platform__boards=[], platform__l4t=None)
    assert run(device_python, bundle, "--sysroot", str(orin), "--dry-run").failed == ["board"]


def test_power_mode_and_clocks_are_recorded(device_python: Path, rtx_bundle: Path, built: Path, tmp_path: Path) -> None:
    system = make_system(tmp_path / "system")
    tools = {
        "usr/sbin/nvpmodel": "echo NV Power Mode: MAXN; echo 0",
        "usr/bin/jetson_clocks": "echo no root >&2; exit 1",
    }
    for name, text in tools.items():
        path = system / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
    work = shutil.copytree(built, tmp_path / "work")
    ran = run(device_python, rtx_bundle, "--work", str(work), "--sysroot", str(system))
    assert ran.result["power_before"] == {"nvpmodel -q": "NV Power Mode: MAXN\n0", "jetson_clocks --show": "no root"}


def test_goldens_are_plain_arrays(rtx_bundle: Path, built: Path) -> None:
    del built
    arrays = {path.stem: np.load(path, allow_pickle=False) for path in (rtx_bundle / "goldens/model").glob("*.npy")}
    assert arrays["input.input_ids"].dtype == np.int64
    assert arrays["output.logits"].shape[:3] == (1, 2, 16)
