"""Attention and positions of transformers' models: which operators are left of them in the file, and that it is right.

The rotary embeddings differ: halves, pairs side by side, partial ones, heads split off one product, norms of each head.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers

from depthwire.export.capture import capture
from depthwire.export.to_onnx import to_onnx
from depthwire.passes.standard import standard_pipeline
from depthwire.runtime.tolerances import tolerance

if TYPE_CHECKING:
    from depthwire.program import Program

LAYERS = 2
SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 67}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
# Model class, configuration, and whether heads are split and merged by the attention operator.
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("LlamaForCausalLM", GATED, True),
    "qwen3": ("Qwen3ForCausalLM", {**GATED, "head_dim": 8}, True),
    "phi3": ("Phi3ForCausalLM", {**GATED, **TOKENS, "partial_rotary_factor": 0.5}, True),
    "cohere": ("CohereForCausalLM", {**GATED, **TOKENS}, True),
    "gpt_neox": ("GPTNeoXForCausalLM", {**SIZES, "intermediate_size": 48, **TOKENS}, False),
    "gptj": (
        "GPTJForCausalLM",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, **TOKENS, "vocab_size": 67},
        False,
    ),
}


def program(name: str) -> Program:
    torch.manual_seed(0)
    model_class = getattr(transformers, MODELS[name][0])
    return capture(model_class(model_class.config_class(**MODELS[name][1])).eval(), seq_len=12)


@pytest.mark.parametrize(("name", "attention"), [*((name, "op") for name in MODELS), ("llama", "decomposed")])
def test_positions_and_heads(name: str, attention: Literal["op", "decomposed"]) -> None:
    captured = program(name)
    after = standard_pipeline(attn_res=None, attention=attention, schedule="auto").run(captured)
    model = to_onnx(after)
    left = Counter(node.op_type for node in model.graph)
    assert left["RotaryEmbedding"] == 2 * LAYERS
    assert not left["Concat"] + left["Neg"] + left["Cos"] + left["Sin"]
    operators = LAYERS if attention == "op" and name != "gptj" else 0  # GPT-J's attention is not the fused one
    assert left["Attention"] == operators
    if attention == "op" and MODELS[name][2]:
        assert not left["Expand"]
        # That of a tied vocabulary matrix alone.
        assert left["Transpose"] == (name == "cohere")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    ids = torch.randint(0, 67, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = captured.module()(ids).numpy()
    got = np.asarray(session.run(None, {"input_ids": ids.numpy()})[0])
    assert np.abs(got - want).max() <= tolerance("float32", "logits").allowed(float(np.abs(want).max()))
