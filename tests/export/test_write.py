"""Writing: whole or not at all, hashed, and the bytes are the weights'."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from depthwire._hash import sha256_file
from depthwire.artifact import GOLDENS, MANIFEST, MODEL, WEIGHTS, Artifact
from depthwire.errors import ExportError
from depthwire.export import write as write_module
from depthwire.export._external_data import ALIGNMENT, write_external_data
from depthwire.export.checkpoints import checkpoints
from depthwire.export.goldens import make_goldens
from depthwire.export.to_onnx import to_onnx
from depthwire.export.write import write_artifact
from depthwire.passes.analysis.residual_stream import find_residual_stream
from depthwire.passes.standard import canonical_pipeline
from tests.export.tiny import captured, lifted

if TYPE_CHECKING:
    from pathlib import Path


def _write(out: Path, **options: Any) -> Artifact:
    original = captured(**options)
    rewritten, canonical = lifted(original), canonical_pipeline().run(original)
    feed = {name: tensor.numpy() for name, tensor in original.example_inputs.items()}
    return write_artifact(
        out,
        original=original,
        rewritten=rewritten,
        model=to_onnx(rewritten),
        goldens=make_goldens(original, [feed]),
        recipe={"attn_res": "block:3"},
        checkpoints=checkpoints(canonical, find_residual_stream(canonical)),
    )


def test_the_artifact_loads_and_runs(tmp_path: Path) -> None:
    _write(tmp_path / "out")
    artifact = Artifact.load(tmp_path / "out")
    manifest = artifact.manifest
    assert sorted(path.name for path in artifact.root.iterdir()) == sorted([MODEL, WEIGHTS, GOLDENS, MANIFEST])
    assert set(manifest.files) == {MODEL, WEIGHTS, GOLDENS}
    assert [(t.name, t.shape, t.dtype) for t in manifest.inputs] == [("input_ids", [2, 12], "int64")]
    assert manifest.opsets == {"": 23, "depthwire": 1}
    assert {point.role for point in manifest.checkpoints} == {"norm", "write"}
    assert [point.layer for point in manifest.checkpoints] == sorted(point.layer for point in manifest.checkpoints)
    assert manifest.checkpoints[0].module == "layers.0.attention_norm"
    names = [info.name for info in manifest.passes]
    assert names.index("lift_attn_res") < names.index("legalize_attention") == len(names) - 1
    session = onnxruntime.InferenceSession(str(artifact.model), providers=["CPUExecutionProvider"])
    assert session.run(None, {"input_ids": np.zeros((2, 12), np.int64)})[0].shape == (2, 12, 61)


def test_external_data_is_page_aligned_and_bit_exact(tmp_path: Path) -> None:
    program = lifted(captured())
    model = to_onnx(program)
    sha256, size = write_external_data(model, tmp_path / WEIGHTS)
    assert (tmp_path / WEIGHTS).stat().st_size == size
    assert sha256_file(tmp_path / WEIGHTS) == sha256
    raw = (tmp_path / WEIGHTS).read_bytes()
    external = {
        str(name): value.const_value
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    state = program.exported.state_dict
    assert {"head.weight.T", "embedding.weight", "layers.0.mlp.0.weight.T"} <= set(external)
    for name, tensor in external.items():
        offset, length = int(tensor.offset or 0), int(tensor.length or 0)
        assert offset % ALIGNMENT == 0
        source = state.get(name.removesuffix(".T"))
        if source is not None:
            matrix = source.detach().t() if name.endswith(".T") else source.detach()
            assert raw[offset : offset + length] == matrix.contiguous().numpy().tobytes(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    program = lifted(captured(dtype=dtype))
    model = to_onnx(program)
    write_external_data(model, tmp_path / WEIGHTS)
    tensor = model.graph.initializers["head.weight.T"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    raw = (tmp_path / WEIGHTS).read_bytes()[int(tensor.offset or 0) :][: int(tensor.length or 0)]
    expected = program.exported.state_dict["head.weight"].detach().t().contiguous().view(torch.int16).numpy()
    assert raw == expected.tobytes()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write_module, "_save_graph", full)
    with pytest.raises(OSError, match="No space"):
        _write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_keeps_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "out")
    before = (tmp_path / "out" / MANIFEST).read_bytes()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write_module, "_check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "out", seed=3)
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Artifact.load(tmp_path / "out")


def test_a_new_artifact_replaces_the_old_one(tmp_path: Path) -> None:
    first = _write(tmp_path / "out").manifest.files[WEIGHTS].sha256
    (tmp_path / "out" / "stale").write_text("left over")
    second = _write(tmp_path / "out", seed=3).manifest.files[WEIGHTS].sha256
    assert first != second
    assert not (tmp_path / "out" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_real_full_disk(tmp_path: Path) -> None:
    """A file system of one megabyte; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        with pytest.raises(OSError, match="No space left"):
            _write(disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "..\\windows"])
def test_paths_may_not_leave_the_artifact(name: str, tmp_path: Path) -> None:
    _write(tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    with pytest.raises(ExportError) as caught:
        Artifact.load(tmp_path / "out")
    assert caught.value.code == "artifact.path-outside"


def test_every_changed_byte_and_missing_file_is_found(tmp_path: Path) -> None:
    artifact = _write(tmp_path / "out")
    for name in artifact.manifest.files:
        path = artifact.root / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ExportError) as changed:
            Artifact.load(artifact.root)
        assert changed.value.code == "artifact.hash-mismatch"
        assert name in str(changed.value.at)
        path.unlink()
        with pytest.raises(ExportError) as missing:
            Artifact.load(artifact.root)
        assert missing.value.code == "artifact.file-missing"
        path.write_bytes(good)
    Artifact.load(artifact.root)
