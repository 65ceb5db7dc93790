"""``depthwire_run_trt``: its own code, over a stand-in for TensorRT and CUDA; against NVIDIA's headers it compiles.

No engine runs here: there is no GPU. The stand-in (``fake_tensorrt/``) does a stream's work only when the stream is
waited for, so that results which are read too early are wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import depthwire
from tests.cli.models import save_tiny_llama
from tests.conftest import ROOT
from tests.runtime.deploy.cpp_artifacts import BUILDS, SANITIZED, Ran, run, seal, write_every_type

if TYPE_CHECKING:
    from collections.abc import Mapping

SOURCES = ROOT / "runtime/deploy/cpp"
FAKE = Path(__file__).parent / "fake_tensorrt"
CUDA = Path("/usr/local/cuda/include")
HEADERS = sorted((ROOT / ".cache/tensorrt-headers").glob("*"))

TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bool": 4, "uint8": 5, "bfloat16": 7, "int64": 8}
"""Element types of a network's interface, with TensorRT's numbers."""

pytestmark = pytest.mark.skipif(not SANITIZED.is_file(), reason="not built: make runner")


def compile_with(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin over the stand-in, with sanitizers."""
    out = tmp_path_factory.mktemp("twin") / "depthwire_run_trt"
    flags = [
        "-std=c++20",
        "-Og",
        "-g1",
        "-Wall",
        "-Wextra",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    includes = [f"-I{FAKE}", f"-I{SOURCES / 'common'}"]
    files = [*map(str, sorted((SOURCES / "tensorrt").glob("*.cpp"))), str(BUILDS / "runner-asan/libdepthwire_runner.a")]
    done = subprocess.run(
        ["c++", *flags, *includes, *files, "-o", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def engine_text(*, batch: int = 2) -> str:
    lines = ["fake", f"input x 0 {batch} 3"]
    for dtype, number in TYPES.items():
        kind = "host-output" if dtype == "int32" else "output"
        lines.append(f"{kind} {'logits' if dtype == 'float32' else f'as_{dtype}'} {number} {batch} 3")
    return "\n".join(lines) + "\n"


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """An artefact with an engine, of the element types that TensorRT has."""
    root = write_every_type(tmp_path / "out", dtypes=list(TYPES))
    (root / "engine/rtx").mkdir(parents=True)
    (root / "engine/rtx/model.engine").write_text(engine_text(), encoding="utf-8")
    path = root / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, "engines": {"rtx": {"file": "engine/rtx/model.engine"}}}), encoding="utf-8")
    return seal(root)


def run_faked(program: Path, *arguments: str | Path, fake: str | None = None) -> Ran:
    """Run it with one of the stand-in's failures."""
    environment: Mapping[str, str] = {**os.environ, **({} if fake is None else {fake: "1"})}
    return run(program, *arguments, "--json", environment=environment)


@pytest.mark.parametrize("graph", [[], ["--cuda-graph"]], ids=["enqueue", "graph"])
def test_every_window_and_element_type_goes_through(program: Path, built: Path, graph: list[str]) -> None:
    ran = run_faked(program, built, "--time", "5", *graph)
    assert ran.status == 0, ran.output
    assert ran.result["windows"] == 2
    assert {output["dtype"] for output in ran.result["outputs"]} == set(TYPES)
    assert all(output["max_abs"] == 0 for output in ran.result["outputs"])
    assert ran.result["runtime"] == "tensorrt 10.3.0"
    assert ran.result["device"] == "stand-in SM87"
    assert ran.result["cuda graph"] == ("yes" if graph else "no")
    if not graph:
        assert ran.result["latency_ms"] == {"runs": 5, "median": 1.5, "p10": 1.5, "p90": 1.5}


def test_outputs_that_differ_exit_with_7(program: Path, built: Path) -> None:
    ran = run_faked(program, built, fake="FAKE_WRONG")
    assert ran.status == 7
    assert not any(output["passed"] for output in ran.result["outputs"] if output["dtype"] != "bool")


@pytest.mark.parametrize(
    ("fake", "code", "found"),
    [
        ("FAKE_NO_GPU", "runtime.run", "no CUDA-capable device is detected"),
        ("FAKE_NO_MEMORY", "runtime.run", "out of memory"),
        ("FAKE_FAILS", "runtime.run", "a tactic failed"),
    ],
)
def test_what_cuda_and_tensorrt_refuse_exits_with_6(
    program: Path, built: Path, fake: str, code: str, found: str
) -> None:
    ran = run_faked(program, built, fake=fake)
    assert (ran.status, ran.result["error"], ran.result["found"]) == (6, code, found)


ENGINES = {
    "another version": ("real", "the engine cannot be read: the engine was built by another version"),
    "another shape": (engine_text(batch=4), "[2, 3]: static dimension mismatch"),
    "another input": (engine_text().replace(" x ", " y "), "none of that name"),
    "two inputs": (engine_text() + "input y 0 2 3\n", "2"),
    "another dtype": (engine_text().replace("input x 0", "input x 1"), "another dtype"),
    "an odd dtype": (engine_text().replace("as_int8 2", "as_int8 6"), "TensorRT's number 6"),
    "shapes of the data": (engine_text().replace("as_int8 2 2", "as_int8 2 -2"), "[-2, 3]"),
}


@pytest.mark.parametrize(("text", "found"), ENGINES.values(), ids=ENGINES)
def test_an_engine_that_does_not_fit_exits_with_6(program: Path, built: Path, text: str, found: str) -> None:
    other = built.parent / "other.engine"
    other.write_text(text, encoding="utf-8")
    ran = run_faked(program, built, "--engine", other)
    assert (ran.status, ran.result["error"], ran.result["found"]) == (6, "runtime.session", found)


def test_an_output_that_the_engine_lacks_differs(program: Path, built: Path) -> None:
    other = built.parent / "other.engine"
    other.write_text("".join(engine_text().splitlines(keepends=True)[:-1]), encoding="utf-8")
    ran = run_faked(program, built, "--engine", other)
    assert ran.status == 7
    assert [output["problem"] for output in ran.result["outputs"] if not output["passed"]] == ["expected and missing"]


def test_an_engine_of_any_batch_takes_the_goldens(program: Path, built: Path) -> None:
    other = built.parent / "other.engine"
    other.write_text(engine_text(batch=-1), encoding="utf-8")
    assert run_faked(program, built, "--engine", other).status == 0


def test_which_engine_is_meant(program: Path, built: Path) -> None:
    assert run_faked(program, built, "--target", "rtx").status == 0
    ran = run_faked(program, built, "--target", "h100")
    assert (ran.status, ran.result["error"], ran.result["wanted"]) == (2, "cli.bad-value", "rtx")
    assert run_faked(program, built, "--engine", built / "absent").result["error"] == "artifact.file-missing"
    (built / "engine/rtx/model.engine").write_text("fake\n", encoding="utf-8")
    assert run_faked(program, built).result["error"] == "artifact.hash-mismatch"


def write_bundle(built: Path, root: Path) -> Path:
    """The same model as a device bundle, with the fields of ``bundle.json`` that are read."""
    manifest = json.loads((built / "manifest.json").read_text(encoding="utf-8"))
    (root / "goldens/model").mkdir(parents=True)
    for key, array in load_file(built / "goldens.safetensors").items():
        # What numpy has no dtype for travels as float32.
        plain = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        np.save(root / "goldens/model" / f"{key}.npy", plain)
    model = {"engine": "model.engine", "goldens": "goldens/model", "inputs": manifest["inputs"]}
    model["outputs"] = [{**output, "computed": output["dtype"]} for output in manifest["outputs"]]
    files = {
        path.relative_to(root).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(root.rglob("*.npy"))
    }
    bundle = {"schema_version": 1, "target": "jetson-agx-orin-64", "models": [model], "files": files}
    (root / "bundle.json").write_text(json.dumps(bundle), encoding="utf-8")
    return root


def test_a_bundle_is_run_by_the_engine_of_its_work_directory(program: Path, built: Path, tmp_path: Path) -> None:
    import ml_dtypes  # noqa: F401 - load_file needs the name bfloat16

    bundle = write_bundle(built, tmp_path / "bundle")
    assert run_faked(program, bundle).result["error"] == "artifact.file-missing"
    work = tmp_path / "elsewhere"
    for folder, options in ((bundle / "work", []), (work, ["--work", str(work)])):
        folder.mkdir()
        (folder / "model.engine").write_text(engine_text(), encoding="utf-8")
        ran = run_faked(program, bundle, *options)
        assert ran.status == 0, ran.output
        assert {output["dtype"] for output in ran.result["outputs"]} == set(TYPES)


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "no magic": b"\x93NUMPZ\x01\x00\x02\x00{}",
    "version 9": b"\x93NUMPY\x09\x00\x02\x00{}",
    "a header beyond the file": b"\x93NUMPY\x01\x00\xff\xff{}",
    "a header of 4 GiB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}",
    "no literal": b"\x93NUMPY\x01\x00\x02\x00'(",
    "objects": b"\x93NUMPY\x01\x00\x34\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
}


def as_npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


HOSTILE |= {
    "big-endian": as_npy("{'descr': '>f4', 'fortran_order': False, 'shape': (2, 2, 3), }", bytes(48)),
    "Fortran's order": as_npy("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2, 3), }", bytes(48)),
    "too short": as_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2, 3), }", bytes(47)),
    "too long": as_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2, 3), }", bytes(49)),
    "2^66 elements": as_npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**33}, {2**33}), }}"),
    "another shape": as_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 2), }", bytes(48)),
    "no windows": as_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (), }", bytes(4)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_arrays_are_refused(program: Path, built: Path, tmp_path: Path, content: bytes) -> None:
    import ml_dtypes  # noqa: F401 - load_file needs the name bfloat16

    bundle = write_bundle(built, tmp_path / "bundle")
    manifest: dict[str, Any] = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    (bundle / "bundle.json").write_text(json.dumps({**manifest, "files": {}}), encoding="utf-8")
    (bundle / "goldens/model/output.logits.npy").write_bytes(content)
    ran = run_faked(program, bundle)
    assert (ran.status, ran.result["error"]) == (5, "verify.goldens"), ran.output


def test_a_bundle_as_depthwire_writes_it_is_read(program: Path, tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "tiny")
    artifact = depthwire.export(source, tmp_path / "out", attn_res="full", seq_len=16)
    depthwire.bundle(artifact.root, target="jetson-agx-orin", out=tmp_path / "bundle")
    (tmp_path / "bundle/work").mkdir()
    engine = tmp_path / "bundle/work/model.engine"
    engine.write_text("fake\ninput input_ids 8 1 16\noutput logits 0 1 16 97\n", encoding="utf-8")
    ran = run_faked(program, tmp_path / "bundle")
    assert ran.status == 7, ran.output  # the goldens fit; the stand-in cannot compute the model
    assert ran.result["outputs"][0]["shape"] == [1, 16, 97]


@pytest.mark.skipif(not HEADERS, reason="no headers of TensorRT: tools/fetch_tensorrt_headers.py gets them")
@pytest.mark.skipif(not (CUDA / "cuda_runtime_api.h").is_file(), reason=f"no cuda_runtime_api.h in {CUDA}")
@pytest.mark.parametrize("headers", HEADERS, ids=[path.name for path in HEADERS])
def test_it_compiles_against_tensorrt(headers: Path) -> None:
    includes = [f"-I{SOURCES / 'common'}", "-isystem", str(headers), "-isystem", str(CUDA)]
    for file in sorted((SOURCES / "tensorrt").glob("*.cpp")):
        command = [
            "c++",
            "-std=c++20",
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-fsyntax-only",
            *includes,
            str(file),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
