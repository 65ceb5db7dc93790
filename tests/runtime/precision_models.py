"""A tiny decoder in any dtype: plain, with AttnRes reads, or routed; what the tests of precisions share."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch

from depthwire.passes.standard import standard_pipeline
from depthwire.program import Program, Source
from depthwire.route import RouteSpec
from depthwire.route_parts import draw_parts
from tests.export.tiny import VOCABULARY, WIDTH, TinyDecoder, lifted

RESIDUALS = {"plain": None, "block": "block:3", "full": "full"}


def captured(dtype: torch.dtype) -> Program:
    """Return the decoder of four layers, captured at a batch of 1 and 16 tokens."""
    ids = torch.randint(0, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = TinyDecoder(4).to(dtype).eval()
    with torch.no_grad():
        exported = torch.export.export(model, (ids,)).run_decompositions({})
    return Program(exported, Source("module", "TinyDecoder"), {"input_ids": ids}, ("logits",))


def program(kind: str, dtype: torch.dtype) -> Program:
    """Return it through the standard passes: ``RESIDUALS``, or routed by the rule of that name."""
    if kind in RESIDUALS:
        return lifted(captured(dtype), RESIDUALS[kind])
    rule: Any = kind
    spec = RouteSpec((1, 3), (Fraction(1, 2),), rule=rule)
    parts = draw_parts(spec, WIDTH, seed=0)
    pipeline = standard_pipeline(attn_res=None, attention="decomposed", route=parts, schedule="auto")
    return pipeline.run(captured(dtype))
