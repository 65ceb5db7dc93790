"""Rotary embeddings that are one operator already: their tables are gathered, and the operator stays."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.onnx.ops

from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.routing_ops import GATHER
from depthwire.passes.fuse_rotary import FuseRotary
from depthwire.passes.route_tokens import RouteTokens
from depthwire.passes.standard import standard_pipeline
from depthwire.route import RouteSpec
from depthwire.runtime.tolerances import tolerance
from tests.passes.parity import error, named, run, sabotaged
from tests.routable import FORMS, build, canonical, examples, parts_of, routed

if TYPE_CHECKING:
    from depthwire.passes._edit import GraphEditor
    from depthwire.route_parts import RouteParts

aten = torch.ops.aten
ROTARY = torch.ops.onnx.RotaryEmbedding.opset23
LIMIT = tolerance("float32", "hidden").rtol


def parts(**options: Any) -> RouteParts:
    return parts_of(RouteSpec((1,), (Fraction(1, 2),), **options), threshold=0.0)


@pytest.mark.parametrize("form", ["llama", "llama-padded", "parallel"])
@pytest.mark.parametrize("keys_values", ["selected", "all"])
def test_a_fused_rotary_embedding_is_routed_like_a_spelled_one(form: str, keys_values: str) -> None:
    inputs = examples(FORMS[form])
    before = canonical(build(FORMS[form], dtype=torch.float32), inputs)
    given = parts(keys_values=keys_values)
    fused = Pipeline((FuseRotary(), RouteTokens(given))).run(before)
    rotary = [node for node in fused.exported.graph.nodes if node.target is ROTARY]
    assert len(rotary) == 2 * FORMS[form].layers
    gathered = [node for node in rotary if any(part.target is GATHER for part in node.args[1:3])]
    assert len(gathered) == (1 if keys_values == "all" else 2)
    for got, want in zip(run(fused, *inputs.values()), run(routed(before, given), *inputs.values()), strict=True):
        kept = want.isfinite().all(-1)
        assert error([got[kept]], [want[kept]]) <= LIMIT


def test_positions_of_the_slots_would_be_noticed() -> None:
    inputs = examples(FORMS["llama"])
    before = Pipeline((FuseRotary(),)).run(canonical(build(FORMS["llama"], dtype=torch.float32), inputs))
    after = routed(before, parts())

    def wrong(edit: GraphEditor) -> None:
        for node in named(edit, ROTARY):
            tables: Any = node.args[1:3]
            for position, table in enumerate(tables, start=1):
                if table.target is GATHER:  # the first K positions in place of the tokens' own
                    args = (table.args[0], 1, 0, table.meta["val"].shape[1])
                    edit.set_arg(node, position, edit.call(aten.slice.Tensor, args, before=node, like=node))

    bad = sabotaged(after, wrong)
    assert error(run(bad, *inputs.values()), run(after, *inputs.values())) > 100 * LIMIT


def test_the_standard_passes_fuse_before_they_route() -> None:
    names = [step.name for step in standard_pipeline(attn_res=None, route=parts(), schedule="auto").passes]
    assert names.index("fuse_rotary") < names.index("route_tokens")
    training = [step.name for step in standard_pipeline(attn_res=None, route=parts()).passes]
    assert "fuse_rotary" not in training
