"""``--precision`` from end to end: what is written, proved, stated and refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import depthwire
from depthwire._quality import quality_stage
from depthwire.artifact import MODEL, REPORT, Artifact
from depthwire.cli.main import main
from depthwire.errors import ExportError, ParityError
from depthwire.export.census import check_census, check_scales
from depthwire.export.to_onnx import to_onnx
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.cast_precision import CastPrecision
from depthwire.passes.standard import standard_pipeline
from depthwire.recipe import Recipe
from depthwire.runtime.twin import twin_of
from depthwire.runtime.verify import verify
from depthwire.stages import Stages
from tests.cli.models import tiny_llama

if TYPE_CHECKING:
    from depthwire.program import Program

DATA = Path(__file__).parent.parent / "data"
TEXT = str(DATA / "sotu-2000.txt")
SHAPE = ("--seq-len", "32", "--windows", "2", "--calibration-windows", "2", "--quiet")
RTX = ("--target", "rtx", "--no-build")
STORED = {"fp16": "float16", "bf16": "bfloat16", "int8": "int8", "int4-weights": "int4"}


def convert(out: Path, precision: str, *more: str) -> int:
    text = ("--text", TEXT, "--precision", precision)
    return main(["convert", str(DATA / "attn_res_small"), *SHAPE, *text, *more, "-o", str(out)])


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with trained AttnRes in every precision, verified."""
    root = tmp_path_factory.mktemp("precision")
    found = {precision: root / precision for precision in STORED}
    for precision, out in found.items():
        assert convert(out, precision, *RTX) == 0
    return found


@pytest.mark.parametrize("precision", STORED)
def test_the_manifest_says_what_was_done_and_what_it_costs(artifacts: dict[str, Path], precision: str) -> None:
    artifact = Artifact.load(artifacts[precision])
    info = artifact.manifest.precision
    assert info is not None
    assert (info.asked, info.rest) == (precision, precision if precision in ("fp16", "bf16") else "fp16")
    assert info.census[STORED[precision]] > 10
    assert info.islands["norms"] > 0
    assert info.calibration == "2 windows of sotu-2000.txt"
    assert 1 < (info.largest or 0) < 65504
    assert info.quality["actual"] == "deployed"
    assert info.quality["top1_agreement"] > 0.9
    assert abs(info.quality["perplexity_increase"]) < 0.1
    assert [(each.name, each.dtype) for each in artifact.manifest.outputs] == [("logits", "float32")]
    report = json.loads(artifact.path(REPORT).read_text(encoding="utf-8"))
    assert report["quality"] == info.quality
    pairs = [(pair["expected"], pair["actual"], pair["passed"]) for pair in report["verify"]["comparisons"]]
    assert pairs == [("original", "rewritten", True), ("deployed", "onnxruntime", True)]


def test_sizes_follow_the_precision(artifacts: dict[str, Path]) -> None:
    sizes = {name: Artifact.load(path).manifest.precision for name, path in artifacts.items()}
    stored = {name: info.weight_bytes for name, info in sizes.items() if info is not None}
    assert stored["bf16"] == stored["fp16"]
    assert stored["int4-weights"] < stored["int8"] < stored["fp16"]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4-weights"])
def test_the_goldens_are_what_the_deployed_model_answers(artifacts: dict[str, Path], precision: str) -> None:
    assert main(["verify", str(artifacts[precision]), "--goldens-only", "--quiet"]) == 0


def test_verify_makes_the_same_weights_again(artifacts: dict[str, Path]) -> None:
    assert main(["verify", str(artifacts["int8"]), "--quiet"]) == 0


def test_a_scale_that_is_wrong_fails_the_comparison(artifacts: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifacts["int4-weights"], copy)
    recorded = Artifact.load(copy)
    program = recaptured(recorded)
    model = onnx.load(str(copy / MODEL))
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    scale = next(each for each in model.graph.initializer if each.name == node.input[1])
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))
    windows = [{"input_ids": program.example_inputs["input_ids"].numpy()}]
    with twin_of(recorded) as twin:
        assert verify(twin, original=None, rewritten=None, deployed=program, windows=windows).passed
    onnx.save(model, str(copy / MODEL))
    with twin_of(Artifact(copy, recorded.manifest)) as twin:
        report = verify(twin, original=None, rewritten=None, deployed=program, windows=windows)
    assert not report.passed


def recaptured(artifact: Artifact) -> Program:
    """The fp32 twin of an artefact's program."""
    from depthwire import _flow
    from depthwire.runtime.target import load_target

    recipe, stages = _flow.recorded_recipe(artifact), Stages()
    target = load_target(recipe.target)
    original = _flow.capture_stage(str(recipe.source.reference), recipe, stages)
    rewritten = _flow.rewrite_stage(original, recipe, target, stages)
    _, rewritten = _flow.precise(original, rewritten, recipe, target=target, count=2, stages=stages)
    assert rewritten.deployed is not None
    return rewritten.deployed.twin


def test_a_routed_model_tells_its_flips_and_shares_weights_between_capacities(tmp_path: Path) -> None:
    route = ("--route-layers", "2", "--capacity", "0.5", "--capacities", "25%", "--route-seed", "0")
    assert convert(tmp_path / "routed", "bf16", *RTX, *route) == 0
    artifact = Artifact.load(tmp_path / "routed")
    info = artifact.manifest.precision
    assert info is not None
    assert info.islands["scores"] > 0
    steps = info.quality["steps"]
    assert [(step["expected"], step["actual"]) for step in steps] == [("original", "routed"), ("routed", "deployed")]
    assert steps[1]["routing_flips"]["of"] == 2 * 32
    assert steps[1]["top1_agreement"] > steps[0]["top1_agreement"]
    route_info = artifact.manifest.route
    assert route_info is not None
    assert len(route_info.graphs) == 2


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        (("--precision", "fp16", "--precision-rest", "fp32", "--text", TEXT), 2, "precision.rest"),
        (("--precision", "int8"), 2, "precision.no-calibration"),
        (("--precision", "fp16", "--dtype", "bf16", "--text", TEXT), 4, "precision.not-fp32"),
        (("--precision", "int4-weights", "--min-top1-agreement", "1.0", "--text", TEXT), 7, "quality.top1"),
        (
            ("--precision", "int4-weights", "--target", "rtx", "--cc", "SM75", "--text", TEXT),
            2,
            "target.precision-unsupported",
        ),
    ],
)
def test_what_cannot_be_meant_or_costs_too_much(
    options: tuple[str, ...], status: int, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(DATA / "attn_res_small"), *SHAPE, *options, "-o", str(out)]) == status
    shown = capsys.readouterr().err
    assert shown.count("error:") == 1
    assert code in shown
    assert out.exists() == (status == 7)


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose second MLP makes values that float16 does not hold, and undoes it."""
    model = tiny_llama()
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight *= 1e8
        mlp.down_proj.weight *= 1e-8
    folder = tmp_path_factory.mktemp("loud") / "model"
    model.save_pretrained(folder)
    return folder


def test_a_model_too_narrow_for_the_blocks_of_int4_is_refused(
    loud: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows = tmp_path / "windows.npz"
    np.savez(windows, input_ids=np.arange(64, dtype=np.int64).reshape(2, 1, 32))
    options = (*SHAPE, "--precision", "int4-weights", "--inputs", str(windows), "-o", str(tmp_path / "a"))
    assert main(["convert", str(loud), *options]) == 4
    shown = capsys.readouterr().err
    assert "precision.nothing-quantised" in shown
    assert "model.layers.0" in shown


def test_values_beyond_float16_are_refused_by_layer(
    loud: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(loud), *SHAPE, "--precision", "fp16", "-o", str(tmp_path / "a")]) == 4
    shown = capsys.readouterr().err
    assert "precision.overflow" in shown
    assert "model.layers.1.mlp" in shown
    assert "--precision bf16" in shown
    assert not (tmp_path / "a").exists()
    assert main(["convert", str(loud), *SHAPE, "--precision", "bf16", *RTX, "-o", str(tmp_path / "b")]) == 0


def test_a_value_that_overflows_on_the_windows_is_refused(loud: Path) -> None:
    original = depthwire.capture(str(loud), seq_len=16)
    rewritten = standard_pipeline(attn_res=None).run(original)
    low = Pipeline((CastPrecision("fp16"),)).run(rewritten)
    windows = [{name: tensor.numpy() for name, tensor in original.example_inputs.items()}]
    with pytest.raises(ParityError) as caught:
        quality_stage({"original": original, "deployed": low}, windows, Recipe(), Stages())
    assert caught.value.code == "quality.not-finite"
    assert "model.layers.1.mlp" in str(caught.value.at)


@pytest.fixture(scope="module")
def rewritten(tiny: Path) -> Program:
    return standard_pipeline(attn_res=None).run(depthwire.capture(str(tiny), seq_len=16))


def test_the_census_refuses_a_graph_of_another_precision(rewritten: Program) -> None:
    low = Pipeline((CastPrecision("fp16"),)).run(rewritten)
    check_census(to_onnx(low), asked="fp16", rest="fp16", wide_products=0)
    asks: list[dict[str, Any]] = [
        {"asked": "fp16", "rest": "fp16", "wide_products": 0},
        {"asked": "int8", "rest": "fp32", "wide_products": 0},
    ]
    for ask in asks:
        with pytest.raises(ExportError) as caught:
            check_census(to_onnx(rewritten), **ask)
        assert caught.value.code == "export.precision"


def test_a_changed_scale_of_an_activation_is_found(rewritten: Program) -> None:
    from depthwire.passes.analysis.quantization import calibrate
    from depthwire.passes.quantize_linear import QuantizeLinear

    plan = calibrate(rewritten, [dict(rewritten.example_inputs)], "int8")
    assert any(weight.activation is not None for weight in plan.weights.values())
    program = Pipeline((QuantizeLinear(plan),)).run(rewritten)
    model = to_onnx(program)
    check_scales(model, program)
    name, weight = next((n, w) for n, w in plan.weights.items() if w.activation is not None)
    other = dataclasses.replace(weight, activation=2 * (weight.activation or 0))
    changed = dataclasses.replace(plan, weights={**plan.weights, name: other})
    with pytest.raises(ExportError) as caught:
        check_scales(model, Pipeline((QuantizeLinear(changed),)).run(rewritten))
    assert caught.value.code == "export.precision"
