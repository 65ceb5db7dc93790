"""The report: what it says for every verdict, and that its page is safe and self-contained."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from depthwire.artifact import Artifact, Manifest, SourceInfo
from depthwire.errors import BuildError, ParityError
from depthwire.report import make_report, read_report, render_html, verdict_of, write_report
from depthwire.stages import Stages

if TYPE_CHECKING:
    from pathlib import Path

VERIFY: dict[str, Any] = {
    "passed": True,
    "windows": 1,
    "seconds": 1.5,
    "comparisons": [
        {
            "expected": "original",
            "actual": "onnxruntime",
            "passed": True,
            "windows_asked": 1,
            "problems": [],
            "windows": [
                {
                    "passed": True,
                    "outputs": [
                        {
                            "name": "logits",
                            "passed": True,
                            "problem": None,
                            "allowed": 1e-5,
                            "max_abs": 1.25e-7,
                            "mean_abs": 1e-8,
                            "p99_abs": 1e-7,
                            "cosine": 1.0,
                        }
                    ],
                    "top1": {"logits": {"flips": 1, "positions": 8, "largest_gap": 3e-9}},
                    "nll": {"difference": -4e-9},
                    "notes": [],
                }
            ],
        }
    ],
    "first_divergence": None,
    "polygraphy": "polygraphy run out/model.onnx",
    "tools": {},
}


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """An artefact directory with nothing but a manifest."""
    manifest = Manifest(
        depthwire="0.1.0",
        created="2026-01-01T00:00:00+00:00",
        source=SourceInfo(kind="module", reference="models.Tiny", model="<script>alert(1)</script>"),
        recipe={"target": "ort-cpu", "attn_res": "full"},
        inputs=[],
        outputs=[],
        opsets={"": 23},
    )
    (tmp_path / "model.onnx").write_bytes(b"graph")
    found = Artifact(tmp_path, manifest)
    found.add_file("model.onnx")
    return found


def _stages(*names: str) -> Stages:
    stages = Stages()
    for name in names:
        with stages.stage(name, f"detail of {name}"):
            pass
    return stages


class _Balance(HTMLParser):
    """Checks that tags close in order and collects every address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _check(page: str) -> None:
    balance = _Balance()
    balance.feed(page)
    assert balance.open == []
    assert balance.addresses == []
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page


def test_a_verdict_needs_a_comparison() -> None:
    assert verdict_of(None, None) == "not verified"
    assert verdict_of({"passed": True}, None) == "pass"
    assert verdict_of({"passed": False}, None) == "fail"
    assert verdict_of({"passed": True}, BuildError("build.x", "no")) == "fail"


def test_the_report_is_written_and_vouched_for(artifact: Artifact) -> None:
    assert read_report(artifact) is None
    write_report(artifact, make_report(artifact, _stages("capture", "verify"), verify=VERIFY))
    report = read_report(Artifact.load(artifact.root))
    assert report is not None
    assert report["verdict"] == "pass"
    assert set(report["files"]) == {"model.onnx"}
    page = (artifact.root / "report.html").read_text(encoding="utf-8")
    _check(page)
    assert "&lt;script&gt;alert(1)" in page
    for word in (
        "1.25e-07",
        "1 of 8, largest gap 3e-09",
        "-4e-09",
        "polygraphy run out/model.onnx",
        "detail of verify",
    ):
        assert word in page


def test_later_verbs_replace_their_own_sections(artifact: Artifact) -> None:
    structure = {"origin": {"module": "embed"}, "width": 8, "sublayers": [], "breaks": []}
    write_report(artifact, make_report(artifact, _stages("capture", "export"), structure=structure))
    first = read_report(artifact)
    assert first is not None
    write_report(artifact, make_report(artifact, _stages("load", "capture", "verify"), verify=VERIFY))
    second = read_report(artifact)
    assert second is not None
    assert [stage["name"] for stage in second["stages"]] == ["capture", "export", "verify"]
    assert second["stages"][0] == first["stages"][0]
    assert second["structure"] == structure
    write_report(artifact, make_report(artifact, _stages("load", "build")))
    third = read_report(artifact)
    assert third is not None
    assert third["verify"] == VERIFY
    assert [stage["name"] for stage in third["stages"]] == ["capture", "export", "verify", "build"]


def test_a_failure_is_told_with_its_place(artifact: Artifact) -> None:
    verify = copy.deepcopy(VERIFY)
    verify["passed"] = False
    verify["comparisons"][0]["problems"] = ["a window is missing"]
    verify["comparisons"][0]["windows"][0]["outputs"][0] |= {"passed": False, "problem": "NaN at [0]"}
    verify["first_divergence"] = {
        "note": "It starts here.",
        "window": 0,
        "checked": 3,
        "skipped": 0,
        "trail": [],
        "first": {
            "value": "add_6",
            "layer": 1,
            "role": "write",
            "module": "layers.1.mlp",
            "pair": "rewrite",
            "result": {"allowed": 1e-6, "max_abs": 2e-3, "problem": None},
        },
    }
    failure = ParityError("verify.parity", "They differ", at="layers.1.mlp", todo="Do not use it.")
    report = make_report(artifact, _stages("verify"), verify=verify, failure=failure)
    assert report["verdict"] == "fail"
    assert json.loads(json.dumps(report)) == report
    page = render_html(report)
    _check(page)
    for word in ("They differ", "layers.1.mlp", "It starts here.", "0.002", "a window is missing", "NaN at [0]"):
        assert word in page
