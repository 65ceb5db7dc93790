"""The residual stream of every architecture of transformers that we claim, found in tiny random models.

Accepted ones must compute the same after the lift. Their norms compute in fp32 whatever the model's dtype (Llama and
its kin) or in the model's own fp64 (LayerNorm models): the bounds differ accordingly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from depthwire.errors import PassError
from depthwire.export.capture import capture
from depthwire.passes.analysis.residual_stream import find_residual_stream
from depthwire.passes.standard import canonical_pipeline, standard_pipeline

if TYPE_CHECKING:
    from depthwire.program import Program

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 67}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 67}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
NO_TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}

SEQUENTIAL = ["attention", "mlp"] * 2
PARALLEL = ["parallel"] * 2
# model class, configuration, kinds of the sublayers, norms at each state
ACCEPTED: dict[str, tuple[str, dict[str, Any], list[str], list[int]]] = {
    "llama": ("LlamaForCausalLM", GATED, SEQUENTIAL, [1] * 5),
    "qwen2": ("Qwen2ForCausalLM", GATED, SEQUENTIAL, [1] * 5),
    "qwen3": ("Qwen3ForCausalLM", {**GATED, "head_dim": 8}, SEQUENTIAL, [1] * 5),
    "mistral": ("MistralForCausalLM", GATED, SEQUENTIAL, [1] * 5),
    "gemma2": ("Gemma2ForCausalLM", {**GATED, "head_dim": 8}, SEQUENTIAL, [1] * 5),
    "gemma3": ("Gemma3ForCausalLM", {**GATED, "head_dim": 8}, SEQUENTIAL, [1] * 5),
    "phi3": ("Phi3ForCausalLM", {**GATED, **NO_TOKENS}, SEQUENTIAL, [1] * 5),
    "phi": ("PhiForCausalLM", {**SIZES, "intermediate_size": 48}, PARALLEL, [1] * 3),
    "gpt2": ("GPT2LMHeadModel", GPT, SEQUENTIAL, [1] * 5),
    "gpt_neox": ("GPTNeoXForCausalLM", {**SIZES, "intermediate_size": 48}, PARALLEL, [2, 2, 1]),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}, PARALLEL, [1] * 3),
    "falcon": ("FalconForCausalLM", SIZES, PARALLEL, [1] * 3),
    "falcon-new": (
        "FalconForCausalLM",
        {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2},
        PARALLEL,
        [2, 2, 1],
    ),
    "falcon-sequential": (
        "FalconForCausalLM",
        {**SIZES, "parallel_attn": False, "alibi": True, "multi_query": False},
        SEQUENTIAL,
        [1] * 5,
    ),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {**GPT, **NO_TOKENS}, SEQUENTIAL, [1] * 5),
    "stablelm": ("StableLmForCausalLM", {**GATED, **NO_TOKENS}, SEQUENTIAL, [1] * 5),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 67}, SEQUENTIAL, [1] * 5),
    "smollm3": ("SmolLM3ForCausalLM", {**GATED, **NO_TOKENS}, SEQUENTIAL, [1] * 5),
    "opt": ("OPTForCausalLM", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, SEQUENTIAL, [1] * 5),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {**GATED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        SEQUENTIAL,
        [1] * 5,
    ),
    "granite": ("GraniteForCausalLM", {**GATED, "residual_multiplier": 0.22}, SEQUENTIAL, [1] * 5),
    "cohere": ("CohereForCausalLM", {**GATED, **NO_TOKENS}, PARALLEL, [1] * 3),
    "bloom": (
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 67},
        SEQUENTIAL,
        [1] * 5,
    ),
    "starcoder2": ("Starcoder2ForCausalLM", GATED, SEQUENTIAL, [1] * 5),
    "nemotron": ("NemotronForCausalLM", {**GATED, "head_dim": 8}, SEQUENTIAL, [1] * 5),
    # The first layer reads the (already normed) embedding without a norm: a read of one source, which is no read.
    "modernbert": (
        "ModernBertModel",
        {**SIZES, "intermediate_size": 48, **NO_TOKENS, "cls_token_id": 0, "sep_token_id": 0},
        SEQUENTIAL,
        [0, 1, 1, 1, 1],
    ),
    "vit": ("ViTModel", {**VISION, "intermediate_size": 48}, SEQUENTIAL, [1] * 5),
    "dinov2": ("Dinov2Model", {**VISION, "mlp_ratio": 2}, SEQUENTIAL, [1] * 5),
    "siglip": ("SiglipVisionModel", {**VISION, "intermediate_size": 48}, SEQUENTIAL, [1] * 5),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "bert": (
        "BertModel",
        {**SIZES, "intermediate_size": 48},
        "structure.post-norm",
        "encoder.layer.0.attention.output.LayerNorm",
    ),
    "roberta": (
        "RobertaModel",
        {**SIZES, "intermediate_size": 48, "max_position_embeddings": 40},
        "structure.post-norm",
        "encoder.layer.0.attention.output.LayerNorm",
    ),
    "opt-post-norm": (
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "structure.post-norm",
        "model.decoder.layers.0.self_attn_layer_norm",
    ),
    "olmo2": (
        "Olmo2ForCausalLM",
        {**GATED, "pad_token_id": 0},
        "structure.un-normed-reader",
        "model.layers.0.mlp.gate_proj",
    ),
    "clip": (
        "CLIPVisionModel",
        {**VISION, "intermediate_size": 48},
        "structure.stream-is-output",
        "encoder.layers.1",
    ),
}


def _program(name: str, options: dict[str, Any]) -> Program:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = model_class.config_class(**options)
    config = getattr(config, "vision_config", config)
    model = model_class(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter), alpha=0.3)
    return capture(model) if "image_size" in options else capture(model, seq_len=12)


def _outputs(program: Program) -> torch.Tensor:
    with torch.no_grad():
        result = program.module()(*(program.example_inputs[name] for name in program.input_names))
    first: torch.Tensor = result if isinstance(result, torch.Tensor) else result[0]
    return first


def _computes_in_fp32(program: Program) -> bool:
    values = (node.meta.get("val") for node in program.exported.graph.nodes if node.op == "call_function")
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in values)


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_architecture_is_understood_and_lifts(name: str) -> None:
    model, options, kinds, norms = ACCEPTED[name]
    program = _program(model, options)
    canonical = canonical_pipeline().run(program)
    stream = find_residual_stream(canonical)
    assert [sublayer.kind for sublayer in stream.sublayers] == kinds
    assert [len(state.norms) for state in stream.states] == norms
    assert stream.breaks == ()
    expected = _outputs(program)
    bound = 1e-6 if _computes_in_fp32(canonical) else 1e-9
    for attn_res in ("full", "block:2"):
        lifted = standard_pipeline(attn_res=attn_res).run(program)
        error = (_outputs(lifted) - expected).abs().max() / expected.abs().max()
        assert float(error) <= bound, (attn_res, float(error))


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_is_refused_with_its_module(name: str) -> None:
    model, options, code, module = REFUSED[name]
    program = _program(model, options)
    with pytest.raises(PassError) as caught:
        standard_pipeline(attn_res="full").run(program)
    assert caught.value.code == code
    assert str(caught.value.at).startswith(module)
