"""The latency protocol and the calls of the CUDA driver: against cuda.h, and run over a stand-in of the driver.

No GPU is here, so no time that these tests see means anything. What they show is that every declared function has the
arguments that NVIDIA's header gives it, and that the protocol's calls, buffers and transfers are in order.
"""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthwire.runtime.deploy import cuda
from depthwire.runtime.deploy.latency import measure, summary
from tests.runtime.deploy.device import edit, run

HEADERS = sorted(Path("/usr/local").glob("cuda*/include/cuda.h"))


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled stand-in, in a folder for LD_LIBRARY_PATH."""
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("stand_in_driver.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*command, str(source)], check=True)
    return folder / "libcuda.so.1"


@pytest.fixture
def driver(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> cuda.Driver:
    monkeypatch.setattr(cuda, "LIBRARY", str(stand_in))
    monkeypatch.setenv("DEPTHWIRE_STAND_IN", "87")
    return cuda.Driver()


def test_without_a_driver_it_says_so() -> None:
    gpu, why = cuda.find_gpu()
    assert (gpu is None) == ("no" in why)


def test_a_gpu_is_described(driver: cuda.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver.gpu() == cuda.Gpu("Stand-in 87", "SM87", 8 << 30, integrated=True, driver="13.2")
    monkeypatch.setenv("DEPTHWIRE_STAND_IN", "121")
    assert driver.gpu().capability == "SM121"
    monkeypatch.delenv("DEPTHWIRE_STAND_IN")
    assert cuda.find_gpu() == (None, "the NVIDIA driver finds no GPU")


def test_a_call_that_fails_names_itself(driver: cuda.Driver) -> None:
    with pytest.raises(cuda.CudaError, match=r"cuCtxSetCurrent: invalid argument \(1\)"):
        driver.call("cuCtxSetCurrent", None)


@pytest.mark.skipif(not HEADERS, reason="no cuda.h on this machine")
def test_every_function_is_declared_as_in_the_header() -> None:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", HEADERS[0].read_text(encoding="utf-8", errors="replace"), flags=re.DOTALL)
    renamed = dict(re.findall(r"#\s*define\s+(cu\w+)\s+(?:__CUDA_API_\w+\()?(cu\w+)", text))
    declared: dict[str, list[list[str]]] = {}
    for name, arguments in re.findall(r"CUresult\s+CUDAAPI\s+(cu\w+)\s*\(([^)]*)\)\s*;", text):
        for exported in {name, renamed.get(name, name)}:
            declared.setdefault(exported, []).append([part.strip() for part in arguments.split(",")])
    for name, types in cuda.PROTOTYPES.items():
        forms = declared.get(name, [])
        assert forms, name
        assert any(len(form) == len(types) and all(map(_agrees, form, types)) for form in forms), (
            f"{name}: {forms} against {types}"
        )
    values = dict(re.findall(r"(CU_\w+)\s*=\s*(0x[0-9a-fA-F]+|\d+)", text))
    assert int(values["CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR"]) == cuda.COMPUTE_CAPABILITY_MAJOR
    assert int(values["CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR"]) == cuda.COMPUTE_CAPABILITY_MINOR
    assert int(values["CU_DEVICE_ATTRIBUTE_INTEGRATED"]) == cuda.INTEGRATED
    assert int(values["CU_STREAM_NON_BLOCKING"], 0) == cuda.NON_BLOCKING
    assert int(values["CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"]) == cuda.CAPTURE_THREAD_LOCAL


_POINTERS = ("CUcontext", "CUstream", "CUevent", "CUgraph", "CUgraphExec")
_SCALARS = {
    "unsigned int": ctypes.c_uint,
    "int": ctypes.c_int,
    "size_t": ctypes.c_size_t,
    "CUdeviceptr": ctypes.c_uint64,
    "CUdevice": ctypes.c_int,
    "CUdevice_attribute": ctypes.c_int,
    "CUstreamCaptureMode": ctypes.c_int,
    "CUresult": ctypes.c_int,
    "unsigned long long": ctypes.c_ulonglong,
    "cuuint64_t": ctypes.c_uint64,
}


def _agrees(declaration: str, declared: Any) -> bool:
    """Whether an argument of the header has the width and kind of ours."""
    words = re.sub(r"\bconst\b|\s+", " ", declaration).strip()
    match = re.fullmatch(r"([\w ]+?)\s*(\**)\s*(\w+)", words)
    assert match is not None, declaration
    kind, stars = match[1].strip(), len(match[2])
    if stars:
        return ctypes.sizeof(declared) == ctypes.sizeof(ctypes.c_void_p) and declared not in _SCALARS.values()
    if kind in _POINTERS:
        return bool(declared is ctypes.c_void_p)
    return bool(declared is _SCALARS[kind])


class _Dtype:
    itemsize = 4


class _Engine:
    """Doubles float32 [4]: what the protocol needs of an engine, computed on the addresses it is given."""

    num_io_tensors = 2

    def __init__(self) -> None:
        self.runs = 0
        self.places: dict[str, int] = {}

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "x" else "out"

    def get_tensor_dtype(self, name: str) -> _Dtype:
        del name
        return _Dtype()

    def create_execution_context(self) -> _Context:
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return (name, shape) == ("x", (4,))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "y"
        return (4,)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.engine.places[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 32
        x, y = (np.ctypeslib.as_array((ctypes.c_float * 4).from_address(self.engine.places[name])) for name in "xy")
        y[:] = 2 * x
        self.engine.runs += 1
        return True


class _Trt:
    class TensorIOMode:
        INPUT = "in"


@pytest.fixture
def goldens(tmp_path: Path) -> Path:
    np.save(tmp_path / "input.x.npy", np.array([[1, 2, 3, 4], [9, 9, 9, 9]], np.float32))
    return tmp_path


def test_the_protocol_runs_every_variant(driver: cuda.Driver, goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[float] = []
    call = cuda.Driver.call

    def spying(self: cuda.Driver, name: str, *arguments: Any) -> None:
        call(self, name, *arguments)
        if name == "cuMemcpyDtoHAsync_v2":
            copied[:] = list((ctypes.c_float * 4).from_address(arguments[0]))

    monkeypatch.setattr(cuda.Driver, "call", spying)
    engine = _Engine()
    protocol = {"warmup_runs": 3, "warmup_seconds": 0.0, "runs": 50}
    found = measure(_Trt, engine, {"goldens": str(goldens), "inputs": ["x"], **protocol})
    switches = [(variant["cuda_graph"], variant["transfers"]) for variant in found["variants"]]
    assert switches == [(False, False), (False, True), (True, False), (True, True)]
    assert copied == [2, 4, 6, 8]
    for variant in found["variants"][:2]:
        assert variant["warmup_runs"] == 3
        assert variant["gpu_ms"]["count"] == variant["host_ms"]["count"] == 50
        assert 0 <= variant["gpu_ms"]["p50"] <= variant["host_ms"]["max"]
    # The stand-in records no graph: that is said, and nothing is made up.
    for variant in found["variants"][2:]:
        assert "operation not supported" in variant["not_measured"]
        assert "gpu_ms" not in variant
    # 3 + 50 for each measured variant, and the run before each capture.
    assert engine.runs == 2 * 53 + 2
    assert found["gpu_free_bytes"] == 5 << 30
    del driver


def test_a_summary_is_exact() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(200).tolist()
    found = summary(values)
    for share in (50, 90, 95, 99):
        assert found[f"p{share}"] == np.quantile(values, share / 100, method="inverted_cdf")
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values))
    assert (found["min"], found["max"], found["count"]) == (min(values), max(values), 200)
    assert summary([2.5]) == {"count": 1, "mean": 2.5, "std": 0.0, "min": 2.5, "max": 2.5} | {
        f"p{share}": 2.5 for share in (50, 90, 95, 99)
    }
    assert not any(math.isnan(value) for value in found.values())


def test_a_gpu_of_another_kind(device_python: Path, bundle: Path, stand_in: Path) -> None:
    ran = run(device_python, bundle, "--dry-run", environment={"DEPTHWIRE_STAND_IN": "87", **library(stand_in)})
    assert (ran.code, ran.failed) == (8, ["GPU"])
    assert "SM87" in ran.check("GPU")["got"]
    ran = run(device_python, bundle, "--dry-run", environment={"DEPTHWIRE_STAND_IN": "86", **library(stand_in)})
    assert (ran.code, ran.failed) == (0, [])
    # A GPU of the right kind has another name than the one the bundle is for.
    edit(bundle, platform__boards=["a10"])
    ran = run(device_python, bundle, "--dry-run", environment={"DEPTHWIRE_STAND_IN": "86", **library(stand_in)})
    assert ran.failed == ["board"]
    edit(bundle, platform__boards=["86"])
    assert (
        run(device_python, bundle, "--dry-run", environment={"DEPTHWIRE_STAND_IN": "86", **library(stand_in)}).code == 0
    )


def test_an_engine_that_cannot_be_run_is_an_error(device_python: Path, bundle: Path, stand_in: Path) -> None:
    """The stand-in is no GPU: TensorRT-RTX builds, and cannot load what it built. That is a failure, not a pass."""
    ran = run(device_python, bundle, environment={"DEPTHWIRE_STAND_IN": "86", **library(stand_in)})
    assert (ran.code, ran.result["verdict"]) == (6, "build-failed")
    assert "cannot be run" in ran.result["reason"]
    assert ran.result["builds"][0]["bytes"] > 0
    assert ran.result["latency"] == []


def library(stand_in: Path) -> dict[str, str]:
    return {"LD_LIBRARY_PATH": str(stand_in.parent)}
