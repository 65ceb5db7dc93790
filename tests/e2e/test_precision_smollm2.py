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

LIFTED = ("--attn-res", "block:8", "--seq-len", "512", "--windows", "4", "--text", TEXT, "--target", "rtx")


@pytest.mark.parametrize(("precision", "agreement"), [("fp16", "0.995"), ("bf16", "0.97")])
def test_four_windows_of_real_text(smollm2_dir: Path, tmp_path: Path, precision: str, agreement: str) -> None:
    out = tmp_path / precision
    build = ("--cc", "SM86") if precision == "fp16" else ("--no-build",)
    limits = ("--min-top1-agreement", agreement, "--max-perplexity-increase", "0.005")
    done = run("convert", smollm2_dir, *LIFTED, "--precision", precision, *limits, *build, "-o", out)
    assert done.returncode == 0, done.stderr
    artifact = Artifact.load(out)
    info = artifact.manifest.precision
    assert info is not None
    fp32 = 4 * 134_515_008
    assert info.weight_bytes + info.embedding_bytes < 0.51 * fp32
    assert info.quality["nll"]["original"] == pytest.approx(3.14043, abs=2e-4)
    (structure,) = [
        pair
        for pair in json.loads(artifact.path(REPORT).read_text(encoding="utf-8"))["verify"]["comparisons"]
        if pair["expected"] == "deployed"
    ]
    assert structure["passed"]
    assert len(structure["windows"]) == 4
    if precision == "fp16":
        engine = artifact.manifest.engines["rtx"]
        assert engine.bytes <= 0.55 * fp32
        assert engine.dtypes["float16"] > 1000
