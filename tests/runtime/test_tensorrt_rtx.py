from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import numpy as np
import onnx
import psutil
import pytest

from depthwire.artifact import MODEL, REPORT, Artifact
from depthwire.errors import BuildError, DepthwireError, UsageError
from depthwire.runtime import _build_process as process
from depthwire.runtime._onnx_graph import read_graph
from depthwire.runtime.target import load_target
from depthwire.runtime.tensorrt_rtx import ENGINE, FAILED_LOG, LOG, Progress, build
from tests.runtime import engine_models as models
from tests.signals import skip_if_ignored

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="the builder itself is under test: pip install 'depthwire[rtx]'",
)

RTX = load_target("rtx")
FOLDER = "engine/rtx"


def request_for(folder: Path, *capabilities: str) -> process.BuildRequest:
    model, engine = folder / MODEL, folder / "out.engine"
    return process.BuildRequest(str(model), str(engine), capabilities or ("SM86",))


def spawn(request: process.BuildRequest, folder: Path, *command: str) -> process.BuildResult:
    log = folder / "log.txt"
    command = command or process.WORKER_COMMAND
    return process.spawn(request, log=log, kept_log=log, estimated_seconds=1.0, command=command)


def assert_no_child_is_left() -> None:
    left = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    assert left == []


def test_an_engine_for_two_gpus_is_built_recorded_and_described(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    steps: list[Progress] = []
    info = build(models.artifact_of(tmp_path), RTX, compute_capabilities=["12.0", "sm_86"], progress=steps.append)

    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [LOG, ENGINE]
    engine = tmp_path / FOLDER / ENGINE
    assert engine.stat().st_size == info.bytes > 10_000
    assert info.compute_capabilities == ["SM86", "SM120"]
    assert info.version.split(".")[0] == "1"
    assert info.layers["MATRIX_MULTIPLY"] == 1
    assert info.layers["SOFTMAX"] == 2  # both calls of the function body
    assert set(info.dtypes) == {"float32"}
    assert info.predicted_rss_bytes is not None
    assert 100e6 < info.peak_rss_bytes < info.predicted_rss_bytes
    assert any("not loaded or run" in note for note in info.notes)

    again = Artifact.load(tmp_path)
    assert again.manifest.engines == {"rtx": info}
    assert {f"{FOLDER}/{ENGINE}", f"{FOLDER}/{LOG}"} <= set(again.manifest.files)
    report = json.loads((tmp_path / REPORT).read_text(encoding="utf-8"))
    assert report == {"stages": [], "engines": {"rtx": info.model_dump()}}

    phases = {step.phase for step in steps}
    assert {"Parsing ONNX", "Building engine", "Writing the engine"} <= phases
    assert max(step.rss_bytes for step in steps) <= info.peak_rss_bytes * 1.01
    assert [step.elapsed_seconds for step in steps] == sorted(step.elapsed_seconds for step in steps)


def test_terminal_stays_silent_and_the_log_keeps_no_duplicate_name_warnings(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    models.tiny(tmp_path)
    build(models.artifact_of(tmp_path), RTX, compute_capabilities=["86"])
    assert capfd.readouterr() == ("", "")
    log = (tmp_path / FOLDER / LOG).read_text(encoding="utf-8")
    assert "Engine generation completed" in log
    assert "already exists" not in log


def test_the_same_request_gives_the_same_bytes_and_another_gpu_others(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    engine = tmp_path / FOLDER / ENGINE
    bytes_of: list[bytes] = []
    for capability, level in (("SM86", 0), ("SM86", 5), ("SM120", 0)):
        artifact = Artifact.load(tmp_path) if bytes_of else models.artifact_of(tmp_path)
        build(artifact, RTX, compute_capabilities=[capability], optimization_level=level, workspace_bytes=1 << 26)
        bytes_of.append(engine.read_bytes())
    assert bytes_of[0] == bytes_of[1]
    assert bytes_of[0] != bytes_of[2]
    assert Artifact.load(tmp_path).manifest.engines["rtx"].compute_capabilities == ["SM120"]


def test_turing_takes_float16_and_is_told_apart_from_the_rest(tmp_path: Path) -> None:
    models.tiny(tmp_path, dtype=np.float16)
    info = build(models.artifact_of(tmp_path), RTX, compute_capabilities=["7.5"])
    assert info.dtypes["float16"] > info.dtypes.get("float32", 0)


def test_turing_with_float32_is_refused_before_and_by_the_builder(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    with pytest.raises(BuildError) as ours:
        build(models.artifact_of(tmp_path), RTX, compute_capabilities=["SM75", "SM86"])
    with pytest.raises(BuildError) as theirs:
        spawn(request_for(tmp_path, "SM75"), tmp_path)
    assert ours.value.code == theirs.value.code == "build.turing-float32"
    assert "product" in (ours.value.got or "")
    assert "FP32 GEMM" in (theirs.value.got or "")


@pytest.mark.parametrize(("in_body", "name"), [(False, "attention_0"), (True, "depthwire::Block/attention_0")])
def test_attention_nodes_are_refused_by_name(tmp_path: Path, *, in_body: bool, name: str) -> None:
    models.attention(tmp_path, in_body=in_body)
    with pytest.raises(BuildError) as caught:
        build(models.artifact_of(tmp_path), RTX)
    assert caught.value.code == "build.attention-op"
    assert name in (caught.value.at or "")
    assert "--target rtx" in (caught.value.todo or "")
    assert not (tmp_path / "engine").exists()


def test_a_custom_op_without_a_body_is_refused_by_name(tmp_path: Path) -> None:
    models.tiny(tmp_path, body=False)
    with pytest.raises(BuildError) as caught:
        build(models.artifact_of(tmp_path), RTX)
    assert caught.value.code == "build.custom-op-without-body"
    assert "read_0 (depthwire::Read), read_1 (depthwire::Read)" in (caught.value.at or "")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_builder_that_crashes_is_one_error(tmp_path: Path) -> None:
    # The real crash of the real builder. Should a later release build this, the refusal above can go.
    models.attention(tmp_path)
    with pytest.raises(BuildError) as caught:
        spawn(request_for(tmp_path), tmp_path)
    error = caught.value
    assert error.code == "build.crashed"
    assert "SIGSEGV" in error.what
    assert "phase" in (error.at or "")
    assert "Segmentation fault" in (error.got or "")
    assert not list(tmp_path.rglob("core*"))
    assert_no_child_is_left()


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_killed_builder_is_blamed_on_memory(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    suicide = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(BuildError) as caught:
        spawn(request_for(tmp_path), tmp_path, sys.executable, "-c", suicide)
    assert caught.value.code == "build.crashed"
    assert "SIGKILL" in caught.value.what
    assert "out-of-memory" in (caught.value.todo or "")


def test_a_worker_that_fails_in_python_is_a_crash_with_its_last_line(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    with pytest.raises(BuildError) as caught:
        spawn(request_for(tmp_path, "SM999"), tmp_path)
    assert caught.value.code == "build.crashed"
    assert "SM999" in (caught.value.got or "")


def test_a_missing_package_is_named_with_its_pip_line(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    blocked = "import sys; sys.modules['tensorrt_rtx'] = None; from depthwire.runtime._build_worker import main; main()"
    with pytest.raises(BuildError) as caught:
        spawn(request_for(tmp_path), tmp_path, sys.executable, "-c", blocked)
    assert caught.value.code == "build.backend-missing"
    assert caught.value.todo == "Install it: pip install 'depthwire[rtx]'"


def test_a_graph_that_the_parser_refuses_names_the_node_and_keeps_the_log(tmp_path: Path) -> None:
    models.unsupported(tmp_path)
    with pytest.raises(BuildError) as caught:
        build(models.artifact_of(tmp_path), RTX)
    error = caught.value
    assert error.code == "build.parse-failed"
    assert error.at == "scatter_sum [ScatterElements]"
    assert error.got == "Unsupported reduction type"
    log = tmp_path / FOLDER / FAILED_LOG
    assert str(log) in (error.todo or "")
    assert "Unsupported reduction type" in log.read_text(encoding="utf-8")
    assert [path.name for path in log.parent.iterdir()] == [FAILED_LOG]
    assert Artifact.load(tmp_path).manifest.engines == {}


def test_a_graph_that_the_builder_refuses_says_why(tmp_path: Path) -> None:
    k = onnx.numpy_helper.from_array(np.array([4000], np.int64), "k")
    node = onnx.helper.make_node("TopK", ["x", "k"], ["y", "i"], name="top")
    x, y = models.value("x", 1, 5000), models.value("y", 1, 4000)
    models.save(tmp_path / MODEL, [node], inputs=[x], outputs=[y], weights=[k])
    with pytest.raises(BuildError) as caught:
        build(models.artifact_of(tmp_path), RTX)
    assert caught.value.code == "build.refused"
    assert "3840" in (caught.value.got or "")


def test_a_file_that_is_not_onnx_is_refused_before_the_child(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    artifact = models.artifact_of(tmp_path)
    (tmp_path / MODEL).write_bytes(b"\xff" * 100)
    with pytest.raises(BuildError) as caught:
        build(artifact, RTX)
    assert caught.value.code == "build.parse-failed"
    assert not (tmp_path / "engine").exists()


def test_an_engine_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    request = process.BuildRequest(str(tmp_path / MODEL), str(tmp_path / "absent" / "x.engine"), ("SM86",))
    with pytest.raises(BuildError) as caught:
        spawn(request, tmp_path)
    assert caught.value.code == "build.write-failed"
    assert "absent" in (caught.value.got or "")


def test_a_model_too_large_for_memory_is_refused_unless_forced(tmp_path: Path) -> None:
    models.tiny(tmp_path, width=64)
    model = onnx.load(tmp_path / MODEL, load_external_data=False)
    model.graph.initializer[0].dims[0] = 10**13  # petabytes on paper: more than any machine of this decade
    onnx.save(model, tmp_path / MODEL)
    artifact = models.artifact_of(tmp_path)
    with pytest.raises(BuildError) as caught:
        build(artifact, RTX)
    assert caught.value.code == "build.out-of-memory"
    assert not (tmp_path / "engine").exists()
    with pytest.raises(BuildError) as forced:
        build(artifact, RTX, check_memory=False)
    assert forced.value.code != "build.out-of-memory"


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda a: build(a, RTX, compute_capabilities=["SM87"]), "target.compute-capability-unsupported"),
        (lambda a: build(a, RTX, optimization_level=6), "target.bad-build-option"),
        (lambda a: build(a, RTX, workspace_bytes=0), "target.bad-build-option"),
        (lambda a: build(a, load_target("ort-cpu")), "target.nothing-to-build"),
    ],
)
def test_a_request_that_cannot_be_meant_starts_nothing(
    tmp_path: Path, call: Callable[[Artifact], object], code: str
) -> None:
    models.tiny(tmp_path)
    with pytest.raises(UsageError) as caught:
        call(models.artifact_of(tmp_path))
    assert caught.value.code == code
    assert not (tmp_path / "engine").exists()


class StopError(Exception):
    pass


def stop_in_phase(step: Progress) -> None:
    if step.phase == "Building engine":
        raise StopError


def test_a_first_build_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    artifact = models.artifact_of(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StopError):
        build(artifact, RTX, progress=stop_in_phase)
    assert sorted(tmp_path.rglob("*")) == before
    assert_no_child_is_left()


def test_a_later_build_that_fails_or_is_cancelled_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    artifact = models.artifact_of(tmp_path)
    build(artifact, RTX, compute_capabilities=["SM86"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(StopError):
        build(artifact, RTX, compute_capabilities=["SM120"], progress=stop_in_phase)
    with pytest.raises(DepthwireError):
        build(artifact, RTX, compute_capabilities=["SM75"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    Artifact.load(tmp_path)


SCRIPT = """
import sys
from depthwire.artifact import Artifact
from depthwire.runtime.target import load_target
from depthwire.runtime.tensorrt_rtx import build
show = lambda step: print(step.phase, flush=True)
# With the options for which the graph is copied beside the weights.
build(Artifact.load(sys.argv[1]), load_target("rtx"), progress=show, max_batch=2, workspace_bytes=1 << 28)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_builder_outlives_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    skip_if_ignored(number)
    # 60 layers take the builder some seconds, all of them in the phase that is waited for here.
    models.transformer(tmp_path, layers=60, width=32, hidden=64, vocabulary=100, length=16)
    artifact = models.artifact_of(tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        for line in parent.stdout:
            if line.startswith("Determining refit engines"):
                break
        children = psutil.Process(parent.pid).children()
        assert len(children) == 1
        parent.send_signal(number)
        _, stderr = parent.communicate(timeout=30)
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert (len(gone), alive) == (1, [])
    if number is signal.SIGINT:
        assert "KeyboardInterrupt" in stderr
        assert not (tmp_path / "engine").exists()
    else:
        # Nobody could tidy up: the next build does.
        assert any((tmp_path / FOLDER).iterdir())
        assert list(tmp_path.glob(f".{MODEL}.*"))
        with pytest.raises(StopError):
            build(artifact, RTX, progress=stop_in_phase, max_batch=2)
        assert list((tmp_path / FOLDER).iterdir()) == []
    assert list(tmp_path.glob(f".{MODEL}.*")) == []


def test_prediction_covers_a_real_build_without_exaggerating(tmp_path: Path) -> None:
    models.transformer(tmp_path, layers=4, width=384, hidden=1024, vocabulary=16000)
    start = time.monotonic()
    ballast = bytearray(b"1" * (700 << 20))  # in this process, to show that it is not counted as the builder's
    info = build(models.artifact_of(tmp_path), RTX)
    assert len(ballast) == 700 << 20
    assert info.predicted_rss_bytes is not None
    assert info.peak_rss_bytes <= info.predicted_rss_bytes <= 1.35 * info.peak_rss_bytes
    assert info.seconds <= time.monotonic() - start
    facts = read_graph(tmp_path / MODEL)
    assert (facts.nodes, facts.products) == (2 + 4 * 28, 1 + 4 * 9)
    assert facts.weight_bytes == pytest.approx((tmp_path / f"{MODEL}.data").stat().st_size, rel=1e-3)


def test_nodes_are_counted_with_their_bodies(tmp_path: Path) -> None:
    facts = read_graph(models.tiny(tmp_path))
    assert facts.nodes == 2 + 2 * 2
    assert facts.weight_bytes == 4 * (32 * 32 + 32)
    assert facts.float32_products == ("product",)
    assert read_graph(models.tiny(tmp_path, dtype=np.float16)).float32_products == ()
