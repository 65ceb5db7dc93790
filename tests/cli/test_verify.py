"""``verify`` and ``build`` on artefacts that are right, damaged, or wrong."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from depthwire.artifact import WEIGHTS, Artifact
from depthwire.cli.main import main
from tests.cli.models import save_tiny_llama

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    """A copy of the artefact to change."""
    return shutil.copytree(converted, tmp_path / "copy")


def _report(directory: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    return report


def _sabotage(directory: Path) -> None:
    """Change a weight and every hash with it: what only a comparison can find."""
    import onnx

    model = onnx.load(str(directory / "model.onnx"), load_external_data=False)
    weight = next(tensor for tensor in model.graph.initializer if "layers.1.mlp.down_proj" in tensor.name)
    offset = int(next(entry.value for entry in weight.external_data if entry.key == "offset"))
    data = np.memmap(directory / WEIGHTS, dtype=np.float32, mode="r+", offset=offset, shape=(8,))
    data *= 3
    data.flush()
    artifact = Artifact.load(directory, check_hashes=False)
    artifact.add_file(WEIGHTS)
    artifact.write_manifest()


def test_verify_captures_the_source_again(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy), "--windows", "2"]) == 0
    text = capsys.readouterr()
    assert [line.split()[1] for line in text.err.splitlines()] == ["load", "capture", "rewrite", "verify"]
    assert "original -> onnxruntime: PASSED, 2 of 2 windows pass" in text.out
    assert _report(copy)["verify"]["windows"] == 2
    Artifact.load(copy)


def test_verify_speaks_json(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy), "--goldens-only", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True
    assert [(pair["expected"], pair["actual"]) for pair in document["comparisons"]] == [("goldens", "onnxruntime")]


def test_inputs_from_a_file(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "inputs.npz"
    np.savez(file, input_ids=np.arange(16, dtype=np.int64)[None])
    assert main(["verify", str(copy), "--inputs", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["windows"] == 1


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "goldens.safetensors", "report.json"])
@pytest.mark.parametrize("verb", ["verify", "inspect", "build"])
def test_one_changed_byte_is_found(copy: Path, capsys: pytest.CaptureFixture[str], name: str, verb: str) -> None:
    path = copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main([verb, str(copy)]) == 5
    error = capsys.readouterr().err
    assert "[artifact.hash-mismatch]" in error
    assert name in error


def test_a_wrong_weight_fails_and_its_layer_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _sabotage(copy)
    assert main(["verify", str(copy), "--windows", "1"]) == 7
    text = capsys.readouterr()
    assert "[verify.parity]" in text.err
    assert "model.layers.1.mlp" in text.err
    assert "verify FAILED" in text.out
    report = _report(copy)
    assert report["verdict"] == "fail"
    assert report["failure"]["error"] == "verify.parity"
    assert "model.layers.1.mlp" in report["failure"]["at"]
    assert "model.layers.1.mlp" in (copy / "report.html").read_text(encoding="utf-8")
    Artifact.load(copy)

    assert main(["verify", str(copy), "--goldens-only", "--json"]) == 7
    assert json.loads(capsys.readouterr().out)["error"] == "verify.parity"


def test_without_the_source_the_goldens_are_offered(
    copy: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = Artifact.load(copy)
    artifact.manifest.source.reference = str(tmp_path / "moved")
    artifact.write_manifest()
    assert main(["verify", str(copy)]) == 5
    error = capsys.readouterr().err
    assert "[verify.source-missing]" in error
    assert "--goldens-only" in error
    assert main(["verify", str(copy), "--goldens-only", "-q"]) == 0
    assert main(["verify", str(copy), "--source", str(tiny), "--windows", "1", "-q"]) == 0


def test_another_source_is_refused(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=1)
    assert main(["verify", str(copy), "--source", str(other)]) == 5
    error = capsys.readouterr().err
    assert "[verify.source-changed]" in error
    assert "model.safetensors" in error


def test_goldens_only_takes_nothing_else(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy), "--goldens-only", "--windows", "2"]) == 2
    assert "[verify.goldens-only]" in capsys.readouterr().err


def test_onnxruntime_targets_have_nothing_to_build(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(copy)]) == 2
    assert "[target.nothing-to-build]" in capsys.readouterr().err


def test_an_engine_is_built_and_listed(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "out"
    arguments = ["convert", str(tiny), "-o", str(out), "--target", "rtx", "--cc", "8.6", "--seq-len", "8"]
    assert main([*arguments, "--attn-res", "block:2", "--windows", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["stages"][-1]["name"] == "build"
    assert report["engines"]["rtx"]["compute_capabilities"] == ["SM86"]
    assert "engine/rtx/model.engine" in report["files"]

    assert main(["build", str(out), "--cc", "SM120", "--cc", "SM86"]) == 0
    assert "SM86, SM120" in capsys.readouterr().out
    artifact = Artifact.load(out)
    assert artifact.manifest.engines["rtx"].compute_capabilities == ["SM86", "SM120"]
    report = _report(out)
    assert report["engines"]["rtx"]["compute_capabilities"] == ["SM86", "SM120"]
    assert report["verdict"] == "pass"


def test_convert_keeps_what_failed_and_says_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from depthwire.export import to_onnx as module

    real = module.to_onnx

    def wrong(*arguments: Any, **options: Any) -> Any:
        """Translate, then drop the MLP's activation of the first layer."""
        model = real(*arguments, **options)
        sigmoid = next(node for node in model.graph if node.op_type == "Sigmoid")
        sigmoid.op_type = "Tanh"
        return model

    monkeypatch.setattr(module, "to_onnx", wrong)
    out = tmp_path / "out"
    assert main(["convert", str(tiny), "-o", str(out), "--seq-len", "8", "--attn-res", "full"]) == 7
    text = capsys.readouterr()
    assert "[verify.parity]" in text.err
    assert "model.layers.0.mlp" in text.err
    assert "✗  verify" in text.err
    assert "verify FAILED" in text.out
    assert Artifact.load(out)
    report = _report(out)
    assert report["verdict"] == "fail"
    assert report["stages"][-1]["error"] == "verify.parity"
