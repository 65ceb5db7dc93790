"""Half precision on a real trained model: what the README promises of ``--precision``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from depthwire.artifact import REPORT, Artifact
from tests.e2e.conftest import TEXT, run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.xdist_group("smollm2")

SHAPE = ("--attn-res", "block:8", "--seq-len", "512", "--windows", "2", "--text", TEXT, "--calibration-windows", "1")
FP32_BYTES = 4 * 134_515_008


def test_fp16_on_real_text(smollm2_dir: Path, tmp_path: Path) -> None:
    """Four windows, and the other precisions: ``python -m benchmarks.precision``."""
    out = tmp_path / "fp16"
    limits = ("--min-top1-agreement", "0.995", "--max-perplexity-increase", "0.005")
    target = ("--target", "rtx", "--cc", "SM86", "--precision", "fp16")
    done = run("convert", smollm2_dir, *SHAPE, *target, *limits, "-o", out)
    assert done.returncode == 0, done.stderr
    artifact = Artifact.load(out)
    info = artifact.manifest.precision
    assert info is not None
    assert info.weight_bytes + info.embedding_bytes < 0.51 * FP32_BYTES
    assert info.quality["nll"]["original"] == pytest.approx((3.09206 + 3.05526) / 2, abs=2e-4)
    comparisons = json.loads(artifact.path(REPORT).read_text(encoding="utf-8"))["verify"]["comparisons"]
    (structure,) = [pair for pair in comparisons if pair["expected"] == "deployed"]
    assert structure["passed"]
    assert len(structure["windows"]) == 2
    engine = artifact.manifest.engines["rtx"]
    assert engine.bytes <= 0.55 * FP32_BYTES
    assert engine.dtypes["float16"] > 1000
