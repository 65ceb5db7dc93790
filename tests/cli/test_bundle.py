"""``bundle`` and ``verify --result``: there to the device and back, as a user types them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest

import depthwire
from depthwire._hash import sha256_file
from depthwire.artifact import Artifact
from depthwire.cli.main import main
from depthwire.runtime.deploy.judge import judge_window
from depthwire.runtime.deploy.manifest import SCRIPT, read_bundle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def sent(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An artefact for RTX and its bundle, which was run to the end of the build; not to be changed."""
    folder = tmp_path_factory.mktemp("sent")
    out, bundle = folder / "out", folder / "bundle"
    options = ["--attn-res", "full", "--seq-len", "16", "--target", "rtx", "--no-build", "--no-verify", "--quiet"]
    assert main(["convert", str(tiny), "-o", str(out), *options]) == 0
    assert main(["bundle", str(out), "--target", "rtx", "-o", str(bundle), "--quiet"]) == 0
    done = subprocess.run([sys.executable, str(bundle / SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stdout
    return out, bundle


@pytest.fixture
def out(sent: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the artefact that may be changed."""
    return shutil.copytree(sent[0], tmp_path / "out")


def verified(sent: tuple[Path, Path], path: Path, **changes: Callable[[Any], Any]) -> Path:
    """Write the result that a GPU would have given which computes what ONNX Runtime does, but for some changes.

    Everything but comparison and latency is what the script found on this machine.
    """
    bundle = read_bundle(sent[1])
    result = json.loads((sent[1] / "work" / "result.json").read_text(encoding="utf-8"))
    (model,) = bundle.models
    goldens = sent[1] / model.goldens
    feed = {tensor.name: np.load(goldens / f"input.{tensor.name}.npy")[0] for tensor in model.inputs}
    expected = {output.name: np.load(goldens / f"output.{output.name}.npy")[0] for output in model.outputs}
    session = onnxruntime.InferenceSession(str(sent[1] / model.file))
    actual = dict(zip(expected, session.run(list(expected), feed), strict=True))
    actual |= {name: change(actual[name]) for name, change in changes.items()}
    window = judge_window(model, bundle.task, expected, actual, feed)
    times = {
        "count": 200,
        "mean": 1.0,
        "std": 0.1,
        "min": 0.9,
        "max": 1.4,
        "p50": 1.0,
        "p90": 1.1,
        "p95": 1.2,
        "p99": 1.3,
    }
    variants = [
        {"cuda_graph": False, "transfers": False, "warmup_runs": 20, "gpu_ms": times, "host_ms": times},
        {"cuda_graph": True, "transfers": False, "not_measured": "operation not supported (801)"},
    ]
    row = {"model": model.file, "engine": model.engine}
    result["comparisons"] = [{**row, "seconds": 1.0, "passed": window["passed"], "windows": [window]}]
    result["latency"] = [{**row, "protocol": {"runs": 200}, "variants": variants}]
    ending = (0, "verified", "ok") if window["passed"] else (7, "parity-failed", "logits differ")
    result |= dict(zip(("exit_code", "verdict", "reason"), ending, strict=True))
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def test_a_bundle_is_written_and_listed(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(converted, tmp_path / "out")
    assert main(["bundle", str(out), "--target", "jetson-agx-orin", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    root = tmp_path / "out-jetson-agx-orin-64"
    assert document["root"] == str(root)
    assert document["sha256"] == sha256_file(root / "bundle.json")
    assert document["platform"]["jetpack"] == "6.2"
    name = f"bundles/{document['sha256'][:16]}.json"
    assert Artifact.load(out).manifest.files[name].sha256 == document["sha256"]
    bundle = read_bundle(root)
    (model,) = bundle.models
    # The artefact was made for ONNX Runtime: its Attention and RotaryEmbedding are spelled out for TensorRT 10.3.
    assert any("spelled out: Attention, RMSNormalization, RotaryEmbedding" in note for note in bundle.notes)
    assert (model.opset, model.windows, bundle.proxies[0].passed) == (20, 1, True)
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert "python3 build_and_verify.py" in readme
    assert "JetPack 6.2 (L4T 36.4)" in readme
    # TensorRT-RTX would die of the Attention that ONNX Runtime is given.
    assert main(["bundle", str(out), "--target", "rtx", "-o", str(tmp_path / "rtx"), "--quiet"]) == 0
    rtx = onnx.load(str(tmp_path / "rtx" / "model.onnx"), load_external_data=False)
    assert {"RotaryEmbedding"} == {node.op_type for node in rtx.graph.node} & {"Attention", "RotaryEmbedding"}
    # The same again is the same bundle, whatever the artefact has listed since.
    again = main(["bundle", str(out), "--target", "jetson-agx-orin", "--json"])
    assert (again, json.loads(capsys.readouterr().out)["sha256"]) == (0, document["sha256"])
    # Another JetPack is another bundle of the same board, and both are known.
    other = ["--jetpack", "7.2", "-o", str(tmp_path / "seven")]
    assert main(["bundle", str(out), "--target", "jetson-agx-orin", "--form", "function", *other]) == 0
    text = capsys.readouterr()
    assert "7.2 (L4T 39.2)" in text.out
    assert "not by the target's TensorRT: parsed" in text.err
    assert len(list((out / "bundles").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--target", "jetson-nano"], "target.unknown"),
        (["--target", "ort-cpu"], "bundle.nothing-to-build"),
        (["--target", "h100", "--jetpack", "6.2"], "target.unknown-jetpack"),
        (["--target", "h100", "--flavour", "tensorrt_rtx"], "bundle.flavour"),
        (["--target", "jetson-orin-nx", "--form", "plugin"], "target.plugin-unsupported"),
        (["--target", "rtx", "--latency-runs", "0"], "bundle.latency-runs"),
        (["--target", "rtx", "--capacity", "50%"], "bundle.capacity"),
        (["--target", "rtx", "-o", "."], "bundle.output-exists"),
        ([], "cli.bad-value"),
    ],
)
def test_what_cannot_be_bundled(
    converted: Path, arguments: list[str], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = [] if "-o" in arguments else ["-o", str(tmp_path / "bundle")]
    # A form that the target's TensorRT does not take is a failure to build; the rest is usage.
    status = 6 if code == "target.plugin-unsupported" else 2
    assert main(["bundle", str(converted), *arguments, *place, "--json"]) == status
    assert json.loads(capsys.readouterr().out)["error"] == code
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_read_back_and_kept(
    sent: tuple[Path, Path], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = verified(sent, tmp_path / "result.json")
    assert main(["verify", str(out), "--result", str(path)]) == 0
    text = capsys.readouterr().out
    for words in ("verified", "max|d|", "0 of 16 differ", "1.000", "not measured", "model.engine"):
        assert words in text, words
    artifact = Artifact.load(out)
    assert artifact.manifest.files["engine/rtx/result.json"].sha256 == sha256_file(path)
    assert main(["verify", str(out), "--result", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["passed"], document["problems"]) == (True, [])
    assert document["result"]["latency"][0]["variants"][0]["gpu_ms"]["p99"] == 1.3
    # The artefact itself is still what it was: bundles and results do not change what it computes.
    assert depthwire.verify_result(out, path).passed


def test_a_result_without_a_gpu_is_no_proof(
    sent: tuple[Path, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sent[1] / "work" / "result.json"
    assert main(["verify", str(out), "--result", str(path), "--json"]) == 7
    document = json.loads(capsys.readouterr().out)
    assert document["error"] == "result.not-verified"
    assert "no GPU" in document["found"]
    assert main(["verify", str(out), "--result", str(path)]) == 7
    text = capsys.readouterr()
    assert "not-verified" in text.out
    assert "MB" in text.out
    assert "engine/rtx/result.json" in Artifact.load(out).manifest.files


def test_an_engine_that_differs_fails(
    sent: tuple[Path, Path], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = verified(sent, tmp_path / "result.json", logits=lambda logits: logits * np.float32(1.001))
    assert main(["verify", str(out), "--result", str(path), "--json"]) == 7
    document = json.loads(capsys.readouterr().out)
    assert document["error"] == "result.parity"
    assert "logits max|d|" in document["found"]


def _unjudged(result: dict[str, Any]) -> None:
    result["comparisons"][0]["windows"] = []


def _uncompared(result: dict[str, Any]) -> None:
    result["comparisons"] = []


def _wide(result: dict[str, Any]) -> None:
    row = result["comparisons"][0]["windows"][0]["outputs"][0]
    row["max_abs"] = row["allowed"] = 1.0  # a budget of its own making


def _nan(result: dict[str, Any]) -> None:
    result["comparisons"][0]["windows"][0]["outputs"][0]["max_abs"] = None


def _unlikely(result: dict[str, Any]) -> None:
    result["comparisons"][0]["windows"][0]["nll"] = None


def _beyond(result: dict[str, Any]) -> None:
    result["comparisons"][0]["windows"][0]["top1"]["logits"]["beyond"] = 1


def _renamed(result: dict[str, Any]) -> None:
    result["target"] = "h100"


@pytest.mark.parametrize("change", [_unjudged, _uncompared, _wide, _nan, _unlikely, _beyond, _renamed])
def test_a_verdict_that_its_numbers_do_not_bear_out(
    sent: tuple[Path, Path],
    out: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = verified(sent, tmp_path / "result.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    change(result)
    path.write_text(json.dumps(result), encoding="utf-8")
    assert main(["verify", str(out), "--result", str(path), "--json"]) == 7
    assert json.loads(capsys.readouterr().out)["error"] in {"result.parity", "result.not-verified"}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "result.unreadable"),
        ("[]", "result.unreadable"),
        ('{"schema_version": 1}', "result.unreadable"),
        ('{"schema_version": 2}', "result.schema"),
    ],
)
def test_what_is_no_result(out: Path, tmp_path: Path, text: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    path.write_text(text, encoding="utf-8")
    before = dict(Artifact.load(out).manifest.files)
    assert main(["verify", str(out), "--result", str(path), "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["error"] == code
    assert Artifact.load(out).manifest.files == before


def test_a_result_of_another_artefact(
    sent: tuple[Path, Path], converted: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = verified(sent, tmp_path / "result.json")
    assert main(["verify", str(converted), "--result", str(path), "--json"]) == 5
    document = json.loads(capsys.readouterr().out)
    assert document["error"] == "result.other-artifact"
    assert "does not know" in document["found"]
    # The same artefact with other weights: what was proven is another model.
    weights = out / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    artifact = Artifact.load(out, check_hashes=False)
    artifact.add_file("model.onnx.data")
    artifact.write_manifest()
    assert main(["verify", str(out), "--result", str(path), "--json"]) == 5
    assert "another model.onnx.data" in json.loads(capsys.readouterr().out)["found"]


def test_nothing_else_goes_with_a_result(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(out), "--result", "r.json", "--windows", "2", "--goldens-only", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert (document["error"], document["found"]) == ("verify.result-alone", "--windows, --goldens-only")


def test_half_precision_travels_with_its_own_budgets(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The graph's dtypes, and the budgets of what was rounded; a twin shows that the rewriting is exact."""
    out = tmp_path / "bf16"
    depthwire.export(tiny, out, attn_res="full", seq_len=8, target="rtx", precision="bf16")
    assert main(["bundle", str(out), "--target", "jetson-orin-nx", "-o", str(tmp_path / "b"), "--quiet"]) == 0
    bundle = read_bundle(tmp_path / "b")
    (model,) = bundle.models
    (logits,) = model.outputs
    assert (bundle.precision, logits.dtype, logits.computed, logits.rtol) == ("bf16", "float32", "bfloat16", 4.5e-2)
    proto = onnx.load(str(tmp_path / "b" / "model.onnx"), load_external_data=False)
    assert onnx.TensorProto.BFLOAT16 in {tensor.data_type for tensor in proto.graph.initializer}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "bf16"]
    # Outputs that numpy has no dtype for cannot be compared on the device.
    depthwire.export(tiny, tmp_path / "cast", seq_len=8, target="rtx", dtype="bf16")
    capsys.readouterr()
    assert main(["bundle", str(tmp_path / "cast"), "--target", "h100", "-o", str(tmp_path / "c"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "bundle.interface-dtype"
