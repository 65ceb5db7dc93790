"""Two-phase reads in plain operations: reads of the finished blocks and of the open one, merged by online softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    Merge = Callable[["Part", "Part"], Tensor]

WIDTH, BLOCKS, PER_BLOCK = 8, 3, 2


class Part(NamedTuple):
    """Stacked sources ``[n, B, T, d]`` and their logits ``[n, B, T]``."""

    values: Tensor
    logits: Tensor

    def read(self) -> tuple[Tensor, Tensor]:
        """Return the part's own read and the logarithm of the sum of its exponentials."""
        return torch.einsum("nbt,nbtd->btd", self.logits.softmax(0), self.values), self.logits.logsumexp(0)


def exponentials(a: Part, b: Part) -> Tensor:
    """The paper's algorithm 1."""
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    m = torch.maximum(lse1, lse2)
    w1, w2 = torch.exp(lse1 - m).unsqueeze(-1), torch.exp(lse2 - m).unsqueeze(-1)
    return (w1 * o1 + w2 * o2) / (w1 + w2)


def weights_first(a: Part, b: Part) -> Tensor:
    """The weights are normalised before they are used; no maximum."""
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    w1, w2 = lse1.exp(), lse2.exp()
    total = w2 + w1
    return (w2 / total)[..., None] * o2 + (w1 / total)[..., None] * o1


def accumulators(a: Part, b: Part) -> Tensor:
    """Flash attention's: unnormalised sums are rescaled to a new maximum."""
    m1, m2 = a.logits.amax(0), b.logits.max(0).values
    e1, e2 = torch.exp(a.logits - m1), torch.exp(b.logits - m2.unsqueeze(0))
    s1, s2 = e1.sum(0), e2.sum(0)
    o1, o2 = (e1.unsqueeze(-1) * a.values).sum(0), torch.einsum("nbt,nbtd->btd", e2, b.values)
    m = torch.maximum(m1, m2)
    c1, c2 = torch.exp(m1 - m), torch.exp(m2 - m)
    return (c1[..., None] * o1 + c2[..., None] * o2) / (c1 * s1 + c2 * s2)[..., None]


def streaming(a: Part, b: Part) -> Tensor:
    """One source after another."""
    logits, values = [*a.logits.unbind(0), *b.logits.unbind(0)], [*a.values.unbind(0), *b.values.unbind(0)]
    m, total, out = logits[0], torch.ones_like(logits[0]), values[0]
    for logit, v in zip(logits[1:], values[1:], strict=True):
        top = torch.maximum(m, logit)
        old, new = torch.exp(m - top), torch.exp(logit - top)
        out = out * old.unsqueeze(-1) + v * new.unsqueeze(-1)
        total, m = total * old + new, top
    return out / total.unsqueeze(-1)


def log_of_sum(a: Part, b: Part) -> Tensor:
    """The log-sum-exps by hand, joined by ``logaddexp``."""
    (o1, _), (o2, _) = a.read(), b.read()
    m1 = a.logits.amax(0)
    lse1 = m1 + (a.logits - m1).exp().sum(0).log()
    lse2 = b.logits.exp().sum(0).log()
    both = torch.logaddexp(lse1, lse2)
    return torch.exp(lse1 - both)[..., None] * o1 + torch.exp(lse2 - both)[..., None] * o2


def shares(a: Part, b: Part) -> Tensor:
    """A sigmoid gives the second part's share."""
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    share = torch.sigmoid(lse2 - lse1).unsqueeze(-1)
    return share * o2 + (1 - share) * o1


def both_shares(a: Part, b: Part) -> Tensor:
    """Two sigmoids."""
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    return torch.sigmoid(lse1 - lse2)[..., None] * o1 + torch.sigmoid(lse2 - lse1)[..., None] * o2


def moved(a: Part, b: Part) -> Tensor:
    """The share moves the first read towards the second."""
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    return o1 + torch.sigmoid(lse2 - lse1).unsqueeze(-1) * (o2 - o1)


def interpolated(a: Part, b: Part) -> Tensor:
    """The same by ``lerp``."""
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    return torch.lerp(o1, o2, torch.sigmoid(lse2 - lse1).unsqueeze(-1))


def one_partial(a: Part, b: Part) -> Tensor:
    """The second part is one source: its value and its logit, without a softmax."""
    o, lse = a.read()
    p, z = b.values[-1], b.logits[-1]
    m = torch.maximum(lse, z)
    w, e = torch.exp(lse - m), torch.exp(z - m)
    return (w.unsqueeze(-1) * o + e.unsqueeze(-1) * p) / (w + e).unsqueeze(-1)


def one_partial_moved(a: Part, b: Part) -> Tensor:
    """The same with a sigmoid: ``o + a (p - o)``."""
    o, lse = a.read()
    share = torch.sigmoid(b.logits[-1] - lse)
    return o + share.unsqueeze(-1) * (b.values[-1] - o)


MERGES: tuple[Merge, ...] = (
    exponentials,
    weights_first,
    accumulators,
    streaming,
    log_of_sum,
    shares,
    both_shares,
    moved,
    interpolated,
    one_partial,
    one_partial_moved,
)


class Merging(nn.Module):
    """Block AttnRes; the first sublayer of a block reads the finished blocks, the others merge in the open one."""

    def __init__(self, merge: Merge, joint: bool) -> None:
        super().__init__()
        self.merge, self.joint = merge, joint
        self.queries = nn.Parameter(torch.randn(BLOCKS * PER_BLOCK, WIDTH))
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.bias = nn.Parameter(torch.tensor(0.4))
        self.bodies = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS * PER_BLOCK))

    def keys(self, v: Tensor) -> Tensor:
        """Normalised sources."""
        return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-3) * self.gain

    def part(self, sources: list[Tensor], index: int, all_logits: Tensor | None = None) -> Part:
        """Stacked sources with the logits of one query."""
        v = torch.stack(sources)
        if all_logits is not None:
            return Part(v, all_logits[index % PER_BLOCK])
        return Part(v, self.keys(v) @ self.queries[index] + self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, d]`` to the same."""
        bank, h = [x], x
        for block in range(BLOCKS):
            partial: Tensor | None = None
            logits = None
            if self.joint:
                rows = self.queries[block * PER_BLOCK : (block + 1) * PER_BLOCK]
                logits = torch.einsum("md,nbtd->mnbt", rows, self.keys(torch.stack(bank))) + self.bias
            for index in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
                past = self.part(bank, index, logits)
                h = past.read()[0] if partial is None else self.merge(past, self.part([partial], index))
                f = torch.tanh(self.bodies[index](h))
                partial = f if partial is None else partial + f
            bank = [*bank, partial]  # type: ignore[list-item]
        return torch.tanh(h)


READS = BLOCKS * PER_BLOCK


def build(merge: Merge, *, joint: bool = False) -> nn.Module:
    """Return the model in fp64; ``joint``: the logits of a block's queries over the finished blocks come at once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Merging(merge, joint).double().eval()
