"""Routed sublayers among AttnRes reads: what is not computed is a source of zeros, or of its prior."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from depthwire.models._layers import rotary_tables
from depthwire.models.attn_res import AttnResConfig, AttnResDecoder, depth_read
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.routing_ops import SCATTER
from depthwire.passes.partition import Partition
from depthwire.passes.recognize_attn_res import RecognizeAttnRes
from depthwire.passes.remove_trivial_reads import RemoveTrivialReads
from depthwire.route import RouteSpec
from depthwire.route_parts import RouteParts, draw_parts
from tests.passes.lifted import lifted, plain_reads
from tests.passes.parity import FP64, error, named_nodes, node_values, run
from tests.routable import canonical, routed
from tests.routing_cases import expected_top_k
from tests.zoo import WIDTH, Spec, build, inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.program import Program

CONFIG = AttnResConfig(
    vocab_size=23, width=16, layers=3, heads=4, kv_heads=2, head_dim=4, mlp_width=24, max_length=32, residual="full"
)


@dataclass(frozen=True)
class Step:
    """One sublayer: how it reads the sources, its norm, and what it makes of the chosen tokens of one sequence."""

    kind: str
    read: Callable[[list[Tensor]], Tensor]
    norm: Callable[[Tensor], Tensor]
    body: Callable[[Tensor, list[int]], Tensor]
    starts: bool


def sources_behind(embedding: Tensor, steps: list[Step], parts: RouteParts) -> list[Tensor]:
    """Return the sources that the last read has, each sublayer computed on the chosen tokens alone."""
    spec = parts.spec
    completed, partial = [embedding], None
    chosen: list[list[int]] | None = None
    for number, step in enumerate(steps):
        sources = completed if partial is None else [*completed, partial]
        x = step.read(sources)
        layer = number // 2
        dense = [list(range(x.shape[1]))] * len(x)
        if layer not in spec.layers or spec.unit not in ("block", step.kind):
            tokens = dense
        elif spec.unit != "block" or step.kind == "attention":
            scored = step.norm(x) if spec.score == "linear" else sources[-1]
            score = scored @ parts.of(layer, "router.weight").double()
            index, _ = expected_top_k(score, torch.ones(score.shape, dtype=torch.bool), spec.slots(layer, x.shape[1]))
            tokens = chosen = index.tolist()
        else:
            assert chosen is not None
            tokens = chosen
        out = torch.zeros_like(x)
        if tokens is not dense and spec.fallback == "linear":
            weight, bias = (parts.of(layer, f"fallback.{name}").double() for name in ("weight", "bias"))
            out = step.norm(x) @ weight.T + bias
        for row, places in enumerate(tokens):
            out[row, places] = step.body(step.norm(x[row, places]), places)
        if step.starts and partial is not None:
            completed, partial = [*completed, partial], None
        partial = out if partial is None else partial + out
    assert partial is not None
    return [*completed, partial]


def native_steps(model: AttnResDecoder, length: int) -> list[Step]:
    cos, sin = rotary_tables(length, model.config, model.embed_tokens.weight)
    steps = []
    for module in model.layers:
        layer: Any = module
        full = model.config.residual == "full"

        def attend(x: Tensor, places: list[int], layer: Any = layer) -> Tensor:
            return layer.self_attn(x[None], cos[places], sin[places])[0]  # type: ignore[no-any-return]

        def read(sources: list[Tensor], layer: Any = layer, kind: str = "self_attention") -> Tensor:
            return depth_read(sources, getattr(layer, f"{kind}_res_proj"), getattr(layer, f"{kind}_res_norm"))

        def second(sources: list[Tensor], layer: Any = layer) -> Tensor:
            return read(sources, layer, "mlp")

        def mapped(x: Tensor, _: list[int], layer: Any = layer) -> Tensor:
            return layer.mlp(x)  # type: ignore[no-any-return]

        steps.append(Step("attention", read, layer.input_layernorm, attend, full or layer.boundary))
        steps.append(Step("mlp", second, layer.post_attention_layernorm, mapped, full))
    return steps


def native(residual: str) -> tuple[AttnResDecoder, Program, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AttnResDecoder(dataclasses.replace(CONFIG, residual=residual)).double().eval()
        for name, parameter in model.named_parameters():
            if "res_proj" in name:
                torch.nn.init.normal_(parameter, std=2 * CONFIG.width**-0.5)
    ids = inputs(batch=2, length=8)
    program = canonical(model, {"ids": ids})
    program = Pipeline((RecognizeAttnRes(), RemoveTrivialReads())).run(program)
    return model, program, ids


WAYS: list[dict[str, Any]] = [
    {"unit": "block", "score": "mod"},
    {"unit": "attention", "score": "linear", "fallback": "linear"},
    {"unit": "mlp", "score": "mod"},
]


@pytest.mark.parametrize("options", WAYS, ids=lambda options: options["unit"])
@pytest.mark.parametrize("residual", ["full", "block-layers:1", "block-layers:2"])
def test_native_models(residual: str, options: dict[str, Any]) -> None:
    model, before, ids = native(residual)
    whole = RouteSpec((0, 1, 2), (Fraction(1),), rule="top-k", unit=options["unit"], score="mod")
    assert torch.equal(run(routed(before, draw_parts(whole, 16, 0)), ids)[0], run(before, ids)[0])

    parts = draw_parts(RouteSpec((1, 2), (Fraction(1, 2),), rule="top-k", **options), 16, 0)
    after = routed(before, parts)
    with torch.no_grad():
        sources = sources_behind(model.embed_tokens(ids), native_steps(model, ids.shape[1]), parts)
        read = depth_read(sources, model.output_attn_res_proj, model.output_attn_res_norm)
        head = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
        want = model.norm(read) @ head.T
    assert error(run(after, ids), [want]) <= FP64
    assert error(run(before, ids), [want]) > 1e3 * FP64


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
@pytest.mark.parametrize("attn_res", ["full", "block:2", "block-layers:1"])
def test_lifted_models(attn_res: str, unit: Any) -> None:
    spec = Spec(layers=3)
    before = RemoveTrivialReads().run(lifted(spec, attn_res, length=6)).program
    ids = inputs(length=6)
    whole = RouteSpec((0, 1, 2), (Fraction(1),), rule="top-k", unit=unit)
    assert torch.equal(run(routed(before, draw_parts(whole, WIDTH, 0)), ids)[0], run(before, ids)[0])

    parts = draw_parts(RouteSpec((1, 2), (Fraction(1, 2),), rule="top-k", unit=unit, score="mod"), WIDTH, 0)
    after = routed(before, parts)
    model = build(spec)
    queries = {name: tensor for name, tensor in before.exported.state_dict.items() if "attn_res.query" in name}
    with torch.no_grad():
        eps = float(plain_reads(before)[0].args[2])  # type: ignore[arg-type]
        steps = lifted_steps(model, queries, attn_res, eps)
        sources = sources_behind(model.embedding(ids), steps, parts)
        final = depth_mean(sources, queries[f"attn_res.query.{len(steps)}"], eps)
        want = model.head(model.norm(final, shrink=len(sources) ** 2))
    assert error(run(after, ids), [want]) <= FP64


def depth_mean(sources: list[Tensor], query: Tensor, eps: float) -> Tensor:
    """Return softmax_i(q · v_i / rms(v_i)) v_i: the read as ``docs/attn_res_read.md`` has it."""
    if len(sources) == 1:
        return sources[0]
    bank = torch.stack(sources)
    logits = (bank / (bank.square().mean(-1, keepdim=True) + eps).sqrt()) @ query.double()
    return (logits.softmax(0).unsqueeze(-1) * bank).sum(0)


def lifted_steps(model: Any, queries: dict[str, Tensor], attn_res: str, eps: float) -> list[Step]:
    kinds = ["attention", "mlp"] * len(model.blocks())
    starts = Partition.parse(attn_res).starts(kinds)
    steps = []
    parts = [part for block in model.blocks() for step in block.steps() for part in step]
    for number, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
        counted = [1]

        def read(sources: list[Tensor], number: int = number, counted: list[int] = counted) -> Tensor:
            counted[0] = len(sources)
            return depth_mean(sources, queries.get(f"attn_res.query.{number}", torch.zeros(WIDTH)), eps)

        def norm(x: Tensor, part: Any = part, counted: list[int] = counted) -> Tensor:
            return part.before(x, shrink=counted[0] ** 2)  # type: ignore[no-any-return]

        def body(x: Tensor, _: list[int], part: Any = part) -> Tensor:
            return part.body(x[None])[0]  # type: ignore[no-any-return]

        steps.append(Step(kind, read, norm, body, starts[number]))
    return steps


def test_what_is_skipped_is_zero() -> None:
    _, before, ids = native("full")
    parts = draw_parts(RouteSpec((1,), (Fraction(1, 4),), rule="top-k", score="mod"), 16, 0)
    after = routed(before, parts)
    values = node_values(after, ids)
    scatters = named_nodes(after, SCATTER)
    assert len(scatters) == 2  # the attention's source and the MLP's, of one selection
    for scatter in scatters:
        index = values[str(scatter.args[1])]
        skipped = torch.ones(ids.shape, dtype=torch.bool).scatter(1, index, value=False)
        assert (values[scatter.name][skipped] == 0).all()
        assert (values[scatter.name][~skipped] != 0).any()
