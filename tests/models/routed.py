"""Routed models for tests, and the same mathematics written as plainly as can be: one sequence, one head, loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from depthwire.models.routed_examples import example

if TYPE_CHECKING:
    from depthwire.models.routed_decoder import DecoderLayer, RoutedDecoder
    from depthwire.models.routing_config import Kind, Spelling

KINDS: tuple[Kind, ...] = ("mixture_of_depths", "subjective_depth", "subjective_timescale", "attn_res")
SPELLINGS: tuple[Spelling, ...] = ("gather", "index", "onehot")
TOKENS = 24
# fp64 throughout: two orders of summation over at most some hundred terms of size 1 stay far below this, and a token
# that is wrongly routed is off by more than 1e-3.
FP64 = 1e-9


def make(kind: Kind, **routing: Any) -> RoutedDecoder:
    """A decoder in fp64 with gains and scalars drawn as well; the weights hang on the kind alone."""
    model = example(kind, tokens=64, batch=2, **{"window": 7, "margin": 2, **routing})[0].double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.copy_(torch.rand(weight.shape, generator=generator, dtype=weight.dtype) + 0.5)
        if model.rule == "budget":
            model.trace(ids(8, 64), calibrate=True)
    return model


def ids(batch: int = 2, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padding(tokens: int = TOKENS) -> Tensor:
    """One row padded on the left, one on the right, one not at all."""
    mask = torch.ones(3, tokens, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, tokens - 7 :] = 0
    return mask


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=FP64, atol=FP64)


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """A head's vector turned to its position, pair by pair."""
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        # The model makes its angles in fp32, positions and frequencies alike.
        frequency = torch.tensor(theta) ** -(torch.tensor(2.0 * i) / len(x))
        angle = (torch.tensor(float(position)) * frequency).double()
        cos, sin = angle.float().cos().double(), angle.float().sin().double()
        out[i], out[i + half] = x[i] * cos - x[i + half] * sin, x[i + half] * cos + x[i] * sin
    return out


def attended(layer: DecoderLayer, x: Tensor, queries: list[int], keys: list[int], theta: float) -> Tensor:
    """The attention sublayer of the queries over the keys at or before them; x is normed, ``[tokens, width]``."""
    attention = layer.self_attn
    size, group = attention.head_dim, attention.heads // attention.kv_heads
    rows = []
    for q in queries:
        heads = []
        for head in range(attention.heads):
            part, shared = slice(head * size, head * size + size), head // group
            one = slice(shared * size, shared * size + size)
            query = rotated(attention.q_proj(x[q])[part], q, theta)
            seen = [k for k in keys if k <= q]
            scores = [query @ rotated(attention.k_proj(x[k])[one], k, theta) / size**0.5 for k in seen]
            weights = torch.stack(scores).softmax(0)
            heads.append(sum((w * attention.v_proj(x[k])[one] for w, k in zip(weights, seen, strict=True)), 0 * query))
        rows.append(attention.o_proj(torch.cat(heads)))
    return torch.stack(rows) if rows else x[:0]


def computed(layer: DecoderLayer, x: Tensor, queries: list[int], keys: list[int], theta: float) -> Tensor:
    """A whole block for the queries, ``[len(queries), width]``, from ``x [tokens, width]``."""
    after = x[torch.tensor(queries, dtype=torch.int64)] + attended(
        layer, layer.input_layernorm(x), queries, keys, theta
    )
    return after + cast("Tensor", layer.mlp(layer.post_attention_layernorm(after)))


def top(score: Tensor, count: int) -> list[int]:
    """Positions of the greatest scores, in order."""
    return sorted(sorted(range(len(score)), key=lambda t: -float(score[t]))[:count])


def within_budget(score: Tensor, threshold: float, capacity: float, margin: int) -> list[int]:
    """The budget rule as the specification says it: token by token."""
    taken: list[int] = []
    for t, value in enumerate(score.tolist()):
        if value >= threshold and len(taken) < int(capacity * (t + 1)) + margin:
            taken.append(t)
    return taken


def surprise(update: Tensor, predicted: Tensor, gate: Any) -> tuple[Tensor, Tensor]:
    """Rank and gate of ``[tokens, width]``, by the formulas of the paper."""
    static = [float(row @ row) / len(row) for row in update]
    beta_ce, beta_cu = (float(beta) for beta in gate.steepness())
    rank, gates = [], []
    for t, (row, foreseen) in enumerate(zip(update, predicted, strict=True)):
        change = float((row - foreseen) @ (row - foreseen)) / len(row)
        mean = sum(static[max(0, s)] for s in range(t - gate.window + 1, t + 1)) / gate.window
        expected = static[t] - (change - float(torch.log(gate.o_ce + 1e-10)))
        unexpected = static[t] - float(gate.m_cu) * mean
        a, b = torch.tensor([beta_ce * expected, beta_cu * unexpected], dtype=torch.float64)
        s_ce, s_cu = a.sigmoid(), b.sigmoid()
        gates.append(s_ce + s_cu - s_ce * s_cu)
        rank.append((1 + a.exp()).log() + (1 + b.exp()).log())
    return torch.stack(rank), torch.stack(gates)


def plainly(model: RoutedDecoder, row: Tensor) -> Tensor:
    """Logits ``[tokens, vocab]`` of one sequence without padding, for the kinds that route blocks."""
    config, routing = model.config, model.config.routing
    theta, tokens = config.decoder.rope_theta, len(row)
    everything = list(range(tokens))
    x = model.embed_tokens(row)
    told: tuple[Tensor, Tensor] | None = None
    for index, module in enumerate(model.layers):
        layer: Any = module
        if index not in config.routed_layers:
            before, x = x, computed(layer, x, everything, everything, theta)
            if config.kind == "subjective_depth":
                told = surprise(x - before, layer.prior(before), layer.surprise)
            continue
        gates = torch.ones(tokens, dtype=x.dtype)
        if told is not None:
            score, gates = told
        elif config.kind == "subjective_timescale":
            earlier = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
            score = torch.cat((x, earlier), 1) @ layer.router.proj.weight[0]
            gates = score.sigmoid()
        else:
            score = gates = x @ layer.router.proj.weight[0]
        if model.rule == "budget":
            chosen = within_budget(score, float(layer.threshold), model.capacity, routing.margin)
        else:
            chosen = top(score, max(1, int(model.capacity * tokens)))
        keys = chosen if routing.kv == "selected" else everything
        after = x.clone()
        for t, new in zip(chosen, computed(layer, x, chosen, keys, theta), strict=True):
            after[t] = x[t] + (gates[t] if routing.gate == "score" else 1) * (new - x[t])
        x = after
    return cast("Tensor", model.norm(x) @ model.embed_tokens.weight.T)


def read(sources: list[Tensor], proj: Any, norm: Any) -> Tensor:
    """One read of the depth, token by token, from sources ``[tokens, width]``."""
    rows = []
    for t in range(len(sources[0])):
        values = [source[t] for source in sources]
        keys = [v / (v @ v / len(v) + norm.eps).sqrt() * norm.weight for v in values]
        weights = torch.stack([proj.weight[0] @ key for key in keys]).softmax(0)
        rows.append(sum((w * v for w, v in zip(weights, values, strict=True)), 0 * values[0]))
    return torch.stack(rows)


def plainly_attn_res(model: RoutedDecoder, row: Tensor) -> Tensor:
    """Logits of one sequence without padding, for AttnRes with routed sublayers."""
    routing, theta, everything = model.config.routing, model.config.decoder.rope_theta, list(range(len(row)))
    final: Any = model
    done: list[Tensor] = []
    open_block: Tensor | None = model.embed_tokens(row)
    if model.config.decoder.residual == "full":
        done, open_block = [model.embed_tokens(row)], None
    for module in model.layers:
        layer: Any = module
        for name in ("self_attn", "mlp"):
            sources = done if open_block is None else [*done, open_block]
            attention = name == "self_attn"
            added = layer.attention_routing if attention else layer.mlp_routing
            chosen = everything
            if added is not None:
                score = sources[-1] @ added.router.proj.weight[0]
                if model.rule == "budget":
                    chosen = within_budget(score, float(added.threshold), model.capacity, routing.margin)
                else:
                    chosen = top(score, max(1, int(model.capacity * len(row))))
            if attention:
                x = read(sources, layer.self_attention_res_proj, layer.self_attention_res_norm)
                outputs = attended(layer, layer.input_layernorm(x), chosen, chosen, theta)
            else:
                x = read(sources, layer.mlp_res_proj, layer.mlp_res_norm)
                outputs = layer.mlp(layer.post_attention_layernorm(x[torch.tensor(chosen, dtype=torch.int64)]))
            source = torch.zeros_like(x) if added is None or added.prior is None else added.prior(sources[-1])
            for t, output in zip(chosen, outputs, strict=True):
                source[t] = output if added is None or routing.gate == "unit" else score[t] * output
            if attention and layer.boundary:
                done, open_block = sources, None
            if layer.full:
                done = [*done, source]
            else:
                open_block = source if open_block is None else open_block + source
    sources = done if open_block is None else [*done, open_block]
    x = model.norm(read(sources, final.output_attn_res_proj, final.output_attn_res_norm))
    return cast("Tensor", x @ model.embed_tokens.weight.T)
