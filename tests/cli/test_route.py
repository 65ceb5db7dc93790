"""``--route…``: a routed conversion is verified, and what cannot be routed is one clear error without an output."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

import depthwire
from depthwire.artifact import Artifact
from depthwire.cli.main import main
from depthwire.route import parse_capacity
from depthwire.route_parts import weights_sha256

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 32


def _parts(model: Path, path: Path, *, other: bool = False) -> Path:
    program = depthwire.capture(model, seq_len=16, padding=True)
    spec = depthwire.RouteSpec((1,), (parse_capacity(0.5),), fallback="linear", keys_values="all")
    drawn = depthwire.draw_parts(spec, WIDTH, seed=2)
    weights = program.exported.state_dict
    weights = {name: tensor + 1 if other else tensor for name, tensor in weights.items()}
    depthwire.RouteParts(spec, drawn.tensors, weights_sha256(weights)).save(path)
    return path


def test_fitted_parts_are_routed_and_verified(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = _parts(tiny, tmp_path / "parts.safetensors")
    out = tmp_path / "out"
    shape = ("--seq-len", "16", "--batch", "2", "--padding")
    assert main(["convert", str(tiny), "-o", str(out), "--route", str(parts), *shape, "--quiet"]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["verify"]["passed"] is True
    artifact = Artifact.load(out)
    forms = {name.split("::")[-1] for name in artifact.manifest.custom_ops}
    assert {"SelectTokensBudget_4", "GatherTokens", "ScatterTokens"} <= forms
    passes = {info.name: info.rewrites for info in artifact.manifest.passes}
    assert passes["route_tokens"] == 1
    assert main(["verify", str(out), "--quiet"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    "case",
    [
        (("--route-layers", "1", "--capacity", "0"), "route.capacity", "above 0"),
        (("--route-layers", "1", "--capacity", "1.5"), "route.capacity", "1.5"),
        (("--route-layers", "1", "--capacity", "nan"), "route.capacity", "nan"),
        (("--route-layers", "0,1", "--capacity", "0.5,0.5,0.5"), "route.capacity", "3 capacities"),
        (("--route-layers", "7", "--capacity", "0.5"), "route.layers", "layers 0 to 1"),
        (("--route-layers", "every:3", "--capacity", "0.5"), "route.layers", "none"),
        (("--route-layers", "deep", "--capacity", "0.5"), "route.layers", "deep"),
        (("--route-layers", "1"), "route.options", "no capacity"),
        (("--capacity", "0.5"), "route.options", "no layers"),
        (("--route-layers", "1", "--capacity", "0.5", "--route-gate", "surprise"), "route.options", "score surprise"),
        (
            ("--route-layers", "1", "--capacity", "0.5", "--route-rule", "top-k", "--route-window", "3"),
            "route.options",
            "divisor",
        ),
        (("--route-layers", "0", "--capacity", "0.5", "--route-score", "surprise"), "route.surprise", "model.layers.0"),
    ],
)
def test_a_routing_that_cannot_be(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: tuple[tuple[str, ...], str, str]
) -> None:
    options, code, word = case
    out = tmp_path / "out"
    command = ["convert", str(tiny), "-o", str(out), "--seq-len", "8", "--route-seed", "0", *options]
    assert main(command) == (4 if code == "route.surprise" else 2)
    error = capsys.readouterr().err
    assert f"[{code}]" in error
    assert word in error
    assert not out.exists()


def test_more_tokens_than_the_model_has(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--route-seed", "0", "--route-layers", "1", "--capacity", "0.5", "--seq-len", "65"]
    assert main(["convert", str(tiny), "-o", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert "64" in error
    assert "65" in error


def test_no_routers(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--route-layers", "1", "--capacity", "0.5", "--seq-len", "8"]
    assert main(["convert", str(tiny), "-o", str(tmp_path / "out"), *options]) == 2
    assert "[route.no-parts]" in capsys.readouterr().err


def test_parts_of_another_model_and_options_beside_them(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = _parts(tiny, tmp_path / "own.st"), _parts(tiny, tmp_path / "other.st", other=True)
    torch.save({}, tmp_path / "none.st")
    out = ["-o", str(tmp_path / "out"), "--seq-len", "16", "--padding"]
    for options, code in (
        (("--route", str(other)), "route.other-model"),
        (("--route", str(tmp_path / "none.st")), "route.file"),
        (("--route", str(own), "--route-unit", "mlp"), "route.options"),
    ):
        assert main(["convert", str(tiny), *out, *options]) == 2
        assert f"[{code}]" in capsys.readouterr().err


def test_a_structure_that_cannot_be_routed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    PhiForCausalLM(PhiConfig(vocab_size=97, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path / "phi")
    options = ["--route-seed", "0", "--route-layers", "1", "--capacity", "0.5", "--seq-len", "8"]
    command = ["convert", str(tmp_path / "phi"), "-o", str(tmp_path / "out"), *options, "--route-unit", "attention"]
    assert main(command) == 4
    error = capsys.readouterr().err
    assert "[route.structure]" in error
    assert "model.layers.1" in error
    assert "parallel" in error
