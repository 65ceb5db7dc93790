"""Reads with something special about them, one function each; all are found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.passes.native_attn_res.spellings import WIDTH, normalised

if TYPE_CHECKING:
    from collections.abc import Callable

    Variant = Callable[[Tensor, "Weights"], Tensor]


class Weights(nn.Module):
    """Queries, a gain, a temperature and a null source."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(WIDTH))
        self.queries = nn.Parameter(torch.randn(3, WIDTH))
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.null = nn.Parameter(torch.randn(WIDTH))
        self.linear = nn.Linear(WIDTH, 1)


def sources(x: Tensor) -> list[Tensor]:
    """Three sources."""
    return [x, torch.sin(x), torch.cos(x) * 2]


def keys(v: Tensor) -> Tensor:
    """Keys without gain."""
    return normalised(v, "rsqrt")


def mix(weights: Tensor, v: Tensor) -> Tensor:
    """``Σ_i w_i v_i`` over the first axis."""
    return torch.einsum("nbt,nbtd->btd", weights, v)


def biased_projection(x: Tensor, w: Weights) -> Tensor:
    """``nn.Linear(d, 1)`` with its bias, which no softmax sees."""
    v = torch.stack(sources(x))
    return mix(w.linear(keys(v)).squeeze(-1).softmax(0), v)


def temperature(x: Tensor, w: Weights) -> Tensor:
    """A learned temperature."""
    v = torch.stack(sources(x))
    return mix(((keys(v) @ w.query) * w.temperature.exp() / 2).softmax(0), v)


def null_source(x: Tensor, w: Weights) -> Tensor:
    """A learned source in front."""
    v = torch.stack([w.null.expand_as(x), *sources(x)])
    return mix((keys(v) @ w.query).softmax(0), v)


def zero_source(x: Tensor, w: Weights) -> Tensor:
    """A source of zeros in front."""
    v = torch.stack([torch.zeros_like(x), *sources(x)])
    return mix((keys(v) @ w.query).softmax(0), v)


def gained_values(x: Tensor, w: Weights) -> Tensor:
    """The values are the keys, gain included."""
    k = keys(torch.stack(sources(x))) * w.gain
    return mix((k @ w.query).softmax(0), k)


def normed_sources(x: Tensor, w: Weights) -> Tensor:
    """Each source is the output of a norm itself."""
    v = torch.stack([keys(each) for each in sources(x)])
    return mix((keys(v) @ w.query).softmax(0), v)


def scaled_weights(x: Tensor, w: Weights) -> Tensor:
    """The weights are halved."""
    v = torch.stack(sources(x))
    return mix((keys(v) @ w.query).softmax(0) * 0.5, v)


def taken_apart(x: Tensor, w: Weights) -> Tensor:
    """A source is taken out of the bank again."""
    v = torch.stack(sources(x))
    return functional.rms_norm(mix((keys(v) @ w.query).softmax(0), v), (WIDTH,)) + torch.tanh(v[1])


def joint_queries(x: Tensor, w: Weights) -> Tensor:
    """Three queries whose reads stay together."""
    v = torch.stack(sources(x), 2)
    weights = torch.einsum("md,btnd->btmn", w.queries, keys(v)).softmax(-1)
    return torch.einsum("btmn,btnd->btmd", weights, v)


# Variant -> reads.
VARIANTS: dict[Variant, int] = {
    biased_projection: 1,
    temperature: 1,
    null_source: 1,
    zero_source: 1,
    gained_values: 1,
    normed_sources: 1,
    scaled_weights: 1,
    taken_apart: 1,
    joint_queries: 3,
}


class Model(nn.Module):
    """One variant."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.weights = Weights()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, d]`` to what the variant reads."""
        return self.variant(x, self.weights)


def build(variant: Variant) -> nn.Module:
    """Return the model in fp64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(variant).double().eval()
