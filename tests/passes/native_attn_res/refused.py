"""Depth mixing that is no AttnRes read, one function each: sources ``[B, T, d]`` and the module's weights to a mix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.passes.native_attn_res.spellings import WIDTH, normalised

if TYPE_CHECKING:
    from collections.abc import Callable

    Mixer = Callable[[list[Tensor], "Weights"], Tensor]


class Weights(nn.Module):
    """What the mixers take their queries, gates and projections from."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(WIDTH))
        self.short = nn.Parameter(torch.randn(WIDTH // 2))
        self.table = nn.Parameter(torch.randn(3, WIDTH))
        self.biases = nn.Parameter(torch.randn(3))
        self.to_query = nn.Linear(WIDTH, WIDTH)
        self.to_value = nn.Linear(WIDTH, WIDTH)
        self.to_scalar = nn.Linear(WIDTH, 1)


def mix(weights: Tensor, v: Tensor) -> Tensor:
    """``Σ_i w_i v_i`` over the first axis."""
    return torch.einsum("nbt,nbtd->btd", weights, v)


def logits(v: Tensor, w: Weights) -> Tensor:
    """The logits of a read."""
    return normalised(v, "rsqrt") @ w.query


def input_query(sources: list[Tensor], w: Weights) -> Tensor:
    """The query is a projection of the last source."""
    v = torch.stack(sources)
    q = w.to_query(sources[-1])
    return mix(torch.einsum("btd,nbtd->nbt", q, normalised(v, "rsqrt")).softmax(0), v)


def no_key_norm(sources: list[Tensor], w: Weights) -> Tensor:
    """The paper's ablation."""
    v = torch.stack(sources)
    return mix((v @ w.query).softmax(0), v)


def layer_norm_keys(sources: list[Tensor], w: Weights) -> Tensor:
    """Keys under a LayerNorm."""
    v = torch.stack(sources)
    return mix((functional.layer_norm(v, (WIDTH,)) @ w.query).softmax(0), v)


def spelled_layer_norm_keys(sources: list[Tensor], w: Weights) -> Tensor:
    """The same in elementary operations."""
    v = torch.stack(sources)
    centred = v - v.mean(-1, keepdim=True)
    return mix((normalised(centred, "rsqrt") @ w.query).softmax(0), v)


def low_rank(sources: list[Tensor], w: Weights) -> Tensor:
    """LR-AttnRes: the keys are the last R channels."""
    v = torch.stack(sources)
    return mix((normalised(v[..., WIDTH // 2 :], "rsqrt") @ w.short).softmax(0), v)


def sigmoid(sources: list[Tensor], w: Weights) -> Tensor:
    """The paper's ablation: gates instead of weights."""
    v = torch.stack(sources)
    return mix(torch.sigmoid(logits(v, w)), v)


def other_values(sources: list[Tensor], w: Weights) -> Tensor:
    """The values are projections of the sources."""
    v = torch.stack(sources)
    return mix(logits(v, w).softmax(0), torch.stack([w.to_value(each) for each in sources]))


def reversed_values(sources: list[Tensor], w: Weights) -> Tensor:
    """The values are the sources in another order."""
    return mix(logits(torch.stack(sources), w).softmax(0), torch.stack(sources[::-1]))


def other_value_norm(sources: list[Tensor], w: Weights) -> Tensor:
    """The values are normalised with another eps than the keys."""
    v = torch.stack(sources)
    return mix(logits(v, w).softmax(0), functional.rms_norm(v, (WIDTH,), None, 0.5))


def input_temperature(sources: list[Tensor], w: Weights) -> Tensor:
    """A temperature per token."""
    v = torch.stack(sources)
    return mix((logits(v, w) * w.to_scalar(sources[0]).squeeze(-1)).softmax(0), v)


def input_bias(sources: list[Tensor], w: Weights) -> Tensor:
    """A bias per token and source."""
    v = torch.stack(sources)
    return mix((logits(v, w) + w.to_scalar(v).squeeze(-1)).softmax(0), v)


def biases(sources: list[Tensor], w: Weights) -> Tensor:
    """A learned bias per source."""
    v = torch.stack(sources)
    return mix((logits(v, w) + w.biases.view(3, 1, 1)).softmax(0), v)


def per_source_queries(sources: list[Tensor], w: Weights) -> Tensor:
    """A query for every pair of reader and source."""
    v = torch.stack(sources)
    return mix((normalised(v, "rsqrt") * w.table.view(3, 1, 1, WIDTH)).sum(-1).softmax(0), v)


def moda(sources: list[Tensor], w: Weights) -> Tensor:
    """MoDA: one softmax over the sequence and, per token, over depth."""
    q, x = w.to_query(sources[-1]), sources[-1]
    depth = torch.stack([w.to_value(each) for each in sources], 2)
    scores = q @ x.mT
    joint = torch.cat([scores, torch.einsum("btd,btnd->btn", q, depth)], -1).softmax(-1)
    over_time, over_depth = torch.split(joint, [x.shape[1], len(sources)], -1)
    return over_time @ x + torch.einsum("btn,btnd->btd", over_depth, depth)


def hyper_connections(sources: list[Tensor], w: Weights) -> Tensor:
    """Streams that are mixed with weights computed from the last one; no softmax over depth."""
    v = torch.stack(sources, 2)
    weights = torch.tanh(torch.cat([w.to_scalar(normalised(each, "rsqrt")) for each in sources], -1))
    return torch.einsum("btn,btnd->btd", weights, v)


def masked(sources: list[Tensor], w: Weights) -> Tensor:
    """Attention over depth with a mask."""
    v = normalised(torch.stack(sources, 2), "rsqrt")
    q = w.query.view(1, 1, 1, WIDTH).expand(*v.shape[:2], 1, WIDTH)
    mask = torch.tensor([True, False, True]).view(1, 1, 1, 3)
    return functional.scaled_dot_product_attention(q, v, v, attn_mask=mask).squeeze(2)


def norm_per_head(sources: list[Tensor], w: Weights) -> Tensor:
    """The keys are normalised in two heads, as in QK-norm."""
    v = torch.stack(sources)
    heads = v.reshape(*v.shape[:-1], 2, WIDTH // 2)
    return mix((functional.rms_norm(heads, (WIDTH // 2,)).flatten(-2) @ w.query).softmax(0), v)


def norm_over_tokens(sources: list[Tensor], w: Weights) -> Tensor:
    """The keys are normalised along the sequence."""
    v = torch.stack(sources)
    return mix((v * torch.rsqrt(v.square().mean(2, keepdim=True) + 1e-5) @ w.query).softmax(0), v)


def norm_without_root(sources: list[Tensor], w: Weights) -> Tensor:
    """The keys are divided by their mean square."""
    v = torch.stack(sources)
    return mix((v / (v.square().mean(-1, keepdim=True) + 1e-5) @ w.query).softmax(0), v)


def norm_of_gained_keys(sources: list[Tensor], w: Weights) -> Tensor:
    """A gain before the norm."""
    v = torch.stack(sources)
    return mix((normalised(v * w.to_scalar.weight[0], "rsqrt") @ w.query).softmax(0), v)


def eps_after_the_root(sources: list[Tensor], w: Weights) -> Tensor:
    """``v / (|v| + eps)``."""
    v = torch.stack(sources)
    return mix((v / (v.norm(dim=-1, keepdim=True) + 1e-6) @ w.query).softmax(0), v)


def norm_from_below(sources: list[Tensor], w: Weights) -> Tensor:
    """``functional.normalize`` whose eps is large enough to act."""
    v = torch.stack(sources)
    return mix((functional.normalize(v, dim=-1, eps=1e-6) @ w.query).softmax(0), v)


def positions(sources: list[Tensor], w: Weights) -> Tensor:
    """A learned bias per source and position (here of three tokens)."""
    v = torch.stack(sources)
    return mix((logits(v, w) + w.table[:, None, :3]).softmax(0), v)


def query_per_position(sources: list[Tensor], w: Weights) -> Tensor:
    """A learned query per position (here of three tokens)."""
    v = torch.stack(sources)
    return mix((normalised(v, "rsqrt") * w.table).sum(-1).softmax(0), v)


def magnitudes(sources: list[Tensor], w: Weights) -> Tensor:  # noqa: ARG001
    """The larger a source, the more of it; there is no query."""
    v = torch.stack(sources)
    return mix(v.square().mean(-1).sqrt().softmax(0), v)


def soft_capped(sources: list[Tensor], w: Weights) -> Tensor:
    """Logits under Gemma's soft cap."""
    v = torch.stack(sources)
    return mix((30 * torch.tanh(logits(v, w) / 30)).softmax(0), v)


def first_alone(sources: list[Tensor], w: Weights) -> Tensor:
    """The first source, gated by its weight."""
    return logits(torch.stack(sources), w).softmax(0)[0].unsqueeze(-1) * sources[0]


def whole_buffer(sources: list[Tensor], w: Weights) -> Tensor:
    """One slot too many of a preallocated buffer."""
    buffer = sources[0].new_zeros(len(sources) + 1, *sources[0].shape)
    for index, source in enumerate(sources):
        buffer[index] = source
    return mix(logits(buffer, w).softmax(0), buffer)


REFUSED: dict[Mixer, str | None] = {
    input_query: "query-depends-on-input",
    no_key_norm: "no-key-norm",
    layer_norm_keys: "layer-norm-keys",
    spelled_layer_norm_keys: "layer-norm-keys",
    low_rank: "low-rank-keys",
    sigmoid: "sigmoid",
    other_values: "values-differ",
    reversed_values: "values-differ",
    other_value_norm: "value-norm",
    input_temperature: "temperature-depends-on-input",
    input_bias: "bias-depends-on-input",
    biases: "bias-not-last",
    per_source_queries: "per-source-scale",
    moda: "joint-softmax",
    masked: "masked",
    norm_per_head: "key-norm",
    norm_over_tokens: "key-norm",
    norm_without_root: "key-norm",
    norm_of_gained_keys: "key-norm",
    eps_after_the_root: "norm-eps",
    norm_from_below: "norm-eps",
    positions: "bias-per-token",
    query_per_position: "query-per-token",
    magnitudes: "no-dot-product",
    soft_capped: "unsupported",
    first_alone: "values",
    whole_buffer: "unwritten-slot",
    hyper_connections: None,
}


class Refused(nn.Module):
    """Three sources and one mix of them."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.weights = Weights()
        self.bodies = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, d]`` to the same."""
        sources = [x, torch.tanh(self.bodies[0](x)), torch.tanh(self.bodies[1](x))]
        return self.mixer(sources, self.weights)


def build(mixer: Mixer) -> nn.Module:
    """Return the model in fp64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Refused(mixer).double().eval()
