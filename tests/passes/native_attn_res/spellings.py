"""One AttnRes model in every spelling: layout of the axes, bank, norm, contraction, softmax, mix and casts vary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 8
EPS = 1e-3

Axis = Literal[0, 1, -2]
Bank = Literal["list", "cat", "buffer", "buffer-slice", "per-source"]
Flat = Literal["tokens", "flat", "flat-bank"]


@dataclass(frozen=True)
class Spelling:
    """How a model is written; none of it changes what it computes.

    Attributes:
        axis: Where the depth axis of the stacked sources lies.
        flat: Whether tokens are ``[B, T]`` or ``[B·T]``: everywhere, or in the reads.
        bank: How the sources are gathered.
        norm: How the keys are normalised.
        dot: How the query is contracted with the keys.
        softmax: How the weights are made.
        mix: How the sources are mixed.
        island: Whether the reads compute in fp32 in a narrower model (or fp64 in an fp32 one).
        gain: Whether the key norm has a gain.
        scale: Factor on the logits.
        bias: Whether the last logit has a bias, and how it is added.
        block: Sublayers per block; 1 is Full AttnRes.
    """

    axis: Axis = 0
    flat: Flat = "tokens"
    bank: Bank = "list"
    norm: str = "rsqrt"
    dot: str = "mul-sum"
    softmax: str = "softmax"
    mix: str = "mul-sum"
    island: bool = False
    gain: bool = True
    scale: float = 1.0
    bias: str = "none"
    block: int = 1


def normalised(v: Tensor, kind: str) -> Tensor:  # noqa: PLR0911 - a spelling each
    """RMSNorm without gain over the last axis, in several spellings."""
    width = v.shape[-1]
    if kind == "rsqrt":
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + EPS)
    if kind == "sqrt":
        return v / torch.sqrt((v * v).mean(-1, keepdim=True) + EPS)
    if kind == "reciprocal":
        return v.square().mean(-1, True).add(EPS).sqrt().reciprocal() * v
    if kind == "pow":
        return v * (v.square().sum(-1, keepdim=True) / width + EPS).pow(-0.5)
    if kind == "vector-norm":
        length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        return v * torch.rsqrt(length.square() * (1 / width) + EPS)
    if kind == "einsum":
        return v / (torch.einsum("...d,...d->...", v, v) / width + EPS).sqrt().unsqueeze(-1)
    return functional.rms_norm(v, (width,), None, EPS)


NORMS = ("rsqrt", "sqrt", "reciprocal", "pow", "vector-norm", "einsum", "rms_norm")


def logits_of(k: Tensor, u: Tensor, kind: str) -> Tensor:  # noqa: PLR0911 - a spelling each
    """Contract ``[…, d]`` with ``[d]``."""
    if kind == "mul-sum":
        return (k * u).sum(-1)
    if kind == "einsum":
        return torch.einsum("d,...d->...", u, k)
    if kind == "matmul":
        return k @ u
    if kind == "matmul-column":
        return (k @ u.unsqueeze(-1)).squeeze(-1)
    if kind == "linear":
        return functional.linear(k, u[None]).squeeze(-1)
    if kind == "tensordot":
        return torch.tensordot(k, u, dims=([-1], [0]))  # type: ignore[no-any-return]
    if kind == "mean":
        return (u * k).mean(-1) * k.shape[-1]
    return torch.inner(k, u)


DOTS = ("mul-sum", "einsum", "matmul", "matmul-column", "linear", "tensordot", "mean", "inner")


def weights_of(logits: Tensor, axis: int, kind: str) -> Tensor:
    """Softmax along an axis."""
    if kind == "softmax":
        return logits.softmax(axis)
    if kind == "exp":
        e = logits.exp()
        return e / e.sum(axis, keepdim=True)
    if kind == "exp-max":
        e = torch.exp(logits - logits.amax(axis, keepdim=True))
        return e * e.sum(axis, keepdim=True).reciprocal()
    if kind == "logsumexp":
        return torch.exp(logits - torch.logsumexp(logits, axis, keepdim=True))
    if kind == "log-sum":
        shifted = logits - logits.max(axis, keepdim=True).values
        return torch.exp(shifted - shifted.exp().sum(axis, keepdim=True).log())
    return functional.log_softmax(logits, axis).exp()


SOFTMAXES = ("softmax", "exp", "exp-max", "logsumexp", "log-sum", "log_softmax")


def mixed(w: Tensor, v: Tensor, axis: int, kind: str) -> Tensor:
    """``Σ_i w_i v_i``; ``w`` has the shape of ``v`` without its last axis."""
    rank = v.dim()
    axis %= rank
    if kind == "mul-sum":
        return (w.unsqueeze(-1) * v).sum(axis)
    if kind == "matmul":
        rows = v.movedim(axis, -2)
        return (w.movedim(axis, -1).unsqueeze(-2) @ rows).squeeze(-2)
    if kind == "bmm":
        rows = v.movedim(axis, -2)
        flat = rows.reshape(-1, rows.shape[-2], rows.shape[-1])
        out = torch.bmm(w.movedim(axis, -1).reshape(-1, 1, rows.shape[-2]), flat)
        return out.reshape(rows.shape[:-2] + rows.shape[-1:])
    if kind == "unbind":
        parts = zip(w.unbind(axis), v.unbind(axis), strict=True)
        return sum(a.unsqueeze(-1) * b for a, b in parts)  # type: ignore[return-value]
    letters = "abcef"[: rank - 1]
    left = letters[:axis] + letters[axis + 1 :]
    return torch.einsum(f"{letters},{letters}d->{left}d", w, v)


MIXES = ("mul-sum", "matmul", "bmm", "unbind", "einsum")
BIASES = ("none", "vector", "last", "cat")


def biased(logits: Tensor, bias: Tensor, axis: int, kind: str) -> Tensor:
    """Add a bias to the last logit along an axis."""
    count = logits.shape[axis]
    if kind == "none":
        return logits
    if kind == "vector":
        vector = torch.cat([bias.new_zeros(count - 1), bias.reshape(1)])
        shape = [1] * logits.dim()
        shape[axis] = count
        return logits + vector.view(shape)
    first, last = torch.split(logits, [count - 1, 1], axis)
    if kind == "cat":
        return torch.cat([first, last + bias], axis)
    logits = logits.clone()
    logits.select(axis, count - 1).add_(bias)
    return logits


class Read(nn.Module):
    """One read with its own query and gain."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.proj = nn.Parameter(torch.randn(WIDTH))
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.bias = nn.Parameter(torch.tensor(0.7))

    def forward(self, v: Tensor) -> Tensor:
        """Stacked sources to their mix."""
        s = self.spelling
        axis = s.axis % v.dim()
        wide = v.to(torch.float64 if v.dtype in (torch.float32, torch.float64) else torch.float32) if s.island else v
        w = weights_of(self.logits(wide, axis), axis, s.softmax)
        return mixed(w, wide, axis, s.mix).to(v.dtype)

    def logits(self, wide: Tensor, axis: int) -> Tensor:
        """The logits along the depth axis."""
        s = self.spelling
        k = normalised(wide, s.norm)
        u = self.proj.to(wide.dtype)
        if s.gain:
            k = k * self.gain.to(wide.dtype)
        logits = logits_of(k, u, s.dot)
        logits = logits if s.scale == 1.0 else logits * s.scale
        return biased(logits, self.bias.to(wide.dtype), axis, s.bias)

    def per_source(self, sources: list[Tensor]) -> Tensor:
        """The same, source by source: logits are stacked, values are not."""
        s = self.spelling
        each = [logits_of(normalised(v, s.norm) * self.gain, self.proj, s.dot) * s.scale for v in sources]
        w = weights_of(biased(torch.stack(each, -1), self.bias, -1, s.bias), -1, s.softmax)
        return sum(w[..., i : i + 1] * v for i, v in enumerate(sources))  # type: ignore[return-value]


class Model(nn.Module):
    """Sublayers ``tanh(linear(norm(h)))`` on reads; ends with a read and a norm."""

    def __init__(self, spelling: Spelling, depth: int = 4) -> None:
        super().__init__()
        self.spelling = spelling
        self.depth = depth
        self.reads = nn.ModuleList(Read(spelling) for _ in range(depth))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=EPS) for _ in range(depth + 1))
        self.bodies = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, d]`` to the same."""
        s = self.spelling
        shape = x.shape
        x = x.reshape(-1, WIDTH) if s.flat == "flat" else x
        bank, partial = self._bank(x), None
        h = x
        for index in range(self.depth):
            f = torch.tanh(self.bodies[index](self.norms[index](h)))
            partial = f if partial is None or index % s.block == 0 else partial + f
            h = self._read(index, bank, partial, index)
            if (index + 1) % s.block == 0:
                bank = self._append(bank, partial, index + 1)
        return self.norms[-1](h).reshape(shape)  # type: ignore[no-any-return]

    def _bank(self, x: Tensor) -> list[Tensor]:
        s = self.spelling
        if s.bank in ("list", "per-source"):
            return [x]
        if s.bank == "cat":
            return [self._flat(x).unsqueeze(self._axis(x))]
        axis = self._axis(x)
        size = list(self._flat(x).shape)
        size.insert(axis, self.depth + 1)
        buffer = x.new_empty(size)
        buffer.select(axis, 0).copy_(self._flat(x))
        return [buffer]

    def _axis(self, x: Tensor) -> int:
        return self.spelling.axis % (self._flat(x).dim() + 1)

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(-1, WIDTH) if self.spelling.flat == "flat-bank" else x

    def _append(self, bank: list[Tensor], x: Tensor, done: int) -> list[Tensor]:
        s = self.spelling
        if s.bank in ("list", "per-source"):
            return [*bank, x]
        axis = self._axis(x)
        if s.bank == "cat":
            return [torch.cat([bank[0], self._flat(x).unsqueeze(axis)], axis)]
        self._write(bank[0], axis, done // s.block, self._flat(x))
        return bank

    def _write(self, buffer: Tensor, axis: int, slot: int, x: Tensor) -> None:
        if self.spelling.bank == "buffer":
            buffer.select(axis, slot).copy_(x)
        else:
            buffer.narrow(axis, slot, 1).copy_(x.unsqueeze(axis))

    def _read(self, index: int, bank: list[Tensor], partial: Tensor, done: int) -> Tensor:
        s = self.spelling
        read: Read = self.reads[index]  # type: ignore[assignment]
        if s.bank == "per-source":
            return read.per_source([*bank, partial])
        axis = self._axis(partial)
        last = self._flat(partial)
        if s.bank == "list":
            stacked = torch.stack([*(self._flat(each) for each in bank), last], axis)
        else:
            count = done // s.block + 1
            rows = bank[0] if s.bank == "cat" else bank[0].narrow(axis, 0, count)
            stacked = torch.cat([rows, last.unsqueeze(axis)], axis)
        return read(stacked).reshape(partial.shape)  # type: ignore[no-any-return]


def build(spelling: Spelling, *, dtype: torch.dtype = torch.float64, depth: int = 4, seed: int = 0) -> Model:
    """Return a model with random weights, queries and gains."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Model(spelling, depth)
    return model.to(dtype).eval()


def example(*, dtype: torch.dtype = torch.float64, batch: int = 2, length: int = 3) -> Tensor:
    """Return hidden states ``[B, T, d]``."""
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
