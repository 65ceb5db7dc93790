"""AttnRes checkpoints as a source: the reference decoder's own format, and others through a map of names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

import depthwire
from depthwire.errors import CaptureError, ExportError, UsageError
from depthwire.export.capture import capture
from depthwire.models.attn_res import AttnResConfig, AttnResDecoder, MoeConfig

DATA = Path(__file__).parent.parent / "data"
TRAINED = DATA / "attn_res_small"
MAP = """
config_like: kimi-k3
rules:
  - regex: 'net\\.(?P<name>.+)'
    to: '{name}'
"""


@pytest.fixture
def renamed(tmp_path: Path) -> Path:
    """A tiny decoder under names of nobody's, and the map to them."""
    torch.manual_seed(0)
    config = AttnResConfig(48, 16, 2, 2, 1, 8, 24, max_length=32, residual="block-layers:1")
    model = AttnResDecoder(config)
    directory = tmp_path / "net"
    directory.mkdir()
    save_file({f"net.{name}": tensor for name, tensor in model.state_dict().items()}, directory / "model.safetensors")
    fields = {
        "vocab_size": 48,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "attn_res_block_size": 1,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    (tmp_path / "map.yaml").write_text(MAP)
    return directory


def test_the_trained_model_is_captured_as_it_stands() -> None:
    program = capture(TRAINED, seq_len=48, batch=2)
    model = AttnResDecoder.load(TRAINED)
    ids = program.example_inputs["input_ids"]
    assert ids.shape == (2, 48)
    assert program.output_names == ("logits",)
    assert (program.source.kind, program.source.task, program.source.model) == (
        "attn-res",
        "causal-lm",
        "AttnResDecoder",
    )
    assert program.source.tokenizer_reference() == str(TRAINED)
    assert set(program.source.sha256) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert torch.equal(program.module()(ids), model(ids))
    assert capture(TRAINED, seq_len=8, dtype="fp32").module()(ids[:1, :8]).dtype == torch.float32


def test_a_length_that_is_not_given_is_the_models(renamed: Path) -> None:
    program = capture(renamed, checkpoint_map=str(renamed.parent / "map.yaml"))
    assert program.example_inputs["input_ids"].shape == (1, 32)
    assert "checkpoint-map" in program.source.sha256
    assert program.source.tokenizer_reference() is None


def test_a_map_may_give_the_whole_configuration(renamed: Path) -> None:
    own = renamed.parent / "whole.yaml"
    fields = {"vocab_size": 48, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_width": 24}
    rules = MAP.split("config_like: kimi-k3")[1]
    own.write_text(f"config: {json.dumps({**fields, 'residual': 'block-layers:1', 'max_length': 32})}{rules}")
    (renamed / "config.json").unlink()
    program = capture(renamed, checkpoint_map=str(own), seq_len=8)
    assert sorted(program.source.sha256) == ["checkpoint-map", "model.safetensors"]
    with pytest.raises(CaptureError, match=r"checkpoint\.config"):
        capture(renamed, checkpoint_map=str(renamed.parent / "map.yaml"))


def test_a_mapped_checkpoint_converts_and_verifies_again(renamed: Path, tmp_path: Path) -> None:
    own = tmp_path / "map.yaml"
    result = depthwire.convert(renamed, tmp_path / "out", checkpoint_map=str(own), seq_len=16, windows=2)
    assert result.verdict is not None
    assert result.verdict.passed
    assert depthwire.verify(tmp_path / "out").passed
    own.write_text(MAP + "# changed\n")
    with pytest.raises(ExportError, match="checkpoint-map"):
        depthwire.verify(tmp_path / "out")


def test_the_trained_model_converts_on_real_text(tmp_path: Path) -> None:
    text = DATA / "sotu-2000.txt"
    result = depthwire.convert(TRAINED, tmp_path / "out", dtype="fp32", seq_len=128, windows=2, text=text)
    assert result.verdict is not None
    assert result.verdict.passed
    windows = [window for pair in result.verdict.comparisons for window in pair.windows]
    assert len(windows) == 3 * 2  # original, rewritten and file, each against the others
    for window in windows:
        assert window.nll is not None
        assert window.nll.tokens == 127
        # Windows of half the length that it was trained on, read from nothing: about the 1.45 nats of its README.
        assert 1.0 < window.nll.expected < 2.0


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"seq_len": 257}, "capture.seq-len"),
        ({"task": "vision"}, "capture.task"),
        ({"image_size": 8}, "capture.option-without-effect"),
        ({"trust_remote_code": True}, "capture.option-without-effect"),
        ({"revision": "main"}, "capture.option-without-effect"),
        ({"example_inputs": {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}}, "capture.option-without-effect"),
        ({"checkpoint_map": "nothing.yaml"}, "checkpoint.map"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as caught:
        capture(TRAINED, **options)
    assert caught.value.code == code


@pytest.mark.parametrize("source", ["package.module:factory", "model.gguf", "model.pt2"])
def test_a_map_has_no_effect_on_other_sources(tmp_path: Path, source: str) -> None:
    path = source if ":" in source else str(tmp_path / source)
    if ":" not in source:
        Path(path).write_bytes(b"x")
    with pytest.raises(UsageError) as caught:
        capture(path, checkpoint_map="fla")
    assert (caught.value.code, caught.value.at) == ("capture.option-without-effect", "checkpoint_map")


def test_a_cached_id_that_is_not_there_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"capture\.no-such-model"):
        capture("nobody/no-such-model", checkpoint_map="fla")


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_a_mixture_of_experts_converts(tmp_path: Path, router: Literal["softmax", "sigmoid"]) -> None:
    moe = MoeConfig(5, 2, 12, shared_width=8, router=router, selection_bias=router == "sigmoid", dense_layers=1)
    torch.manual_seed(0)
    config = AttnResConfig(
        48, 16, 3, 2, 1, 8, 24, max_length=32, norm="layernorm", tied_embeddings=False, key_norm_gain=False, moe=moe
    )
    model = AttnResDecoder(config)
    for name, weight in model.named_parameters():
        if name.endswith("res_proj.weight"):
            torch.nn.init.normal_(weight)
    model.save(tmp_path / "model")
    result = depthwire.convert(tmp_path / "model", tmp_path / "out", windows=2)
    assert result.verdict is not None
    assert result.verdict.passed
