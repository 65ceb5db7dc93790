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


def l2_norm(x: Tensor, w: Weights) -> Tensor:
    """Keys of length 1 (``functional.normalize``) times sqrt(d), one source of zeros."""
    v = torch.stack([torch.zeros_like(x), *sources(x)])
    return mix((functional.normalize(v, dim=-1) @ w.query * WIDTH**0.5).softmax(0), v)


def l2_norm_spelled(x: Tensor, w: Weights) -> Tensor:
    """The same by hand; the values are the keys."""
    v = torch.stack(sources(x), 1)
    k = v / v.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.einsum("bnt,bntd->btd", (k @ w.query).softmax(1), k)


def l2_norm_each(x: Tensor, w: Weights) -> Tensor:
    """Source by source, without eps."""
    each = sources(x)
    scores = [(v / torch.linalg.vector_norm(v, dim=-1, keepdim=True) * w.query).sum(-1) for v in each]
    return mix(torch.stack(scores).softmax(0), torch.stack(each))


def idle_clamp(x: Tensor, w: Weights) -> Tensor:
    """A clamp below what the eps inside the root allows."""
    v = torch.stack(sources(x))
    k = v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt().clamp_min(1e-6)
    return mix((k @ w.query).softmax(0), v)


def gathered(x: Tensor, w: Weights) -> Tensor:
    """Some sources of a bank, by an index tensor."""
    v = torch.stack(sources(x), 1)[:, torch.tensor([2, 0])]
    return torch.einsum("bnt,bntd->btd", (keys(v) @ w.query).softmax(1), v)


def selected(x: Tensor, w: Weights) -> Tensor:
    """One of them by ``index_select``, one twice."""
    v = torch.stack(sources(x)).index_select(0, torch.tensor([1, 0, 1]))
    return mix((keys(v) @ w.query).softmax(0), v)


def reordered(x: Tensor, w: Weights) -> Tensor:
    """Weights and sources in another order than the keys; newest first."""
    v = torch.stack(sources(x)).flip(0)
    order = torch.tensor([1, 2, 0])
    return mix((keys(v) @ w.query).softmax(0)[order], v[order])


def channels_first(x: Tensor, w: Weights) -> Tensor:
    """Sources ``[B, d, T]``, as convolutions make them."""
    v = torch.stack([torch.cumsum(each.mT, 2) for each in sources(x)])
    k = v * torch.rsqrt(v.square().mean(2, keepdim=True) + 1e-5) * w.gain[:, None]
    return torch.tanh((torch.einsum("nbdt,d->nbt", k, w.query).softmax(0).unsqueeze(2) * v).sum(0))


def channels_first_gained(x: Tensor, w: Weights) -> Tensor:
    """The values have a gain; three queries."""
    v = torch.stack([torch.cumsum(each.mT, 2) for each in sources(x)], 1)
    k = v * torch.rsqrt(v.square().mean(2, keepdim=True) + 1e-5)
    weights = torch.einsum("bndt,md->bmnt", k, w.queries).softmax(2)
    return torch.einsum("bmnt,bndt->mbdt", weights, v * w.gain[:, None])


def one_step(x: Tensor, w: Weights) -> Tensor:
    """Channels first and one token: the features stand before an axis of size 1."""
    v = torch.stack([torch.cumsum(each[:, :1].mT, 1) for each in sources(x)])
    k = v * torch.rsqrt(v.square().mean(2, keepdim=True) + 1e-5)
    return torch.tanh((torch.einsum("nbdt,d->nbt", k, w.query).softmax(0).unsqueeze(2) * v).sum(0))


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
    l2_norm: 1,
    l2_norm_spelled: 1,
    l2_norm_each: 1,
    idle_clamp: 1,
    gathered: 1,
    selected: 1,
    reordered: 1,
    channels_first: 1,
    channels_first_gained: 3,
    one_step: 1,
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
