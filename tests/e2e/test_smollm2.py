"""The main job on a real trained model: what the README promises of SmolLM2-135M."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from depthwire.artifact import Artifact
from tests.e2e.conftest import run
from tests.e2e.sabotage import (
    drop_eps_correction,
    drop_source,
    exchange_sources,
    perturb_query,
    reads,
    reverse_sources,
    sabotaged,
)

pytestmark = pytest.mark.xdist_group("smollm2")


def _report(artifact: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((artifact / "report.json").read_text(encoding="utf-8"))
    return report


# NLL of the dequantised model on the first four windows, measured with transformers alone.
REFERENCE_NLL = (3.09206, 3.05526, 3.16782, 3.24658)


def test_parity_on_four_windows_of_real_text(smollm2_artifact: Path) -> None:
    verify = _report(smollm2_artifact)["verify"]
    assert verify["passed"] is True
    assert [(p["expected"], p["actual"]) for p in verify["comparisons"]] == [
        ("original", "rewritten"),
        ("rewritten", "onnxruntime"),
        ("original", "onnxruntime"),
    ]
    for pair in verify["comparisons"]:
        assert len(pair["windows"]) == 4
        for window, nll in zip(pair["windows"], REFERENCE_NLL, strict=True):
            (logits,) = window["outputs"]
            assert logits["shape"] == [1, 512, 49152]
            assert logits["max_abs"] <= 2e-5 * logits["max_expected"]
            top1 = window["top1"]["logits"]
            assert top1["positions"] == 512
            assert top1["beyond"] == 0
            assert abs(window["nll"]["difference"]) <= 1e-5
            assert window["nll"]["expected"] == pytest.approx(nll, abs=5e-5)


def test_the_structure_is_the_models(smollm2_artifact: Path) -> None:
    manifest = Artifact.load(smollm2_artifact).manifest
    # 60 sublayers in 8 blocks; the first read has one source and is no read.
    forms = {name.split("::")[-1].rpartition("_")[0]: 0 for name in manifest.custom_ops}
    for name, op in manifest.custom_ops.items():
        forms[name.split("::")[-1].rpartition("_")[0]] += op.count
    assert sum(count for form, count in forms.items() if "Read" in form or "Merge" in form) == 60
    assert all(form == "AttnResInter" or form.endswith("Norm") for form in forms)
    # Phase 1 sees up to eight completed blocks; a merge adds the open one.
    assert forms["AttnResInter"] >= 4
    assert all(op.body for op in manifest.custom_ops.values())
    assert manifest.opsets[""] == 23
    assert manifest.dtypes.get("float32", 0) > 0
    assert (smollm2_artifact / "model.onnx").stat().st_size < 1 << 20


def test_value_names_are_fx_names_and_node_names_are_unique(smollm2_artifact: Path) -> None:
    graph = onnx.load(smollm2_artifact / "model.onnx", load_external_data=False).graph
    names = [node.name for node in graph.node]
    assert len(names) == len(set(names))
    points = {point.value for point in Artifact.load(smollm2_artifact, check_hashes=False).manifest.checkpoints}
    produced = {output for node in graph.node for output in node.output}
    assert len(points) == 121
    assert points <= produced
    assert {tensor.name for tensor in graph.initializer} >= {f"attn_res.query.{k}" for k in range(1, 61)}
    assert str(Path.home()) not in str(graph)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that sees onnxruntime and numpy (with what they need) and nothing else."""
    root = tmp_path_factory.mktemp("bare")
    venv.create(root, with_pip=False, symlinks=True)
    site = next(root.glob("lib/python*/site-packages"))
    source = Path(np.__file__).parent.parent
    wanted = ("numpy", "numpy.libs", "onnxruntime", "onnxruntime.libs", "flatbuffers", "packaging", "google")
    for name in wanted:
        if (source / name).exists():
            (site / name).symlink_to(source / name)
    return root / "bin" / "python"


def test_runs_with_onnxruntime_and_numpy_alone(smollm2_artifact: Path, bare_python: Path) -> None:
    code = """
import importlib.util, sys
for absent in ("torch", "onnx", "depthwire", "transformers"):
    assert importlib.util.find_spec(absent) is None, absent
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
ids = numpy.arange(512, dtype=numpy.int64)[None]
(logits,) = session.run(None, {"input_ids": ids})
assert logits.shape == (1, 512, 49152) and numpy.isfinite(logits).all()
print("ran")
"""
    done = subprocess.run(
        [bare_python, "-I", "-c", code, smollm2_artifact / "model.onnx"], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "ran", done.stderr


def _polygraphy(line: str) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(line)
    assert program == "polygraphy"
    command = [str(Path(sys.executable).with_name("polygraphy")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_printed_polygraphy_line_repeats_the_comparison(smollm2_artifact: Path) -> None:
    done = _polygraphy(_report(smollm2_artifact)["verify"]["polygraphy"])
    assert done.returncode == 0, done.stdout[-2000:]
    assert "PASSED" in done.stdout


FAULTS = {
    "no-eps-correction": (drop_eps_correction, "model.layers.0.post_attention_layernorm"),
    "query-perturbed": (perturb_query(30), "model.layers.15.input_layernorm"),
    "source-dropped": (drop_source(21), "model.layers.10.post_attention_layernorm"),
    "sources-exchanged": (exchange_sources(9, 40), "model.layers.4.post_attention_layernorm"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sabotaged_graph_fails_and_the_layer_is_named(fault: str, short_artifact: Path, tmp_path: Path) -> None:
    sabotage, module = FAULTS[fault]
    broken = sabotaged(short_artifact, tmp_path / "broken", sabotage)
    done = run("verify", broken, "--windows", "1", "--json")
    assert done.returncode == 7, done.stderr
    assert module in done.stdout + done.stderr


def test_the_order_of_sources_does_not_matter(short_artifact: Path, tmp_path: Path) -> None:
    same = sabotaged(short_artifact, tmp_path / "same", reverse_sources(40))
    graph = onnx.load(same / "model.onnx", load_external_data=False).graph
    assert len(reads(graph)) == 60
    done = run("verify", same, "--goldens-only")
    assert done.returncode == 0, done.stderr


def test_one_changed_byte_is_found(short_artifact: Path, tmp_path: Path) -> None:
    copy = sabotaged(short_artifact, tmp_path / "copy", lambda _: None)
    weights = copy / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    weights.unlink()
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    done = run("verify", copy, "--goldens-only")
    assert done.returncode == 5
    assert "model.onnx.data" in done.stderr
