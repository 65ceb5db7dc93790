"""``convert``, ``export`` and ``rewrite`` from end to end on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from depthwire.artifact import Artifact
from depthwire.cli.main import main
from depthwire.recipe import load_recipe

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

STAGES = ["capture", "rewrite", "goldens", "export", "verify"]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_people_see_stages_numbers_and_paths(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(tiny), "-o", "out", "--attn-res", "block:2", "--seq-len", "16"]) == 0
    text = capsys.readouterr()
    lines = text.err.splitlines()
    assert [line.split()[1] for line in lines] == STAGES
    assert all(line.startswith("✓") and " s " in line and " peak" in line for line in lines)
    assert "peak RSS MB" in text.out
    assert "verify PASSED: 4 windows" in text.out
    assert "polygraphy run out/model.onnx" in text.out
    assert text.out.rstrip().endswith("out/report.html")
    assert _names(tmp_path) == ["out"]


def test_the_artefact_vouches_for_its_reports(converted: Path) -> None:
    artifact = Artifact.load(converted)
    assert {"report.json", "report.html", "model.onnx", "model.onnx.data"} <= set(artifact.manifest.files)
    report = json.loads((converted / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "pass"
    assert report["failure"] is None
    assert [stage["name"] for stage in report["stages"]] == STAGES
    assert all(stage["ok"] and stage["peak_rss_bytes"] > 0 for stage in report["stages"])
    assert [layer["kind"] for layer in report["structure"]["sublayers"]] == ["attention", "mlp"] * 2
    assert report["verify"]["passed"] is True
    assert report["recipe"]["source"]["seq_len"] == 16
    page = (converted / "report.html").read_text(encoding="utf-8")
    for word in (
        "model.layers.1.mlp",
        "lift_attn_res",
        "original → onnxruntime",
        artifact.manifest.files["model.onnx"].sha256,
    ):
        assert word in page
    assert "http" not in page.replace("http-equiv", "")


def test_json_is_one_document_and_nothing_else(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(tiny), "-o", str(out), "--seq-len", "8", "--windows", "2", "--json"]) == 0
    text = capsys.readouterr()
    assert json.loads(text.out) == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert text.err == ""


def test_a_fresh_process_is_quiet_but_for_the_stages(tiny: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "depthwire", "convert", str(tiny), "-o", "out", "--seq-len", "8", "--attn-res", "full"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split()[:2] for line in done.stderr.splitlines()] == [["✓", name] for name in STAGES]


def test_a_dry_run_plans_and_writes_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(tiny), "-o", str(tmp_path / "out"), "--attn-res", "block:2", "--dry-run"]
    saved = ["--save-recipe", str(tmp_path / "recipe.yaml")]
    assert main([*arguments, *saved, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    lift = next(record for record in plan["passes"] if record["name"] == "lift_attn_res")
    assert lift["rewrites"] == 4
    assert len(plan["structure"]["sublayers"]) == 4
    assert plan["target"]["name"] == "ort-cpu"
    assert plan["target"]["engine"] is False
    assert plan["bytes"]["weights"] > 0
    assert plan["fits"] is True
    assert main(arguments) == 0
    assert "nothing is written" in capsys.readouterr().out
    assert _names(tmp_path) == []


def test_a_saved_recipe_repeats_the_run(tiny: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    options = ["--attn-res", "block-layers:1", "--correction", "scale", "--seq-len", "8", "--no-verify"]
    assert main(["convert", str(tiny), "-o", str(out), *options, "--save-recipe", str(recipe), "-q"]) == 0
    first = Artifact.load(out)
    assert load_recipe(recipe).resolved() == first.manifest.recipe
    again = tmp_path / "again"
    assert main(["convert", "--recipe", str(recipe), "-o", str(again), "-q"]) == 0
    second = Artifact.load(again)
    assert second.manifest.files["model.onnx"] == first.manifest.files["model.onnx"]
    assert second.manifest.recipe == {**first.manifest.recipe, "out": str(again)}


def test_an_artefact_is_replaced_and_nothing_else_is(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(tiny), "-o", str(out), "--seq-len", "8", "--no-verify", "-q"]
    assert main(arguments) == 0
    assert main([*arguments, "--attn-res", "full"]) == 0
    assert Artifact.load(out).manifest.recipe["attn_res"] == "full"
    assert _names(tmp_path) == ["out"]

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work", encoding="utf-8")
    capsys.readouterr()
    for force in ([], ["--force"]):
        assert main(["convert", str(tiny), "-o", str(mine), *force]) == 2
        assert "[export.output-exists]" in capsys.readouterr().err
    assert (mine / "thesis.tex").read_text(encoding="utf-8") == "years of work"


def test_force_replaces_an_artefact_with_a_broken_manifest(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(tiny), "-o", str(out), "--seq-len", "8", "--no-verify", "-q"]
    assert main(arguments) == 0
    (out / "manifest.json").write_text("{", encoding="utf-8")
    assert main(arguments) == 2
    assert main([*arguments, "--force"]) == 0
    assert Artifact.load(out).manifest.recipe["out"] == str(out)


def test_export_writes_what_verify_then_proves(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(tiny), "-o", str(out), "--attn-res", "full", "--seq-len", "8"]) == 0
    assert "wrote" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "not verified"
    assert report["verify"] is None
    assert main(["verify", str(out), "--windows", "2", "-q"]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "pass"
    assert report["verify"]["windows"] == 2
    assert [stage["name"] for stage in report["stages"]] == STAGES
    Artifact.load(out)


def test_a_rewritten_program_can_be_trained_and_converted(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    file, out = tmp_path / "lifted.pt2", tmp_path / "out"
    assert main(["rewrite", str(tiny), "-o", str(file), "--attn-res", "full", "--seq-len", "8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"] == file.stat().st_size
    assert _names(tmp_path) == ["lifted.pt2"]
    module = torch.export.load(file).module()
    queries = [name for name, _ in module.named_parameters() if "quer" in name]
    assert queries
    assert main(["convert", str(file), "-o", str(out), "-q"]) == 0
    assert any("AttnResRead" in name for name in Artifact.load(out).manifest.custom_ops)


def test_inspect_shows_a_model_and_an_artefact(tiny: Path, converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny), "--seq-len", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["module"] for layer in found["structure"]["sublayers"]][:2] == [
        "model.layers.0.self_attn",
        "model.layers.0.mlp",
    ]
    assert main(["inspect", str(tiny), "--seq-len", "8"]) == 0
    text = capsys.readouterr().out
    assert "RMSNorm model.norm" in text
    assert "the stream can be lifted" in text
    assert main(["inspect", str(converted), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["recipe"]["attn_res"] == "full"
    assert main(["inspect", str(converted)]) == 0
    text = capsys.readouterr().out
    plain = " ".join(text.replace("│", " ").split())  # the cell breaks where it is full
    assert "depthwire::AttnResReadNorm_5 1 (with a function body)" in plain
    assert "[1, 16, 97]" in text
