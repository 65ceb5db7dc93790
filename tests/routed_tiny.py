"""A tiny decoder with routed layers, exported: what the tests of routed artefacts share."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from depthwire.export._route_manifest import RoutedGraphs, graph_name
from depthwire.export.goldens import make_goldens
from depthwire.export.to_onnx import to_onnx
from depthwire.export.write import write_artifact
from depthwire.passes.standard import standard_pipeline
from depthwire.program import Program, Source
from depthwire.route import RouteSpec
from depthwire.route_parts import draw_parts
from tests.export.tiny import HEADS, VOCABULARY, WIDTH, TinyDecoder

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from depthwire.artifact import Artifact

LAYERS, BATCH, TOKENS = 4, 2, 16
ROUTED = (1, 3)
HALF = (Fraction(1, 2),)


def ids(tokens: int = TOKENS, seed: int = 1) -> torch.Tensor:
    """Token ids ``[2, tokens]``."""
    return torch.randint(0, VOCABULARY, (BATCH, tokens), generator=torch.Generator().manual_seed(seed))


class SplitAttention(nn.Module):
    """Attention with linear layers of their own for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(x.shape))
        return out


@functools.cache
def captured(tokens: int = TOKENS, batch: int = BATCH, *, split: bool = False) -> Program:
    """Return the decoder, with the same weights every time; ``split`` parts its joint queries, keys and values."""
    torch.manual_seed(0)
    example = ids(tokens)[:batch]
    decoder = TinyDecoder(LAYERS).eval()
    if split:
        for layer in decoder.layers:
            layer.attention = SplitAttention()
    with torch.no_grad():
        exported = torch.export.export(decoder, (example,)).run_decompositions({})
    return Program(exported, Source("module", "TinyDecoder"), {"input_ids": example}, ("logits",))


def routed(
    tokens: int = TOKENS, *, batch: int = BATCH, target: str = "op", split: bool = False, **options: Any
) -> Program:
    """Return it with layers 1 and 3 routed at one half by a running budget, unless the options say otherwise."""
    spec = RouteSpec(**{"layers": ROUTED, "capacity": HALF, **options})
    parts = draw_parts(spec, WIDTH, seed=0)
    attention: Any = target
    pipeline = standard_pipeline(attn_res=None, attention=attention, route=parts, schedule="auto")
    return pipeline.run(captured(tokens, batch, split=split))


def write_routed(
    out: Path, capacities: tuple[Fraction, ...] = (), *, carry: bool = False, target: str = "op", **options: Any
) -> Artifact:
    """Write an artefact with a graph for each capacity."""
    program = routed(target=target, **options)
    spec = RouteSpec(**{"layers": ROUTED, "capacity": HALF, **options})
    models = {
        graph_name(c): to_onnx(routed(target=target, **{**options, "capacity": (c,)}), carry=carry) for c in capacities
    }
    return write_artifact(
        out,
        original=captured(),
        rewritten=program,
        model=to_onnx(program, carry=carry),
        goldens=make_goldens(program, [{"input_ids": ids().numpy()}]),
        recipe={},
        checkpoints=[],
        routed=RoutedGraphs(spec, models, {graph_name(c): c for c in capacities}),
    )


def feed(seed: int = 1) -> dict[str, np.ndarray]:
    """Inputs by name."""
    return {"input_ids": ids(seed=seed).numpy()}
