"""What routing costs in quality is stated, and held against a budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from depthwire.artifact import REPORT
from depthwire.cli.main import main

DATA = Path(__file__).parent.parent / "data"
ARGUMENTS = [
    "convert",
    str(DATA / "attn_res_small"),
    *("--dtype", "fp32", "--seq-len", "32", "--windows", "1", "--text", str(DATA / "sotu-2000.txt")),
    *("--route-layers", "1", "--capacity", "0.5", "--route-seed", "0", "--quiet"),
]


def test_a_loss_beyond_the_budget_fails_with_both_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "worse"
    assert main([*ARGUMENTS, "--max-perplexity-increase", "0.001", "-o", str(out)]) == 7
    shown = capsys.readouterr().err
    assert shown.count("error:") == 1
    assert "quality.perplexity" in shown
    report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    assert report["failure"]["error"] == "quality.perplexity"
    assert report["verdict"] != "pass"


def test_a_loss_within_the_budget_is_stated(tmp_path: Path) -> None:
    out = tmp_path / "kept"
    assert main([*ARGUMENTS, "--max-perplexity-increase", "100", "-o", str(out)]) == 0
    quality = json.loads((out / REPORT).read_text(encoding="utf-8"))["quality"]
    before, after = quality["perplexity"]["original"], quality["perplexity"]["routed"]
    assert after > before
    assert quality["perplexity_increase"] == pytest.approx(after / before - 1)
    assert 0 < quality["top1_agreement"] < 1
