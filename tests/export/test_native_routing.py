"""Models that route their own tokens, from the module to ONNX Runtime: recognised, exported, equal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch

from depthwire.export.capture import capture
from depthwire.export.to_onnx import to_onnx
from depthwire.passes.standard import standard_pipeline
from depthwire.runtime.tolerances import tolerance
from tests.models.routed import ids, make, padding

if TYPE_CHECKING:
    from depthwire.models.routing_config import Kind

# kind, spelling, options, the operators of its file.
MODELS: list[tuple[Kind, dict[str, Any], set[str]]] = [
    ("mixture_of_depths", {"spelling": "index"}, {"SelectTokens_5"}),
    ("subjective_depth", {"spelling": "onehot", "rank": "gate", "gate": "score"}, {"SelectTokens_5", "SurpriseScore"}),
    ("subjective_timescale", {"spelling": "gather", "rule": "budget"}, {"SelectTokensBudget_5"}),
    ("attn_res", {"spelling": "onehot", "fallback": "prior"}, {"SelectTokens_5"}),
]


@pytest.mark.parametrize(("kind", "options", "operators"), MODELS, ids=[model[0] for model in MODELS])
def test_one_of_each(kind: Kind, options: dict[str, Any], operators: set[str]) -> None:
    model = make(kind, depth=2, **options).float()
    inputs = {"input_ids": ids(3, 24), "attention_mask": padding(24)}
    program = standard_pipeline(attn_res=None).run(capture(model, example_inputs=inputs))
    exported = to_onnx(program)
    own = {node.op_type for node in exported.graph if node.domain == "depthwire"}
    assert own >= operators | {"GatherTokens", "ScatterTokens"}
    used = {node.op_type for node in exported.graph}
    assert used.isdisjoint({"TopK", "CumSum", "NonZero", "GatherND", "ScatterND"}), sorted(used)
    session = onnxruntime.InferenceSession(
        ir.to_proto(exported).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for seed in range(3):
        feed = {"input_ids": ids(3, 24, seed), "attention_mask": padding(24).roll(seed, 0)}
        got = torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})[0])
        with torch.no_grad():
            want = model(**feed)
        assert float((got - want).abs().max()) <= tolerance("float32", "logits").allowed(float(want.abs().max()))
