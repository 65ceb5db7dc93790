"""``plan`` and ``targets``: what is printed, as text and as JSON, and one clear error for what cannot be meant."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest

import depthwire
from depthwire.artifact import Artifact
from depthwire.cli.main import main
from depthwire.errors import BuildError
from depthwire.export._route_manifest import graph_name
from tests.routed_tiny import write_routed

if TYPE_CHECKING:
    from pathlib import Path

QUARTER = Fraction(1, 4)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_every_precision_of_every_target_asked_for(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = planned(capsys, converted, "--target", "rtx", "--target", "jetson-orin-nano-4", "--target", "ort-cuda")
    (artifact,) = document["artifacts"]
    assert artifact["bucket"] == "input_ids [1, 16]"
    (graph,) = artifact["graphs"]
    assert (graph["graph"], graph["capacity"]) == ("model.onnx", None)
    manifest = Artifact.load(converted).manifest
    found = {target["target"]: {row["precision"]: row for row in target["precisions"]} for target in graph["targets"]}
    assert [*found["rtx"]] == ["fp32", "fp16", "bf16", "int8", "int4-weights"]
    assert [*found["ort-cuda"]] == ["fp32", "fp16", "bf16", "int8"]
    rtx = found["rtx"]["fp32"]
    assert rtx["own"]
    assert not found["rtx"]["fp16"]["own"]
    assert rtx["weight_bytes"] == graph["weight_bytes"] >= manifest.weight_bytes
    assert rtx["engine_bytes"] > rtx["weight_bytes"] > found["rtx"]["fp16"]["weight_bytes"]
    assert rtx["weight_bytes"] > rtx["embedding_bytes"] > 0
    sizes = [found["rtx"][name]["weight_bytes"] for name in ("fp32", "fp16", "int8", "int4-weights")]
    assert sizes == sorted(sizes, reverse=True)
    assert found["ort-cuda"]["fp32"]["engine_bytes"] is None
    assert document["fits"] is True


def test_without_a_target_it_is_the_artefacts_own(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = planned(capsys, converted)
    assert [target["target"] for target in document["artifacts"][0]["graphs"][0]["targets"]] == ["ort-cpu"]


def test_every_capacity_and_every_bucket(tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    write_routed(short, (QUARTER,))
    write_routed(long, ())
    found = depthwire.plan([short, long], target="rtx")
    assert [each.directory for each in found.artifacts] == [short, long]
    first, second = (each.graphs for each in found.artifacts)
    assert [(graph.file, graph.capacity) for graph in first] == [("model.onnx", "1/2"), (graph_name(QUARTER), "1/4")]
    assert len(second) == 1
    assert first[0].facts.weights.linear == first[1].facts.weights.linear


def test_an_engine_that_was_built_stands_beside_its_prediction(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "out"
    command = ["convert", str(tiny), "-o", str(out), "--seq-len", "16", "--target", "rtx", "--cc", "SM86"]
    assert main([*command, "--no-verify", "-q"]) == 0
    engine = Artifact.load(out).manifest.engines["rtx"]
    (measured,) = planned(capsys, out)["artifacts"][0]["measured"]
    assert (measured["target"], measured["source"]) == ("rtx", "manifest")
    assert measured["engine_bytes"] == engine.bytes
    assert measured["build_bytes"] == engine.peak_rss_bytes
    assert measured["predicted_build_bytes"] == engine.predicted_rss_bytes
    row = planned(capsys, out)["artifacts"][0]["graphs"][0]["targets"][0]["precisions"][0]
    assert measured["predicted_engine_bytes"] == row["engine_bytes"]
    assert main(["plan", str(out)]) == 0
    text = capsys.readouterr().out
    assert "measured" in text
    assert "fp16 (convert)" in text


@pytest.mark.parametrize("problem", [None, "killed"])
def test_what_a_device_measured_stands_beside_it_too(
    problem: str | None, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(converted, tmp_path / "out")
    sizes = {"bytes": 12345, "peak_rss_bytes": 678} if problem is None else {"problem": problem}
    result = {
        "schema_version": 1,
        **dict.fromkeys(("depthwire", "bundle_sha256", "package", "started", "verdict", "reason"), ""),
        "target": "jetson-orin-nano-8",
        "form": "function",
        "precision": "fp32",
        "seconds": 1.0,
        "exit_code": 0,
        "builds": [{"model": "model.onnx", "engine": "model.engine", **sizes}],
        "comparisons": [{"model": "model.onnx", "engine": "model.engine", "windows": [], "activation_bytes": 90}],
    }
    name = "engine/jetson-orin-nano-8/result.json"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text(json.dumps(result), encoding="utf-8")
    artifact = Artifact.load(out)
    artifact.add_file(name)
    artifact.write_manifest()
    measured = planned(capsys, out)["artifacts"][0]["measured"]
    if problem is not None:
        assert measured == []
        return
    (row,) = measured
    assert (row["target"], row["source"], row["graph"]) == ("jetson-orin-nano-8", name, "model.onnx")
    assert (row["engine_bytes"], row["build_bytes"], row["activation_bytes"]) == (12345, 678, 90)
    assert row["predicted_build_bytes"] > 678


def test_a_board_without_the_memory_says_why(
    converted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from depthwire.runtime import target as module

    board = module.load_target("jetson-orin-nano-4")
    small = board.model_copy(update={"memory_bytes": board.reserved_bytes + 10**8})
    monkeypatch.setattr(module, "load_target", lambda name, jetpack=None: small)  # noqa: ARG005
    assert planned(capsys, converted, "--target", "jetson-orin-nano-4")["fits"] is False
    assert main(["plan", str(converted), "--target", "jetson-orin-nano-4"]) == 0
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "Building the engine needs more memory" in text


@pytest.mark.parametrize("name", ["h100", "jetson-agx-orin", "dgx-spark"])
def test_an_engine_of_a_device_is_not_built_here(name: str, converted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(converted, tmp_path / "copy")
    with pytest.raises(BuildError) as caught:
        depthwire.build(copy, target=name)
    assert caught.value.code == "build.on-device"
    assert "depthwire bundle DIRECTORY --target" in (caught.value.todo or "")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--target", "ort-cuda", "--precision", "int4-weights"), "ort-cuda"),
        (("--target", "rtx", "--precision", "int4-weights", "--cc", "SM75"), "rtx for SM75"),
        (("--target", "ort-cpu", "--precision", "bf16"), "ort-cpu"),
    ],
)
def test_a_precision_that_a_target_lacks_ends_a_conversion_before_it_begins(
    options: tuple[str, ...], word: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "rtx" in options:
        pytest.importorskip("tensorrt_rtx")
    assert main(["convert", str(tiny), "-o", str(tmp_path / "out"), *options, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)
    assert error["error"] == "target.precision-unsupported"
    assert word in error["what"]
    assert not (tmp_path / "out").exists()


def test_the_list_of_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    text = capsys.readouterr().out
    assert "TensorRT 10.3 (6.2)" in text
    assert "not int4-weights" in text
    assert "75 80 86" in text
    assert main(["targets", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {target["name"] for target in document["targets"]} >= {"rtx", "h100", "jetson-thor-t5000"}


def test_one_target_in_full_and_under_another_jetpack(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "jetson-agx-orin"]) == 0
    text = capsys.readouterr().out
    for word in ("jetson-agx-orin-64", "RMSNormalization", "3840", "DLA", "with --jetpack", "not confirmed"):
        assert word in text
    assert main(["targets", "jetson-agx-orin", "--jetpack", "7.2.2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["tensorrt"], document["strongly_typed"]) == ("11.4.1", True)
    assert main(["targets", "--jetpack", "7.2"]) == 2
    assert "capture.option-without-effect" in capsys.readouterr().err


def test_a_precision_limited_to_some_gpus_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "rtx"]) == 0
    text = capsys.readouterr().out
    assert "SM87: Jetson Orin is not an RTX target" in text
