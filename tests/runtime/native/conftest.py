"""What the tests of the CUDA provider's kernels share: the code that launches them, with a stand-in for the driver."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

NATIVE = ROOT / "runtime" / "native"
HERE = Path(__file__).parent
HEADERS = sorted((ROOT / ".cache" / "onnxruntime-headers").glob("*"))
CUDA = Path("/usr/local/cuda/include")


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probe library and the driver's stand-in, compiled into one folder."""
    if not (CUDA / "cuda.h").is_file():
        pytest.skip(f"no cuda.h in {CUDA}")
    folder = tmp_path_factory.mktemp("probe")
    includes = [f"-I{path}" for path in (NATIVE / "ops", NATIVE / "kernels", NATIVE / "cuda")]
    system = [part for path in (HEADERS[-1], CUDA) for part in ("-isystem", str(path))]
    ours = [NATIVE / "ops" / f"{name}.cpp" for name in ("op", "custom_op", "shapes", "operands")]
    ours += [NATIVE / "ops" / f"routing_{name}.cpp" for name in ("op", "custom_op", "operands")]
    cuda = [NATIVE / "cuda" / f"{name}.cpp" for name in ("driver", "bundle", "launch", "cuda_backend", "routing_cuda")]
    flags = [
        "-std=c++20",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
        "-fsanitize=undefined",
        "-fsanitize-undefined-trap-on-error",
    ]
    for output, files in (
        ("probe.so", [HERE / "cuda_probe.cpp", *ours, *cuda]),
        ("libcuda.so.1", [HERE / "fake_driver.cpp"]),
    ):
        command = ["c++", *flags, *includes, *system, *map(str, files), "-o", str(folder / output), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder
