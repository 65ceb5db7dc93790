"""Hugging Face directories and cached hub ids."""

from __future__ import annotations

import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from depthwire.errors import UsageError
from depthwire.export.capture import capture

if TYPE_CHECKING:
    from pathlib import Path


from tests.export.tiny_models import BERT, GPT2, LLAMA, NEOX, VISION, make, refused, run


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make(tmp_path / "llama", "LlamaConfig", "LlamaForCausalLM", **LLAMA)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return make(tmp_path / "bert", "BertConfig", "BertModel", **BERT)


# --- every kind of model ---------------------------------------------------------------------------------------------


TOKENS = {"input_ids": (1, 48)}
MASKED = {**TOKENS, "attention_mask": (1, 48)}
PIXELS = {"pixel_values": (1, 3, 28, 28)}


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        ("LlamaForCausalLM", LLAMA, (TOKENS, "logits", "causal-lm")),
        ("GPT2LMHeadModel", GPT2, (TOKENS, "logits", "causal-lm")),
        ("GPTNeoXForCausalLM", NEOX, (TOKENS, "logits", "causal-lm")),
        ("BertModel", BERT, (MASKED, "last_hidden_state", "encoder")),
        ("BertForMaskedLM", BERT, (MASKED, "logits", "encoder")),
        ("BertForSequenceClassification", BERT, (MASKED, "logits", "encoder")),
        ("ViTModel", VISION, (PIXELS, "last_hidden_state", "vision")),
        ("ViTForImageClassification", VISION, (PIXELS, "logits", "vision")),
        ("Dinov2Model", VISION, (PIXELS, "last_hidden_state", "vision")),
    ],
)
def test_the_program_computes_what_the_model_does(
    tmp_path: Path, cls: str, options: dict[str, Any], expected: tuple[dict[str, tuple[int, ...]], str, str]
) -> None:
    inputs, output, task = expected
    config = getattr(transformers, cls).config_class.__name__
    directory = make(tmp_path / "model", config, cls, **options)
    program = capture(directory)
    assert {name: tuple(value.shape) for name, value in program.example_inputs.items()} == inputs
    assert program.input_names == tuple(inputs)
    assert program.output_names == (output,)
    assert program.source.task == task
    assert program.source.model == cls
    model = getattr(transformers, cls).from_pretrained(directory).eval()
    with torch.no_grad():
        reference = model(**program.example_inputs)[output]
    torch.testing.assert_close(run(program), reference, rtol=1e-5, atol=1e-5)
    assert set(program.exported.state_dict) <= set(model.state_dict())


def test_names_provenance_and_ties_are_the_models_own(llama: Path) -> None:
    program = capture(llama)
    state = program.exported.state_dict
    assert "model.layers.0.self_attn.q_proj.weight" in state
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    calls = [node for node in program.exported.graph.nodes if node.op == "call_function"]
    assert all(node.meta["nn_module_stack"] for node in calls)
    paths = {path for node in calls for path, _ in node.meta["nn_module_stack"].values()}
    assert "model.layers.1.mlp.down_proj" in paths
    roots = {kind for node in calls for path, kind in node.meta["nn_module_stack"].values() if path == ""}
    assert roots == {"transformers.models.llama.modeling_llama.LlamaForCausalLM"}
    mutable = [node for node in calls if getattr(node.target, "_schema", None) and node.target._schema.is_mutable]
    assert not mutable
    assert not program.exported.range_constraints


def test_several_outputs_keep_the_names_of_their_fields(tmp_path: Path) -> None:
    directory = make(tmp_path / "qa", "BertConfig", "BertForQuestionAnswering", **{**BERT, "num_labels": 2})
    assert capture(directory).output_names == ("start_logits", "end_logits")


def test_the_source_is_hashed(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{}")
    (llama / "notes.txt").write_text("not part of the model")
    source = capture(llama).source
    assert source.kind == "huggingface"
    assert source.reference == str(llama)
    assert sorted(source.sha256) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert all(len(digest) == 64 for digest in source.sha256.values())


# --- options ---------------------------------------------------------------------------------------------------------


def test_batch_and_length_are_those_asked_for(llama: Path) -> None:
    program = capture(llama, batch=2, seq_len=5)
    assert program.example_inputs["input_ids"].shape == (2, 5)
    assert run(program).shape == (2, 5, 64)


@pytest.mark.parametrize(
    ("option", "code"),
    [
        ({"seq_len": 49}, "capture.seq-len"),
        ({"seq_len": 0}, "capture.size"),
        ({"batch": 0}, "capture.size"),
        ({"task": "vision"}, "capture.task"),
        ({"task": "poetry"}, "capture.task"),
        ({"dtype": "int3"}, "capture.dtype"),
        ({"image_size": 28}, "capture.option-without-effect"),
        ({"revision": "main"}, "capture.option-without-effect"),
        ({"example_inputs": (torch.ones(1, 4, dtype=torch.long),)}, "capture.example-inputs"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(llama: Path, option: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as raised:
        capture(llama, **option)
    assert raised.value.code == code


def test_positions_before_the_padding_index_are_not_counted(tmp_path: Path) -> None:
    options = {**BERT, "max_position_embeddings": 20, "pad_token_id": 1}
    directory = make(tmp_path / "roberta", "RobertaConfig", "RobertaModel", **options)
    assert capture(directory).example_inputs["input_ids"].shape == (1, 18)
    with pytest.raises(UsageError) as raised:
        capture(directory, seq_len=19)
    assert raised.value.code == "capture.seq-len"


@pytest.mark.parametrize("cls", ["ViTModel", "Dinov2Model"])
def test_another_image_size_is_interpolated(tmp_path: Path, cls: str) -> None:
    directory = make(tmp_path / "vision", cls.replace("Model", "Config"), cls, **VISION)
    program = capture(directory, image_size=42)
    assert program.example_inputs["pixel_values"].shape == (1, 3, 42, 42)
    assert run(program).shape == (1, 10, 32)


def test_weights_keep_their_dtype_unless_told(llama: Path) -> None:
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(llama / "model.safetensors").items()}
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    # The checkpoint decides, even where the configuration says otherwise.
    assert json.loads((llama / "config.json").read_text())["dtype"] == "float32"
    kept = capture(llama)
    assert {tensor.dtype for tensor in kept.exported.state_dict.values()} == {torch.bfloat16}
    widened = capture(llama, dtype="fp32")
    assert {tensor.dtype for tensor in widened.exported.state_dict.values()} == {torch.float32}
    halved = capture(llama, dtype="fp16")
    assert run(halved).dtype == torch.float16


def test_example_inputs_replace_the_default_ones(bert: Path) -> None:
    ids = torch.arange(8).reshape(1, 8)
    program = capture(bert, example_inputs={"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
    assert program.input_names == ("input_ids", "token_type_ids")
    assert run(program).shape == (1, 8, 32)


# --- the hub's cache -------------------------------------------------------------------------------------------------


def test_a_cached_hub_id(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    snapshot = cache / "models--tiny--llama" / "snapshots" / commit
    shutil.copytree(llama, snapshot)
    refs = cache / "models--tiny--llama" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    program = capture("tiny/llama")
    assert program.source.reference == "tiny/llama"
    assert program.source.revision == commit
    assert capture("tiny/llama", revision=commit).source.revision == commit
    refused("tiny/llama", "capture.no-such-model", revision="other")


# --- what stays as it was --------------------------------------------------------------------------------------------


def test_nothing_is_printed_and_nothing_global_changes(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging as hf_logging

    def state() -> list[object]:
        return [
            hf_logging.get_verbosity(),
            hf_logging.is_progress_bar_enabled(),
            hf_logging._tqdm_hook,
            gguf_loader.tqdm,
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            logging.getLogger("transformers").level,
        ]

    before = state()
    capture(llama)
    refused(llama.parent / "absent", "capture.no-such-model")
    assert state() == before
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_a_model_in_memory_is_left_as_it_was() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).train()
    model.model.norm.eval()
    before = {name: part.training for name, part in model.named_modules()}
    attributes = dict(vars(model))
    program = capture(model, seq_len=8)
    assert {name: part.training for name, part in model.named_modules()} == before
    assert vars(model) == attributes
    assert type(model) is transformers.LlamaForCausalLM
    assert program.source.kind == "module"
    assert program.source.task == "causal-lm"
    assert program.exported.state_dict["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()


# --- a real trained model --------------------------------------------------------------------------------------------


def test_smollm2(smollm2_dir: Path) -> None:
    program = capture(smollm2_dir, seq_len=64)
    assert program.source.model == "LlamaForCausalLM"
    assert program.weight_bytes < 1.01 * 134_515_008 * 4
    state = program.exported.state_dict
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert run(program).shape == (1, 64, 49152)
