"""GGUF files: the path to a file, and a directory that holds nothing else."""

from __future__ import annotations

import importlib.util
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from depthwire.errors import CaptureError
from depthwire.export.capture import capture

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("content", [b"", b"GG", b"not a gguf file", b"GGUF" + bytes(4), b"GGUF" + b"\xff" * 64])
def test_files_that_are_no_gguf(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    for source in (file, tmp_path):
        with pytest.raises(CaptureError) as raised:
            capture(source)
        assert raised.value.code in ("capture.corrupt-checkpoint", "capture.load-failed")
        assert raised.value.at is not None


def test_two_gguf_files_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CaptureError) as raised:
        capture(tmp_path)
    assert raised.value.code == "capture.no-config"
    assert "a.gguf, b.gguf" in str(raised.value.got)


@pytest.mark.parametrize("absent", ["gguf", "accelerate", "transformers"])
def test_a_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == absent else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CaptureError) as raised:
        capture(tmp_path / "model.gguf")
    assert raised.value.code == "capture.missing-dependency"
    assert raised.value.todo == "pip install 'depthwire[hf]'"
    assert absent in raised.value.what


@pytest.mark.slow
def test_smollm2_gguf(smollm2_gguf: Path, smollm2_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "alone"
    directory.mkdir()
    shutil.copy(smollm2_gguf, directory)
    capfd.readouterr()
    program = capture(directory, seq_len=16)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert program.source.kind == "gguf"
    assert list(program.source.sha256) == [smollm2_gguf.name]
    assert program.source.task == "causal-lm"
    reference = capture(smollm2_dir, seq_len=16)
    state = program.exported.state_dict
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert set(state) == set(reference.exported.state_dict)
    ids = reference.example_inputs["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(ids), reference.module()(ids), rtol=1e-4, atol=1e-4)
