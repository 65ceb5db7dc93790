"""``depthwire inspect`` on models with Attention Residuals: their reads in place of a residual stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import depthwire
from depthwire.cli.main import main
from tests.cli.models import tiny_llama

if TYPE_CHECKING:
    import pytest

TRAINED = Path(__file__).parent.parent / "data" / "attn_res_small"


def test_a_native_model_shows_its_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(TRAINED), "--seq-len", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["structure"] is None
    # Eight layers in blocks of two: Kimi K3's source counts (the first read, of the embedding alone, is none).
    before_attention = [-(-layer // 2) + 1 for layer in range(8)]
    before_mlp = [layer // 2 + 2 for layer in range(8)]
    wanted = [count for pair in zip(before_attention, before_mlp, strict=True) for count in pair]
    assert [len(read["sources"]) for read in found["reads"]] == [*wanted[1:], 5]
    assert found["reads"][-1]["reader"] == "norm"
    assert all(read["sources"][0]["module"] == "embed_tokens" for read in found["reads"])
    assert main(["inspect", str(TRAINED), "--seq-len", "16"]) == 0
    assert "layers.7.post_attention_layernorm" in capsys.readouterr().out


def test_a_lifted_program_shows_its_reads() -> None:
    lifted = depthwire.rewrite(tiny_llama(), attn_res="full", seq_len=8)
    found = depthwire.inspect(lifted)
    assert found.reads is not None
    assert [len(read["sources"]) for read in found.reads] == [2, 3, 4, 5]


def test_a_plain_model_has_none() -> None:
    found = depthwire.inspect(tiny_llama(), seq_len=8)
    assert found.reads is None
    assert found.structure is not None
