"""``depthwire_run``: it reproduces artefacts without Python, refuses damaged ones, and finds what differs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import depthwire
from depthwire.runtime.native import library_path
from tests.cli.models import save_tiny_llama
from tests.conftest import ROOT
from tests.runtime.deploy.cpp_artifacts import (
    BUILDS,
    RUNNER,
    SANITIZED,
    TYPES,
    run,
    safetensors,
    seal,
    write_every_type,
)
from tools.write_cpp_tolerances import TARGET, table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SOURCES = ROOT / "runtime/deploy/cpp"
SELECTING = ROOT / "tests/data/routed_small/mixture_of_depths"
READING = ROOT / "tests/data/attn_res_small"

pytestmark = pytest.mark.skipif(not (RUNNER.is_file() and SANITIZED.is_file()), reason="not built: make runner")


@pytest.fixture(scope="module")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lifted")
    return depthwire.export(save_tiny_llama(folder / "tiny"), folder / "out", attn_res="full", seq_len=16).root


@pytest.fixture(scope="module")
def every_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_every_type(tmp_path_factory.mktemp("types") / "out")


@pytest.fixture
def copy(every_type: Path, tmp_path: Path) -> Path:
    """An artefact to be spoilt."""
    return shutil.copytree(every_type, tmp_path / "out")


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def rewrite_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**manifest_of(folder), **changes}), encoding="utf-8")


@pytest.mark.parametrize("program", [RUNNER, SANITIZED], ids=["release", "sanitized"])
def test_kernels_and_bodies_reproduce_a_lifted_model(lifted: Path, program: Path) -> None:
    kernels, bodies = run(program, lifted, "--json"), run(program, lifted, "--json", "--no-kernels")
    for ran in (kernels, bodies):
        assert ran.status == 0, ran.output + ran.error
        (logits,) = ran.result["outputs"]
        assert logits["top1"] == {"positions": 16, "flips": 0, "beyond": 0, "largest_gap": 0}
        assert 0 < logits["max_abs"] <= logits["allowed"]
    assert kernels.result["operators by"].endswith(" kernels")
    assert bodies.result["operators by"] == "function bodies"


@pytest.mark.parametrize(("model", "dtype"), [(SELECTING, "fp32"), (READING, "fp16")], ids=["selections", "reads"])
def test_trained_models_are_reproduced(model: Path, dtype: Literal["fp32", "fp16"], tmp_path: Path) -> None:
    root = depthwire.export(model, tmp_path / "out", seq_len=32, dtype=dtype).root
    ran = run(RUNNER, root, "--json", "--time", "3")
    assert ran.status == 0, ran.output + ran.error
    (logits,) = ran.result["outputs"]
    assert logits["dtype"] == {"fp32": "float32", "fp16": "float16"}[dtype]
    assert logits["top1"]["positions"] == 32
    assert ran.result["operators by"].endswith(" kernels")
    latency = ran.result["latency_ms"]
    assert 0 < latency["p10"] <= latency["median"] <= latency["p90"]
    assert latency["runs"] == 3


def test_it_judges_as_verify_does(lifted: Path) -> None:
    report = depthwire.verify(lifted, goldens_only=True).as_dict()
    (expected,) = report["comparisons"][0]["windows"][0]["outputs"]
    (found,) = run(RUNNER, lifted, "--json").result["outputs"]
    assert found["allowed"] == pytest.approx(expected["allowed"], rel=1e-12)
    assert found["max_abs"] == pytest.approx(expected["max_abs"], rel=1e-12)
    assert found["unequal"] == expected["unequal"]


def test_every_element_type_in_every_window(every_type: Path) -> None:
    ran = run(SANITIZED, every_type, "--json")
    assert ran.status == 0, ran.output + ran.error
    assert ran.result["windows"] == 2
    assert {output["dtype"] for output in ran.result["outputs"]} == set(TYPES)
    assert all(output["max_abs"] == 0 for output in ran.result["outputs"])


@pytest.mark.parametrize("output", [f"as_{dtype}" for dtype in TYPES if dtype != "float32"])
def test_one_element_of_the_last_window_that_differs_fails(copy: Path, output: str) -> None:
    path = copy / "goldens.safetensors"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + size])[f"output.{output}"]["data_offsets"]
    last = 8 + size + end - 1
    # The sign and the highest bits of the exponent of a float; the low byte of an integer.
    place = last if "float" in output else last - (end - begin) // 12 + 1
    content[place] ^= 0x01
    path.write_bytes(content)
    ran = run(RUNNER, seal(copy), "--json")
    assert ran.status == 7
    assert [entry["name"] for entry in ran.result["outputs"] if not entry["passed"]] == [output]


def test_other_weights_differ(lifted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(lifted, tmp_path / "out")
    weights = np.fromfile(copy / "model.onnx.data", np.float32)
    weights[: weights.size // 2] *= np.float32(1.01)
    weights.tofile(copy / "model.onnx.data")
    assert run(RUNNER, copy).status == 5
    ran = run(RUNNER, seal(copy), "--json")
    assert ran.status == 7
    assert ran.result["passed"] is False


def test_goldens_of_another_text_differ(lifted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(lifted, tmp_path / "out")
    goldens = load_file(copy / "goldens.safetensors")
    goldens["input.input_ids"] = (goldens["input.input_ids"] + 1) % 97
    save_file(goldens, copy / "goldens.safetensors")
    ran = run(RUNNER, seal(copy))
    assert ran.status == 7
    assert re.search(
        r"logits: float32 \[1, 16, 97\], FAILED: max\|d\| [1-9].*; top-1 \d+ of 16, largest gap", ran.output
    )


@pytest.mark.parametrize(("precision", "status"), [(None, 7), ("fp32", 7), ("fp16", 0), ("bf16", 0), ("int3", 5)])
def test_the_budget_is_that_of_the_precision(copy: Path, precision: str | None, status: int) -> None:
    goldens = load_file(copy / "goldens.safetensors")
    goldens["output.logits"] = goldens["output.logits"] * np.float32(1.005)  # fp16 admits 1 %, fp32 2e-5
    save_file(goldens, copy / "goldens.safetensors")
    rewrite_manifest(seal(copy), precision=None if precision is None else {"rest": precision})
    ran = run(RUNNER, copy, "--json")
    assert ran.status == status, ran.output


@pytest.mark.parametrize("name", ["model.onnx", "goldens.safetensors"])
def test_a_file_that_changed_is_damage(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    ran = run(SANITIZED, copy, "--json")
    assert (ran.status, ran.result["error"]) == (5, "artifact.hash-mismatch")
    assert run(RUNNER, copy, "--no-hashes", "--json").result.get("error") != "artifact.hash-mismatch"
    (copy / name).write_bytes(content[:-1])
    assert run(SANITIZED, copy, "--no-hashes", "--json").result["error"] == "artifact.hash-mismatch"
    (copy / name).unlink()
    assert run(SANITIZED, copy, "--json").result["error"] == "artifact.file-missing"


def header(shape: object = (2, 2, 3), dtype: object = "F32", offsets: object = (0, 48)) -> str:
    return json.dumps({"input.x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": bytes(7),
    "a header longer than the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "a header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "a header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + b"{}",
    "no JSON": safetensors({}, "{"),
    "JSON that is no object": safetensors({}, "[]"),
    "nested without end": safetensors({}, "[" * 100_000),
    "no tensor": safetensors({}, "{}"),
    "zeros": bytes(4096),
    "a shape of 2^64 elements": safetensors({}, header([1 << 32, 1 << 32])),
    "a shape of 2^63": safetensors({}, header([1 << 63])),
    "a shape beyond 64 bits": safetensors({}, header([1 << 64])),
    "a negative shape": safetensors({}, header([-1])),
    "a shape that is text": safetensors({}, header("3")),
    "a dtype unheard of": safetensors({}, header(dtype="F4")),
    "offsets beyond the end": safetensors({}, header()),
    "offsets that turn round": safetensors({}, header(offsets=(48, 0))),
    "offsets that overflow": safetensors({}, header(offsets=((1 << 64) - 48, 0))),
    "offsets of another size": safetensors({}, header(offsets=(0, 47))),
    "three offsets": safetensors({}, header(offsets=(0, 24, 48))),
    "the same key twice": safetensors({}, '{"a":{},"a":{}}'),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_goldens_are_refused(copy: Path, content: bytes) -> None:
    (copy / "goldens.safetensors").write_bytes(content)
    ran = run(SANITIZED, seal(copy), "--json")
    assert (ran.status, ran.result["error"]) == (5, "verify.goldens"), ran.output


def drop_output(goldens: dict[str, Any]) -> None:
    del goldens["output.as_int8"]


def add_output(goldens: dict[str, Any]) -> None:
    goldens["output.more"] = goldens["output.as_int8"]


def drop_window(goldens: dict[str, Any]) -> None:
    goldens["output.as_int8"] = goldens["output.as_int8"][:1]


def no_window(goldens: dict[str, Any]) -> None:
    goldens.update({name: array[:0] for name, array in goldens.items()})


def other_dtype(goldens: dict[str, Any]) -> None:
    goldens["output.as_int8"] = goldens["output.as_uint8"]


@pytest.mark.parametrize("change", [drop_output, add_output, drop_window, no_window, other_dtype])
def test_goldens_that_do_not_belong_are_refused(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    import ml_dtypes  # noqa: F401 - load_file needs the name bfloat16

    goldens = load_file(copy / "goldens.safetensors")
    change(goldens)
    save_file(goldens, copy / "goldens.safetensors")
    ran = run(SANITIZED, seal(copy), "--json")
    assert (ran.status, ran.result["error"]) == (5, "verify.goldens"), ran.output


ENTRY = {"bytes": 0, "sha256": ""}
MANIFESTS: dict[str, tuple[dict[str, object], str]] = {
    "another schema": ({"schema_version": 2}, "artifact.schema-version"),
    "a negative schema": ({"schema_version": -1}, "artifact.bad-manifest"),
    "above": ({"files": {"../x": ENTRY}}, "artifact.path-outside"),
    "absolute": ({"files": {"/etc/passwd": ENTRY}}, "artifact.path-outside"),
    "through a link": ({"files": {"link/passwd": ENTRY}}, "artifact.path-outside"),
    "with a zero": ({"files": {"a\0b": ENTRY}}, "artifact.path-outside"),
    "a directory": ({"files": {"folder": ENTRY}}, "artifact.file-missing"),
    "no inputs": ({"inputs": None}, "artifact.bad-manifest"),
    "an unknown dtype": ({"inputs": [{"name": "x", "shape": [2, 3], "dtype": "float4"}]}, "artifact.bad-manifest"),
    "too large": (
        {"inputs": [{"name": "x", "shape": [2**62, 3], "dtype": "float32"}]},
        "artifact.bad-manifest",
    ),
    "no size": ({"files": {"model.onnx": {"sha256": ""}}}, "artifact.bad-manifest"),
}


@pytest.mark.parametrize(("changes", "code"), MANIFESTS.values(), ids=MANIFESTS)
def test_hostile_manifests_are_refused(copy: Path, changes: dict[str, object], code: str) -> None:
    (copy / "folder").mkdir()
    (copy / "link").symlink_to("/etc")
    rewrite_manifest(copy, **changes)
    ran = run(SANITIZED, copy, "--json")
    assert (ran.status, ran.result["error"]) == (5, code), ran.output


def test_half_a_manifest_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_bytes(path.read_bytes()[:-2])
    ran = run(SANITIZED, copy, "--json")
    assert (ran.status, ran.result["error"]) == (5, "artifact.bad-manifest")
    assert run(RUNNER, copy / "absent", "--json").result["error"] == "artifact.not-an-artifact"


def test_a_runtime_that_cannot_run_it_exits_with_6(copy: Path, lifted: Path) -> None:
    (copy / "model.onnx").write_bytes(b"no model")
    ran = run(RUNNER, seal(copy), "--json")
    assert (ran.status, ran.result["error"]) == (6, "runtime.session")
    ran = run(RUNNER, lifted, "--kernels", copy / "absent.so", "--json")
    assert (ran.status, ran.result["error"]) == (6, "runtime.no-kernels")
    other = BUILDS / "runner/onnxruntime/libonnxruntime.so.1"  # a library, but not of kernels
    ran = run(RUNNER, lifted, "--kernels", other, "--json")
    assert (ran.status, ran.result["error"]) == (6, "runtime.stale-kernels")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--loud"],
        ["a", "b"],
        ["a", "--time"],
        ["a", "--time", "0"],
        ["a", "--time", "2x"],
        ["a", "--json", "--json"],
    ],
)
def test_a_command_line_that_cannot_be_meant_exits_with_2(arguments: list[str]) -> None:
    assert run(SANITIZED, *arguments).status == 2


def test_other_options(lifted: Path) -> None:
    ran = run(SANITIZED, lifted, "--map-weights", "--threads", "1", "--kernels", str(library_path()), "--json")
    assert ran.status == 0
    assert ran.result["threads"] == "1"
    assert run(RUNNER, lifted, "--provider", "tpu").status == 2
    helped = run(RUNNER, "--help")
    assert helped.status == 0
    assert "--no-kernels" in helped.output


@pytest.mark.parametrize("build", ["runner", "runner-asan", "runner-aarch64"])
def test_the_parts_without_a_model(build: str) -> None:
    program = BUILDS / build / "runner_selftest"
    emulator = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"] if build.endswith("aarch64") else []
    if not program.is_file() or (emulator and shutil.which(emulator[0]) is None):
        pytest.skip("not built, or no emulator: make native-aarch64, qemu-user")
    done = subprocess.run([*emulator, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^\w+: \d+ checks, 0 failed$", done.stdout, re.MULTILINE)) == 4


def test_the_table_of_tolerances_is_the_one_table() -> None:
    assert TARGET.read_text(encoding="utf-8") == table()


def test_every_error_code_is_explained() -> None:
    known = set(re.findall(r"^## ([a-z-]+\.[a-z-]+)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE))
    text = "".join(
        path.read_text(encoding="utf-8") for path in sorted(SOURCES.rglob("*.cpp")) if path.stem != "selftest"
    )
    codes = set(re.findall(r'"((?:artifact|runtime|verify|cli|internal)\.[a-z-]+)"', text))
    assert {"artifact.hash-mismatch", "runtime.session", "cli.usage"} <= codes
    assert codes - known == set()
