"""Checkpoints that are not whole, not safe or not supported: each has its own error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from depthwire.errors import CaptureError
from depthwire.export.capture import capture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


from tests.export.tiny_models import LLAMA, edit_json, make, refused, run


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make(tmp_path / "llama", "LlamaConfig", "LlamaForCausalLM", **LLAMA)


# --- checkpoints that are not whole ----------------------------------------------------------------------------------


def test_no_such_model_names_the_nearest_sibling(llama: Path) -> None:
    error = refused(llama.parent / "lama", "capture.no-such-model")
    assert error.todo == f"Did you mean {llama}?"


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "a/b/c", "./nothing", "../nothing", "a--b/c"])
def test_an_unknown_id_is_refused_without_a_download(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(name, "capture.no-such-model")


def test_no_config(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    error = refused(tmp_path, "capture.no-config")
    assert error.todo == f"Did you mean {llama}?"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(empty, "capture.no-config").got == "an empty directory"


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", "[" * 100_000])
def test_a_config_that_is_no_json_object(llama: Path, text: str) -> None:
    (llama / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(llama, "capture.bad-config")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_refused_and_never_opened(llama: Path, tmp_path: Path, name: str) -> None:
    import os
    import pickle

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "marker"),)

    (llama / "model.safetensors").unlink()
    (llama / name).write_bytes(pickle.dumps(Payload()))
    error = refused(llama, "capture.pickle-checkpoint")
    assert "save_pretrained" in str(error.todo)
    refused(llama / name, "capture.pickle-checkpoint")
    assert not (tmp_path / "marker").exists()


def test_no_weights_at_all(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    refused(llama, "capture.no-weights")


def test_weights_without_their_directory(llama: Path) -> None:
    refused(llama / "model.safetensors", "capture.unsupported-file")


def shard(directory: Path) -> list[Path]:
    model = transformers.LlamaForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    return sorted(directory.glob("model-*.safetensors"))


@pytest.fixture
def no_bars() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.usefixtures("no_bars")
def test_shards(llama: Path) -> None:
    whole = run(capture(llama))
    shards = shard(llama)
    assert len(shards) > 1
    program = capture(llama)
    assert torch.equal(run(program), whole)
    assert {path.name for path in shards} <= set(program.source.sha256)
    shards[0].unlink()
    assert shards[0].name in str(refused(llama, "capture.missing-shards").got)


@pytest.mark.usefixtures("no_bars")
def test_an_index_may_not_name_files_elsewhere(llama: Path) -> None:
    shard(llama)
    edit_json(llama / "model.safetensors.index.json", weight_map={"a": "../outside.safetensors"})
    refused(llama, "capture.bad-config")
    edit_json(llama / "model.safetensors.index.json", weight_map=None)
    refused(llama, "capture.bad-config")


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_corrupt_safetensors(llama: Path, damage: str) -> None:
    file = llama / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-100], "garbage": b"\xff" * 64 + data[64:], "empty": b""}[damage])
    refused(llama, "capture.corrupt-checkpoint")


def test_missing_and_misshapen_weights(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    without = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    save_file(without, llama / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp" in str(refused(llama, "capture.missing-weights").got)
    misshapen = {**weights, "model.norm.weight": torch.ones(3)}
    save_file(misshapen, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaptureError) as raised:
        capture(llama)
    assert raised.value.code in ("capture.missing-weights", "capture.load-failed")


def test_unused_weights_inside_a_layer(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    extra = {**weights, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file(extra, llama / "model.safetensors", metadata={"format": "pt"})
    assert "q_proj.bias" in str(refused(llama, "capture.unused-weights").got)
    harmless = {
        **weights,
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.2.self_attn.q_proj.weight": torch.ones(32, 32),
        "value_head.weight": torch.ones(1, 32),
    }
    save_file(harmless, llama / "model.safetensors", metadata={"format": "pt"})
    capture(llama)


# --- models that are not supported -----------------------------------------------------------------------------------


def test_encoder_decoder_models(tmp_path: Path) -> None:
    options = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    directory = make(tmp_path / "t5", "T5Config", "T5ForConditionalGeneration", **options)
    refused(directory, "capture.encoder-decoder")
    model = transformers.T5ForConditionalGeneration.from_pretrained(directory)
    with pytest.raises(CaptureError) as raised:
        capture(model)
    assert raised.value.code == "capture.encoder-decoder"


def test_the_encoder_of_an_encoder_decoder(tmp_path: Path) -> None:
    options = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    directory = make(tmp_path / "t5", "T5Config", "T5EncoderModel", **options)
    assert capture(directory, seq_len=8).output_names == ("last_hidden_state",)


def test_models_of_sound(tmp_path: Path) -> None:
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": (16,),
        "conv_kernel": (10,),
        "conv_stride": (5,),
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    }
    directory = make(tmp_path / "sound", "HubertConfig", "HubertModel", **options)
    refused(directory, "capture.unsupported-input")


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLN"], ["json"], [3], ["LlamaConfig"], "x"])
def test_unknown_architectures(llama: Path, architectures: Any) -> None:
    edit_json(llama / "config.json", architectures=architectures)
    error = refused(llama, "capture.unknown-architecture")
    if architectures == ["LlamaForCausalLN"]:
        assert "Did you mean LlamaForCausalLM?" in str(error.todo)


def test_quantised_checkpoints(llama: Path) -> None:
    edit_json(llama / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert refused(llama, "capture.quantized-checkpoint").got == "gptq"


def test_weights_of_integers(llama: Path) -> None:
    weights = {name: tensor.to(torch.int8) for name, tensor in load_file(llama / "model.safetensors").items()}
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    refused(llama, "capture.quantized-checkpoint")


def test_adapters(llama: Path) -> None:
    (llama / "adapter_config.json").write_text("{}")
    refused(llama, "capture.adapter-checkpoint")


def test_a_configuration_that_the_class_cannot_read(llama: Path) -> None:
    edit_json(llama / "config.json", num_attention_heads="four")
    refused(llama, "capture.load-failed")


REMOTE = """
import pathlib, torch
from transformers import PretrainedConfig, PreTrainedModel
pathlib.Path({marker!r}).touch()
class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, vocab_size=16, **options):
        super().__init__(**options)
        self.vocab_size = vocab_size
class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(config.vocab_size, 8)
        self.head = torch.nn.Linear(8, config.vocab_size)
        self.post_init()
    def forward(self, input_ids):
        return {{"logits": self.head(self.table(input_ids))}}
"""


def test_code_in_the_checkpoint_runs_only_if_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    marker, directory = tmp_path / "marker", tmp_path / "own"
    directory.mkdir()
    (directory / "own.py").write_text(REMOTE.format(marker=str(marker)))
    config = {
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
        "model_type": "own",
        "vocab_size": 16,
    }
    (directory / "config.json").write_text(json.dumps(config))
    weights = {"table.weight": torch.ones(16, 8), "head.weight": torch.ones(16, 8), "head.bias": torch.zeros(16)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    refused(directory, "capture.remote-code")
    assert not marker.exists()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    program = capture(directory, trust_remote_code=True, seq_len=4)
    assert marker.exists()
    assert program.output_names == ("logits",)
