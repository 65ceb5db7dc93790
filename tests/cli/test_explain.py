"""``depthwire explain`` lists rewrites and declines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

import depthwire
from depthwire.cli.main import main
from tests.passes.native_attn_res import refused, spellings

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_a_plain_model(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(tiny), "--attn-res", "full", "--seq-len", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rewrites = {each["name"]: each["rewrites"] for each in found["passes"]}
    assert rewrites["lift_attn_res"] == 4
    assert rewrites["recognize_attn_res"] == 0
    assert found["source"]["model"] == "LlamaForCausalLM"


def test_a_decline_names_place_wish_and_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(refused.build(refused.no_key_norm), (spellings.example(),)), file)
    assert main(["explain", str(file), "--json"]) == 0
    (found,) = [each for each in json.loads(capsys.readouterr().out)["passes"] if each["name"] == "recognize_attn_res"]
    (decline,) = found["declines"]
    assert decline["code"] == "recognize-attn-res.no-key-norm"
    assert decline["want"] == "keys under an RMSNorm"
    assert decline["got"] == "keys that are not normalised"
    assert main(["explain", str(file), "--no-color"]) == 0
    out = capsys.readouterr().out
    assert "recognize_attn_res" in out
    assert "no-key-norm" in "".join(out.split())


def test_as_a_function() -> None:
    found = depthwire.explain(spellings.build(spellings.Spelling()), example_inputs=(spellings.example(),))
    (record,) = [each for each in found.passes if each["name"] == "recognize_attn_res"]
    assert record["rewrites"] == 4
    assert found.as_dict()["passes"] == list(found.passes)
