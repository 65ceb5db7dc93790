"""A generator of small transformers: one frozen ``Spec`` says how one is built, ``truth`` what an analysis must find.

Every model is a stack of blocks over one residual stream; ``Block.steps`` takes it apart into sublayers, so that a
test can put them together in another way and compare.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from depthwire.program import Program, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

WIDTH, HEADS, LENGTH, BATCH, VOCABULARY = 16, 2, 5, 2, 23

NormKind = Literal[
    "rms", "rms-hf", "rms-gemma", "rms-divide", "rms-narrow", "layer", "layer-var", "layer-square", "layer-twice"
]
NORMS: tuple[NormKind, ...] = NormKind.__args__  # type: ignore[attr-defined]
ORDERS: dict[str, Callable[..., Tensor]] = {
    "x+(a+m)": lambda add, x, a, m: add(x, a + m),
    "(m+a)+x": lambda add, x, a, m: add(x, m + a, swap=True),
    "(x+a)+m": lambda add, x, a, m: add(x, a) + m,
    "m+(a+x)": lambda add, x, a, m: m + add(x, a, swap=True),
}


@dataclass(frozen=True)
class Spec:
    """How a transformer is built; every default is the plain choice."""

    layers: int = 2
    norm: NormKind = "rms"
    weight: bool = True
    bias: bool = True
    eps: float | None = 1e-5
    placement: Literal["pre", "sandwich", "post", "inside"] = "pre"
    block: Literal["sequential", "parallel-one", "parallel-two"] = "sequential"
    order: str = "x+(a+m)"
    swapped: bool = False
    branch_scale: Literal["none", "float", "vector", "alpha"] = "none"
    skip_scale: float = 1.0
    skip_by_alpha: bool = False
    positions: bool = False
    multiplier: float | None = None
    embedding_norm: bool = False
    tied: bool = False
    mlp: Literal["gelu", "gelu-spelled", "swiglu", "moe"] = "gelu"
    hidden: int = 2 * WIDTH
    attention: Literal["causal", "mask", "eager"] = "causal"
    kv_heads: int = HEADS
    shared: bool = False
    dropout: float = 0.0
    flat_mlp: bool = False
    cut: Literal["no", "norm", "stream"] = "no"
    extra_norm: bool = False
    raw_reader: Literal["none", "probe", "output"] = "none"


@dataclass(frozen=True)
class Truth:
    """What an analysis must find.

    Attributes:
        kinds: The kind of every sublayer.
        modules: A module path per sublayer.
        norms: How many norms read every state.
        breaks: (code, module path) of every break, in any order.
    """

    kinds: tuple[str, ...]
    modules: tuple[str, ...]
    norms: tuple[int, ...]
    breaks: frozenset[tuple[str, str]]


class Norm(nn.Module):
    """RMSNorm or LayerNorm in one of the spellings."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.kind, self.eps = spec.norm, spec.eps
        offset = 0.0 if spec.norm == "rms-gemma" else 1.0
        self.weight = nn.Parameter(torch.randn(WIDTH) * 0.2 + offset) if spec.weight else None
        has_bias = spec.bias and spec.norm.startswith("layer")
        self.bias = nn.Parameter(torch.randn(WIDTH) * 0.2) if has_bias else None

    def forward(self, x: Tensor, shrink: float = 1.0) -> Tensor:
        """Normalise the last axis, with eps divided by ``shrink``."""
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        if self.kind == "rms":
            machine = shrink == 1.0 and self.eps is None
            return functional.rms_norm(x, (WIDTH,), self.weight, None if machine else eps / shrink)
        if self.kind == "layer":
            return functional.layer_norm(x, (WIDTH,), self.weight, self.bias, eps / shrink)
        return self._spelled(x, eps / shrink)

    def _spelled(self, x: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = self.weight, self.bias
        if self.kind == "rms-hf":
            out = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
            return out if weight is None else weight * out
        if self.kind == "rms-gemma":
            out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            return (out if weight is None else out * (1.0 + weight.to(wide.dtype))).type_as(x)
        if self.kind == "rms-divide":
            out = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)
        elif self.kind == "rms-narrow":
            out = x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps).to(x.dtype)
        elif self.kind == "layer-var":
            centred = wide - wide.mean(-1, keepdim=True)
            out = centred / torch.sqrt(wide.var(-1, unbiased=False, keepdim=True) + eps)
        elif self.kind == "layer-square":
            centred = wide - wide.mean(-1, keepdim=True)
            out = centred * torch.pow(centred.pow(2).mean(-1, keepdim=True) + eps, -0.5)
        else:
            variance = (wide - wide.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
            out = (wide - wide.mean(-1, keepdim=True)) * (1.0 / torch.sqrt(variance + eps))
        out = out if weight is None else out * weight
        return (out if bias is None else out + bias).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention over grouped heads."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.kind, self.kv_heads, self.head = spec.attention, spec.kv_heads, WIDTH // HEADS
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, self.head * spec.kv_heads, bias=False)
        self.v = nn.Linear(WIDTH, self.head * spec.kv_heads, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, d]`` to the same."""
        batch, length, _ = x.shape
        q, k, v = (part(x).view(batch, length, -1, self.head).transpose(1, 2) for part in (self.q, self.k, self.v))
        visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        grouped = self.kv_heads != HEADS
        if self.kind == "causal":
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        elif self.kind == "mask":
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
        else:
            groups = HEADS // self.kv_heads
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            scores = (q @ k.transpose(-2, -1) / math.sqrt(self.head)).masked_fill(~visible, float("-inf"))
            mixed = scores.softmax(-1).to(q.dtype) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """A feed-forward network, or two experts of four behind a softmax router."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.kind, self.flat = spec.mlp, spec.flat_mlp
        self.up = nn.Linear(WIDTH, spec.hidden)
        self.down = nn.Linear(spec.hidden, WIDTH)
        self.gate = nn.Linear(WIDTH, spec.hidden if spec.mlp == "swiglu" else 4)
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d]`` to the same."""
        if self.kind == "swiglu":
            return self.down(functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]
        if self.kind == "moe":
            probabilities = self.gate(x).softmax(-1)
            best, chosen = probabilities.topk(2, dim=-1)
            weights = torch.zeros_like(probabilities).scatter(-1, chosen, best)
            return torch.einsum("...e,e...d->...d", weights, torch.einsum("...d,edf->e...f", x, self.experts))
        up = self.up(x)
        if self.kind == "gelu":
            return self.down(functional.gelu(up))  # type: ignore[no-any-return]
        inner = math.sqrt(2 / math.pi) * (up + 0.044715 * up.pow(3))  # looks like a residual addition
        return self.down(0.5 * up * (1.0 + torch.tanh(inner)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Part:
    """One branch of a sublayer: norm before (or none), body, norm behind (or none)."""

    before: Norm | None
    body: nn.Module
    behind: Norm | None


class Block(nn.Module):
    """Attention and MLP, one after the other or side by side."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.attention, self.mlp = Attention(spec), Mlp(spec)
        before = spec.placement in ("pre", "sandwich")
        self.norm_1 = Norm(spec) if before else None
        self.norm_2 = Norm(spec) if before and spec.block != "parallel-one" else None
        self.norm_3 = None if spec.placement == "pre" else Norm(spec)
        self.norm_4 = None if spec.placement == "pre" else Norm(spec)
        self.gain = nn.Parameter(torch.randn(WIDTH) * 0.1 + 0.6) if spec.branch_scale == "vector" else None
        self.dropout = nn.Dropout(spec.dropout)

    def steps(self) -> list[list[Part]]:
        """Return the sublayers, each with its branches."""
        inside = self.spec.placement != "post"
        second = self.norm_1 if self.spec.block == "parallel-one" else self.norm_2
        parts = [
            Part(self.norm_1, self.attention, self.norm_3 if inside else None),
            Part(second, self.mlp, self.norm_4 if inside else None),
        ]
        return [[part] for part in parts] if self.spec.block == "sequential" else [parts]

    def branches(self, step: list[Part], x: Tensor, shrink: float = 1.0) -> list[Tensor]:
        """Return what a sublayer writes, ``alpha`` excepted; ``shrink`` divides the eps of the norms before it."""
        norms = [part.before for part in (step[:1] if self.spec.block == "parallel-one" else step)]
        normed = [x if norm is None else norm(x, shrink) for norm in norms]
        return [self._branch(part, normed[min(index, len(normed) - 1)]) for index, part in enumerate(step)]

    def _branch(self, part: Part, x: Tensor) -> Tensor:
        out = part.body(x)
        out = self.dropout(out if part.behind is None else part.behind(out))
        if self.gain is not None:
            out = out * self.gain
        return out * 0.5 if self.spec.branch_scale == "float" else out  # type: ignore[no-any-return]

    def write(self, x: Tensor, branches: list[Tensor]) -> Tensor:
        """Add a sublayer's branches onto the stream."""
        if len(branches) == 1:
            return self._add(x, branches[0])
        return ORDERS[self.spec.order](self._add, x, *branches)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, d]`` to the same."""
        for step, norm in zip(self.steps(), (self.norm_3, self.norm_4), strict=False):
            shape = x.shape
            x = x.reshape(-1, WIDTH) if self.is_flat(step) else x
            x = self.write(x, self.branches(step, x))
            x = x.reshape(shape) if self.is_flat(step) else x
            if self.spec.placement == "post" and norm is not None:
                x = norm(x)
        return x

    def is_flat(self, step: list[Part]) -> bool:
        """Tell whether a sublayer works on ``[B*T, d]``, skip path included (as OPT's does)."""
        return self.spec.flat_mlp and step[0].body is self.mlp

    def _add(self, x: Tensor, branch: Tensor, *, swap: bool = False) -> Tensor:
        spec = self.spec
        if spec.skip_by_alpha and spec.skip_scale != 1.0:
            return torch.add(branch, x, alpha=spec.skip_scale)
        x = x if spec.skip_scale == 1.0 else x * spec.skip_scale
        if spec.branch_scale == "alpha":
            return torch.add(x, branch, alpha=0.5)
        return branch + x if swap != spec.swapped else x + branch


class Embedding(nn.Module):
    """Tokens, with positions, a factor and a norm where the spec has them."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.multiplier = spec.multiplier
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(4 * LENGTH, WIDTH) if spec.positions else None
        self.norm = Norm(spec) if spec.embedding_norm else None
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, T, d]``."""
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1], device=ids.device))
        if self.multiplier is not None:
            x = x * self.multiplier
        return self.dropout(x if self.norm is None else self.norm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = Embedding(spec)
        first = Block(spec)
        others = [first if spec.shared else Block(spec) for _ in range(spec.layers - 1)]
        self.layers = nn.ModuleList([first, *others])
        self.norm = Norm(spec)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if spec.tied:
            self.head.weight = self.embedding.tokens.weight
        self.extra_norm = Norm(spec) if spec.extra_norm else None
        self.probe = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """``[B, T]`` token ids to logits, and what the extra readers make of the stream behind the first block."""
        x = self.embedding(ids)
        extra: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == 0:
                extra = self.extras(x)
        if self.spec.cut == "stream":
            x = x[:, -1:]
        x = self.norm(x)
        if self.spec.cut == "norm":
            x = x[:, -1]
        return (self.head(x), *extra)

    def blocks(self) -> list[Block]:
        """Return the blocks in order; a shared one stands there several times."""
        return [block for block in self.layers if isinstance(block, Block)]

    def extras(self, x: Tensor, shrink: float = 1.0) -> list[Tensor]:
        """Return the results of the readers behind the first block."""
        out = [] if self.extra_norm is None else [self.probe(self.extra_norm(x, shrink))]
        if self.spec.raw_reader == "probe":
            out.append(self.probe(x))
        return [*out, x] if self.spec.raw_reader == "output" else out


def build(spec: Spec, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
    """Return a model with random weights, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(spec)
    return model.to(dtype).eval()


def inputs(*, seed: int = 0, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """Return token ids ``[B, T]``."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def program_of(module: nn.Module, examples: Mapping[str, Tensor] | Tensor) -> Program:
    """Capture a module with ``torch.export``; modules here change nothing in place, so the program is functional."""
    named = {"ids": examples} if isinstance(examples, Tensor) else dict(examples)
    with torch.no_grad():
        exported = torch.export.export(module, tuple(named.values()), strict=False)
    count = len(exported.graph_signature.user_outputs)
    source = Source("module", type(module).__name__)
    return Program(exported, source, named, tuple(f"output_{index}" for index in range(count)))


@functools.lru_cache(maxsize=64)
def captured(spec: Spec, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Transformer, Program]:
    """Return a model and its program."""
    model = build(spec, dtype=dtype, seed=seed)
    return model, program_of(model, inputs())


def truth(spec: Spec) -> Truth:
    """Return what an analysis of the model must find."""
    names = [f"layers.{index}" for index in range(spec.layers)]
    steps = [("attention", "mlp")] if spec.block == "sequential" else [("parallel",)]
    kinds = [kind for _ in names for kind in steps[0]]
    paths = [name if kind == "parallel" else f"{name}.{kind}" for name in names for kind in steps[0]]
    before = 2 if spec.block == "parallel-two" else 1
    norms = [{"post": 0, "inside": 0}.get(spec.placement, before)] + [
        {"post": 1, "inside": 0}.get(spec.placement, before) for _ in kinds[1:]
    ]
    norms.append(1)
    norms[len(steps[0])] += spec.extra_norm
    return Truth(tuple(kinds), tuple(paths), tuple(norms), frozenset(_breaks(spec, names, kinds, paths)))


def _breaks(spec: Spec, names: list[str], kinds: list[str], paths: list[str]) -> set[tuple[str, str]]:
    breaks: set[tuple[str, str]] = set()
    if spec.raw_reader == "probe":
        breaks.add(("un-normed-reader", "probe"))
    if spec.raw_reader == "output":
        breaks.add(("stream-is-output", "layers.0"))
    if spec.placement == "post":
        norms = [f"{name}.norm_{3 + step}" for name in names for step in range(len(kinds) // len(names))]
        breaks |= {("post-norm", path) for path in norms[:-1]}
    if spec.placement == "inside":
        inner = {"gelu": ["up"], "gelu-spelled": ["up"], "swiglu": ["up", "gate"], "moe": ["gate", ""]}[spec.mlp]
        for kind, path in zip(kinds[1:], paths[1:], strict=True):
            layer = path.rpartition(".")[0]
            if kind != "mlp":
                breaks |= {("un-normed-reader", f"{layer}.attention.{part}") for part in "qkv"}
            if kind != "attention":
                breaks |= {("un-normed-reader", f"{layer}.mlp.{part}".rstrip(".")) for part in inner}
    return breaks
