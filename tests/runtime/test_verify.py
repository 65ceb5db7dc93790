"""The whole proof on a tiny transformer: what is sound passes, what is tampered with fails at the right layer."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from polygraphy.comparator import RunResults
from polygraphy.json import load_json
from safetensors.numpy import load_file, save_file

from depthwire.artifact import GOLDENS, MODEL, Artifact, Checkpoint
from depthwire.errors import BuildError, ExportError, UsageError
from depthwire.runtime import _windows
from depthwire.runtime.compare import compare
from depthwire.runtime.verify import VerifyReport, format_report, verify
from depthwire.runtime.verify_report import PairResult
from tests.runtime.helpers import VOCABULARY, Case, build_case, perturb, perturb_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from depthwire.program import Program

STEPS = [("original", "rewritten"), ("rewritten", "onnxruntime"), ("original", "onnxruntime")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def case(base: Case, tmp_path: Path) -> Case:
    return base.copy_to(tmp_path / "artefact")


def run(case: Case, **changes: Any) -> VerifyReport:
    arguments: dict[str, Any] = {"original": case.original, "rewritten": case.rewritten, "windows": case.windows}
    return verify(case.artifact, **(arguments | changes))


def polygraphy(report: VerifyReport, cwd: Path) -> int:
    """Run the printed command exactly as printed."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", report.polygraphy], cwd=cwd, env=environment, capture_output=True, timeout=300, check=False
    ).returncode


def verdicts(report: VerifyReport) -> dict[tuple[str, str], bool]:
    return {(pair.expected, pair.actual): bool(pair) for pair in report.comparisons}


# What is sound.


def test_a_sound_artefact_passes_every_pair(case: Case) -> None:
    lines: list[str] = []
    report = run(case, progress=lines.append)
    assert report.passed
    assert report.first_divergence is None
    assert list(verdicts(report)) == STEPS
    assert all(len(pair.windows) == pair.asked == report.windows == 2 for pair in report.comparisons)
    rewrite = report.comparisons[0].windows[0].tensors["logits"]
    assert rewrite.kind == "logits"
    assert rewrite.stats is not None
    assert rewrite.stats.max_abs > 0, "the rewrite rounds differently, so that a difference of 0 would be suspicious"
    assert lines == ["windows 1-2 of 2: original, rewritten, onnxruntime", "files for polygraphy"]


def test_tokens_and_likelihood_are_judged_for_language_models(case: Case) -> None:
    window = run(case).comparisons[2].windows[0]
    assert window.top1["logits"].positions == 12
    assert window.nll is not None
    assert window.nll.tokens == 11
    assert window.nll.expected == pytest.approx(np.log(VOCABULARY), rel=0.2)  # random weights know nothing
    case.artifact.manifest.source.task = "encoder"
    assert run(case).comparisons[2].windows[0].nll is None


@pytest.mark.parametrize(("given", "step"), [("original", "compile"), ("rewritten", "export/runtime")])
def test_one_program_is_compared_with_the_file(case: Case, given: str, step: str) -> None:
    programs: dict[str, Program | None] = {"original": None, "rewritten": None, given: getattr(case, given)}
    report = run(case, **programs)
    assert report.passed
    assert verdicts(report) == {(given, "onnxruntime"): True}
    perturb_file(case.artifact, "blocks.2.mlp.2.weight", 1.01)
    failed = run(case, **programs)
    assert not failed.passed
    assert failed.first_divergence is not None
    assert failed.first_divergence.first is not None
    assert failed.first_divergence.first.pair == step


def test_windows_in_groups_give_the_same_numbers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    together = run(case)
    monkeypatch.setattr(_windows, "RESULT_BYTES", 1)
    lines: list[str] = []
    apart = run(case, progress=lines.append)
    assert [line for line in lines if line.startswith("windows")] == [
        "windows 1-1 of 2: original, rewritten, onnxruntime",
        "windows 2-2 of 2: original, rewritten, onnxruntime",
    ]
    assert [p.as_dict() for p in apart.comparisons] == [p.as_dict() for p in together.comparisons]


# What is not.


@pytest.mark.parametrize(
    ("weight", "layer", "role"),
    [
        ("blocks.2.attention.out.weight", 4, "write"),
        ("blocks.2.norm2.weight", 5, "norm"),
        ("blocks.2.mlp.2.weight", 5, "write"),
        ("norm.weight", 8, "norm"),
    ],
)
def test_a_wrong_rewrite_is_found_at_its_layer(case: Case, weight: str, layer: int, role: str) -> None:
    report = run(case, rewritten=perturb(case.rewritten, weight, 1.001))
    assert verdicts(report) == {STEPS[0]: False, STEPS[1]: False, STEPS[2]: True}
    assert report.first_divergence is not None
    first = report.first_divergence.first
    assert first is not None
    assert (first.checkpoint.layer, first.checkpoint.role, first.pair) == (layer, role, "rewrite")
    assert (report.first_divergence.checked, report.first_divergence.skipped) == (17, 0)
    before = [e.result for e in report.first_divergence.trail if e.checkpoint.layer < layer]
    assert all(before)
    assert len(before) == 4 * layer


@pytest.mark.parametrize(
    ("weight", "layer", "module"),
    [("blocks.2.attention.out.weight", 4, "blocks.2.attention"), ("blocks.2.mlp.0.weight", 5, "blocks.2.mlp")],
)
def test_a_wrong_file_is_found_at_its_layer(case: Case, weight: str, layer: int, module: str) -> None:
    perturb_file(case.artifact, weight, 1.002)
    report = run(case)
    assert verdicts(report) == {STEPS[0]: True, STEPS[1]: False, STEPS[2]: False}
    assert report.first_divergence is not None
    first = report.first_divergence.first
    assert first is not None
    assert (first.checkpoint.layer, first.checkpoint.module, first.pair) == (layer, module, "export/runtime")
    assert f"Layer {layer} (write of {module})" in report.first_divergence.note
    assert any(f"layer {layer} write {module}" in line for line in format_report(report))


def test_a_fault_after_the_last_checkpoint_is_said_to_be_there(case: Case) -> None:
    report = run(case, rewritten=perturb(case.rewritten, "head.weight", 1.01))
    assert not report.passed
    assert report.first_divergence is not None
    assert report.first_divergence.first is None
    assert "after the last one, layer 8 (norm)" in report.first_divergence.note


def test_checkpoints_that_a_graph_lacks_are_skipped_and_counted(case: Case) -> None:
    manifest = case.artifact.manifest
    manifest.checkpoints = [
        Checkpoint(value="gone", layer=0, role="norm", module="m"),
        *(c for c in manifest.checkpoints if c.layer >= 6),
        # In both torch graphs, though the file's value has the output's name.
        Checkpoint(value="linear_16", layer=9, role="write", module="head"),
    ]
    report = run(case, rewritten=perturb(case.rewritten, "blocks.2.mlp.2.weight", 1.01))
    assert report.first_divergence is not None
    assert (report.first_divergence.checked, report.first_divergence.skipped) == (6, 2)
    first = report.first_divergence.first
    assert first is not None
    assert (first.checkpoint.layer, first.checkpoint.role) == (6, "norm")
    manifest.checkpoints = []
    bare = run(case, rewritten=perturb(case.rewritten, "blocks.2.mlp.2.weight", 1.01))
    assert bare.first_divergence is not None
    assert "lists no checkpoints" in bare.first_divergence.note


def test_the_failing_window_is_the_one_that_is_walked(case: Case) -> None:
    """A token that only the second window holds, with a wrong embedding in the file."""
    token = int(np.setdiff1d(case.windows[1]["input_ids"], case.windows[0]["input_ids"])[0])
    rewritten = perturb(case.rewritten, "embed.weight", 1.0)
    rewritten.exported.state_dict["embed.weight"].data[token] *= 1.5
    report = run(case, rewritten=rewritten)
    assert [bool(w) for w in report.comparisons[0].windows] == [True, False]
    assert report.comparisons[0].first_failed == 1
    assert report.first_divergence is not None
    assert report.first_divergence.window == 1


def test_swapped_tokens_fail_as_flips(case: Case) -> None:
    rewritten = perturb(case.rewritten, "head.weight", 1.0)
    head = rewritten.exported.state_dict["head.weight"].data
    head.copy_(head.flip(0).clone())
    top1 = run(case, rewritten=rewritten).comparisons[0].windows[0].top1["logits"]
    assert not top1
    assert top1.flips == top1.beyond > 0


def test_a_run_that_lacks_a_window_fails(case: Case) -> None:
    sound = run(case).comparisons[0]
    assert not PairResult("a", "b", 2, (), sound.windows[:1])
    assert not PairResult("a", "b", 2, ("2 iterations were expected, 1 were run",), sound.windows)
    assert not PairResult("a", "b", 0, (), ())
    assert not VerifyReport((), None, "", 0, 0.0, {}).passed


def test_nan_weights_fail(case: Case) -> None:
    perturb_file(case.artifact, "blocks.1.mlp.2.weight", float("nan"))
    report = run(case)
    assert not report.passed
    result = report.comparisons[1].windows[0].tensors["logits"]
    assert result.problem is not None
    assert "NaN" in result.problem
    assert report.first_divergence is not None
    assert report.first_divergence.first is not None
    assert report.first_divergence.first.checkpoint.layer == 3
    json.dumps(report.as_dict(), allow_nan=False)
    assert any("not finite" in line for line in format_report(report))


# Goldens.


def test_goldens_alone_prove_the_file(case: Case) -> None:
    report = run(case, original=None, rewritten=None, windows=[])
    assert report.passed
    assert verdicts(report) == {("goldens", "onnxruntime"): True}
    assert report.windows == 2
    perturb_file(case.artifact, "blocks.2.mlp.2.weight", 1.01)
    failed = run(case, original=None, rewritten=None, windows=[])
    assert not failed.passed
    assert failed.first_divergence is not None
    assert failed.first_divergence.first is None
    assert "source model" in failed.first_divergence.note


def test_windows_without_a_reference_are_refused(case: Case) -> None:
    with pytest.raises(UsageError) as caught:
        run(case, original=None, rewritten=None)
    assert caught.value.code == "verify.no-reference"


@pytest.mark.parametrize("fault", ["missing", "garbage", "output", "count", "empty", "extra"])
def test_goldens_that_prove_nothing_are_refused(case: Case, fault: str) -> None:
    path = case.artifact.path(GOLDENS)
    tensors = load_file(path)
    path.unlink()
    if fault == "garbage":
        path.write_bytes(b"not safetensors")
    elif fault != "missing":
        if fault == "output":
            del tensors["output.logits"]
        if fault == "count":
            tensors["output.logits"] = tensors["output.logits"][:1]
        if fault == "empty":
            tensors = {name: tensor[:0] for name, tensor in tensors.items()}
        if fault == "extra":
            tensors["output.other"] = np.ones((2, 1), np.float32)
        save_file(tensors, path)
    with pytest.raises(ExportError) as caught:
        run(case, original=None, rewritten=None, windows=[])
    assert caught.value.code == "verify.goldens"


# Inputs.


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"ids": np.zeros((1, 12), np.int64)},
        {"input_ids": np.zeros((1, 12), np.int64), "more": np.zeros(1)},
        {"input_ids": np.zeros((1, 12), np.int32)},
        {"input_ids": np.zeros((12,), np.int64)},
        {"input_ids": np.zeros((1, 11), np.int64)},
    ],
)
def test_a_window_that_does_not_fit_is_refused(case: Case, window: dict[str, NDArray[Any]]) -> None:
    with pytest.raises(UsageError) as caught:
        run(case, windows=[case.windows[0], window])
    assert caught.value.code == "verify.window"
    assert "window 1" in (caught.value.at or "")


def test_no_window_is_refused(case: Case) -> None:
    with pytest.raises(UsageError) as caught:
        run(case, windows=[])
    assert caught.value.code == "verify.window"


def test_a_model_that_does_not_open_is_an_error_not_a_verdict(case: Case) -> None:
    case.artifact.path(MODEL).write_bytes(b"not onnx")
    with pytest.raises(BuildError) as caught:
        run(case)
    assert caught.value.code == "runtime.session"


def test_a_token_outside_the_vocabulary_names_the_runner(case: Case) -> None:
    with pytest.raises(BuildError) as caught:
        run(case, windows=[{"input_ids": np.full((1, 12), VOCABULARY)}])
    assert caught.value.code == "verify.torch-failed"
    assert "original" in (caught.value.at or "")


def test_a_failure_of_the_runtime_is_an_error_not_a_verdict(case: Case) -> None:
    path = case.artifact.path(GOLDENS)
    save_file(load_file(path) | {"input.input_ids": np.full((2, 1, 12), VOCABULARY)}, path)
    with pytest.raises(BuildError) as caught:
        run(case, original=None, rewritten=None, windows=[])
    assert caught.value.code == "verify.run-failed"
    assert "Gather" in (caught.value.got or "")


def test_polygraphy_says_nothing(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    run(case)
    assert capfd.readouterr().out == ""


# Repeating it without Depthwire.


def test_the_printed_command_passes_for_the_sound_and_fails_for_the_tampered(base: Case, tmp_path: Path) -> None:
    case = base.copy_to(tmp_path / "with space & sign")
    report = run(case)
    assert shlex.split(report.polygraphy)[:4] == ["polygraphy", "run", str(case.artifact.model), "--onnxrt"]
    assert polygraphy(report, tmp_path) == 0
    perturb_file(case.artifact, "blocks.2.mlp.2.weight", 1.01)
    assert polygraphy(report, tmp_path) == 1
    tampered = run(case)
    assert not tampered.passed
    assert tampered.polygraphy == report.polygraphy


def test_the_commands_number_is_the_budget(case: Case) -> None:
    report = run(case)
    words = shlex.split(report.polygraphy)
    name, _, number = words[words.index("--atol") + 1].rpartition(":")
    result = report.comparisons[2].windows[0].tensors["logits"]
    assert (name, float(number)) == ("logits", result.allowed)


def test_the_files_hold_the_first_window_and_the_original(case: Case) -> None:
    run(case)
    (feed,) = load_json(str(case.artifact.path("verify/inputs.json")))
    np.testing.assert_array_equal(feed["input_ids"], case.windows[0]["input_ids"])
    results = RunResults.load(str(case.artifact.path("verify/outputs.json")))
    assert list(results.keys()) == ["original"]
    (iteration,) = results["original"]
    golden = load_file(case.artifact.path(GOLDENS))["output.logits"][0]
    assert compare({"logits": golden}, dict(iteration.items()), default="logits")


def test_the_manifest_lists_the_files_and_still_loads(case: Case) -> None:
    run(case)
    run(case)
    loaded = Artifact.load(case.artifact.root)
    assert {"verify/inputs.json", "verify/outputs.json"} <= set(loaded.manifest.files)
    assert sorted(p.name for p in (case.artifact.root / "verify").iterdir()) == ["inputs.json", "outputs.json"]


def test_an_artefact_that_cannot_be_written_says_so(case: Case) -> None:
    (case.artifact.root / "verify").write_text("a file where the folder should be")
    with pytest.raises(ExportError) as caught:
        run(case)
    assert caught.value.code == "verify.not-written"
    Artifact.load(case.artifact.root)


# The report.


def test_the_report_is_json_and_can_be_judged_again(case: Case) -> None:
    perturb_file(case.artifact, "blocks.2.mlp.2.weight", 1.01)
    report = run(case)
    stored = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert stored["passed"] is report.passed is False
    for pair in stored["comparisons"]:
        again = []
        for window in pair["windows"]:
            outputs = [o["max_abs"] <= o["atol"] + o["rtol"] * o["max_expected"] for o in window["outputs"]]
            flips = [t["flips"] == 0 or t["largest_gap"] < t["allowed"] for t in window["top1"].values()]
            nll = abs(window["nll"]["actual"] - window["nll"]["expected"]) <= window["nll"]["atol"]
            again.append(all([*outputs, *flips, nll]))
        assert all(again) is pair["passed"]
    assert stored["first_divergence"]["first"]["layer"] == 5
    assert len(stored["first_divergence"]["trail"]) == 34


def test_the_lines_tell_what_a_reader_needs(case: Case) -> None:
    report = run(case)
    lines = format_report(report)
    assert lines[0].startswith("verify PASSED: 2 windows, 3 comparisons")
    assert "original -> onnxruntime: PASSED, 2 of 2 windows pass" in lines
    assert "  top-1 of logits: 24 of 24 positions agree, 0 flips" in lines
    assert any(line.startswith("  NLL of 22 tokens: ") for line in lines)
    assert lines[-1] == f"  {report.polygraphy}"
    assert max(len(line) for line in lines[:-1]) <= 120
    assert not [line for line in lines if line != line.rstrip()]


def test_the_lines_of_flips_name_position_and_tokens(case: Case) -> None:
    rewritten = perturb(case.rewritten, "head.weight", 1.0)
    head = rewritten.exported.state_dict["head.weight"].data
    head.copy_(head.flip(0).clone())
    lines = format_report(run(case, rewritten=rewritten))
    assert any("no near-ties; largest gap" in line for line in lines)
    assert any("position [0, " in line and line.endswith("FAIL") for line in lines)
