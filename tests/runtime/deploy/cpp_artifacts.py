"""Artefacts for the C++ runner's tests: made by hand, with every element type, and damaged on purpose."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

BUILDS = ROOT / ".cache/native"
RUNNER = BUILDS / "runner/depthwire_run"
SANITIZED = BUILDS / "runner-asan/depthwire_run"

FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
INTEGERS = {f"{sign}int{bits}": f"{sign[:1].upper() or 'I'}{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
TYPES = {**FLOATS, **INTEGERS, "bool": "BOOL"}
"""Element types as the manifest and as the goldens spell them."""


@dataclass
class Ran:
    """What a run of the program left."""

    status: int
    output: str
    error: str
    result: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.result = json.loads(self.output) if self.output.startswith("{") else {}


def run(program: Path, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> Ran:
    """Run it. A sanitizer's finding, a signal and a text that is no JSON fail here."""
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode in {0, 2, 5, 6, 7}, f"status {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
    return Ran(done.returncode, done.stdout, done.stderr)


def tensor_bytes(dtype: str, values: np.ndarray[Any, Any]) -> bytes:
    """Values as they lie in memory."""
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16).tobytes()
    return values.astype(dtype).tobytes()


def safetensors(tensors: Mapping[str, tuple[str, list[int], bytes]], header: str | None = None) -> bytes:
    """A file of the format, written here so that its header can say anything."""
    entries, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = (json.dumps(entries) if header is None else header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_every_type(folder: Path, *, dtypes: Sequence[str] = tuple(TYPES), windows: int = 2) -> Path:
    """An artefact that answers its input ``x`` [2, 3] once for each element type: ``x`` cast to it."""
    folder.mkdir(parents=True)
    names = {dtype: "logits" if dtype == "float32" else f"as_{dtype}" for dtype in dtypes}
    codes = {
        dtype: getattr(TensorProto, dtype.replace("float64", "double").replace("float32", "float").upper())
        for dtype in dtypes
    }
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], [names[dtype]], to=codes[dtype]) for dtype in dtypes],
        "every_type",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info(names[dtype], codes[dtype], [2, 3]) for dtype in dtypes],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx"
    )
    x = np.arange(windows * 6, dtype=np.float32).reshape(windows, 2, 3)
    tensors = {"input.x": ("F32", [windows, 2, 3], x.tobytes())}
    for dtype, name in names.items():
        tensors[f"output.{name}"] = (TYPES[dtype], [windows, 2, 3], tensor_bytes(dtype, x))
    (folder / "goldens.safetensors").write_bytes(safetensors(tensors))
    manifest = {
        "schema_version": 1,
        "inputs": [{"name": "x", "shape": [2, 3], "dtype": "float32"}],
        "outputs": [{"name": name, "shape": [2, 3], "dtype": dtype} for dtype, name in names.items()],
        "custom_ops": {},
        "files": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return seal(folder)


def seal(folder: Path) -> Path:
    """Make the manifest list the files as they are now, so that a change is no longer damage."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"] = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != path
    }
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return folder
