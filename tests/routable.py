"""Small transformers to route, and what routing must make of them, written out sequence by sequence.

The reference shares no code with the pass: it chooses tokens with the loops of ``tests/routing_cases.py`` and computes
each layer on the chosen tokens of one sequence, with masks from their positions.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from depthwire.passes._pipeline import Pipeline
from depthwire.passes.route_tokens import RouteTokens
from depthwire.passes.standard import canonical_pipeline
from depthwire.route_parts import PRIOR_EPS, RouteParts, draw_parts
from tests.routing_cases import (
    SelectOperands,
    SurpriseCase,
    SurpriseOperands,
    expected_budget,
    expected_top_k,
    surprise_by_loop,
)
from tests.zoo import program_of

if TYPE_CHECKING:
    from depthwire.program import Program
    from depthwire.route import RouteSpec

WIDTH, HEADS, HEAD, VOCABULARY = 16, 4, 4, 23


@dataclass(frozen=True)
class Form:
    """How a transformer is written; the default is Llama's."""

    causal: bool = True
    masked: bool = False
    rotary: bool = True
    spelling: Literal["sdpa", "eager", "flat", "heads-flat"] = "sdpa"
    post: bool = False
    parallel: bool = False
    kv_heads: int = HEADS
    layers: int = 2
    joint_rotary: bool = False
    reach: int = 0


FORMS = {
    "llama": Form(kv_heads=2),
    "llama-padded": Form(kv_heads=2, masked=True),
    "eager": Form(spelling="eager"),
    "eager-padded": Form(spelling="eager", masked=True),
    "gpt2": Form(spelling="flat", rotary=False),
    "gpt2-padded": Form(spelling="flat", rotary=False, masked=True),
    "heads-flat": Form(spelling="heads-flat", rotary=False, masked=True),
    "vit": Form(causal=False, rotary=False),
    "vit-eager": Form(causal=False, rotary=False, spelling="eager"),
    "encoder": Form(causal=False, masked=True),
    "bert": Form(causal=False, masked=True, rotary=False, post=True, spelling="eager"),
    "parallel": Form(parallel=True),
    "sliding": Form(reach=4),
}


class Attention(nn.Module):
    """Self-attention in one of the spellings."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.qkv = nn.Linear(WIDTH, HEAD * (HEADS + 2 * form.kv_heads))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, tables: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, T, d]`` to the same; the mask is boolean, or additive for the eager spellings."""
        form = self.form
        batch, length, _ = x.shape
        if form.spelling == "flat":
            flat = torch.addmm(self.qkv.bias, x.view(-1, WIDTH), self.qkv.weight.t())
            joined = flat.view(batch, length, flat.shape[-1])
        else:
            joined = self.qkv(x)
        parts = torch.split(joined, [WIDTH, HEAD * form.kv_heads, HEAD * form.kv_heads], dim=2)
        q, k, v = (part.view(batch, length, -1, HEAD).transpose(1, 2) for part in parts)
        if form.rotary and form.joint_rotary:
            q, k = rotated(torch.stack([q, k]), tables).unbind(0)
        elif form.rotary:
            q, k = rotated(q, tables), rotated(k, tables)
        mixed = self._mixed(q, k, v, mask).transpose(1, 2).reshape(batch, length, WIDTH)
        if form.spelling == "flat":
            return torch.addmm(self.out.bias, mixed.view(-1, WIDTH), self.out.weight.t()).view(x.shape)
        return self.out(mixed)  # type: ignore[no-any-return]

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        form = self.form
        if form.spelling in ("sdpa", "flat"):
            grouped = form.kv_heads != HEADS
            causal = form.causal and mask is None
            return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        if form.spelling == "heads-flat":
            batch, heads, length, _ = q.shape
            q, k, v = (part.reshape(batch * heads, length, HEAD) for part in (q, k, v))
            scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, length, length) / math.sqrt(HEAD)
            weights = (scores if mask is None else scores + mask).softmax(-1).view(batch * heads, length, length)
            return torch.bmm(weights, v).view(batch, heads, length, HEAD)
        scores = q @ k.transpose(-2, -1) / math.sqrt(HEAD)
        return (scores if mask is None else scores + mask).softmax(-1) @ v


class Layer(nn.Module):
    """Attention and MLP around, behind or beside their norms."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.norm_1, self.norm_2 = (nn.RMSNorm(WIDTH, eps=1e-5) for _ in range(2))
        self.attention = Attention(form)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, tables: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, T, d]`` to the same."""
        if self.form.post:
            x = self.norm_1(x + self.attention(x, tables, mask))
            return self.norm_2(x + self.mlp(x))  # type: ignore[no-any-return]
        normed = self.norm_1(x)
        if self.form.parallel:
            return x + (self.attention(normed, tables, mask) + self.mlp(normed))  # type: ignore[no-any-return]
        x = x + self.attention(normed, tables, mask)
        return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Embedding, layers, final norm and head."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = None if form.rotary else nn.Embedding(4 * WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(form) for _ in range(form.layers))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``[B, T]`` token ids, and 0 where there is padding, to logits."""
        x = self.embedded(ids)
        mask = self._mask(ids.shape[1], attention_mask, x)
        tables = positions(ids.shape[1], x.dtype)
        for layer in self.layers:
            x = layer(x, tables, mask)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def embedded(self, ids: Tensor) -> Tensor:
        """Return the first state, ``[B, T, d]``."""
        x = self.tokens(ids)
        return x if self.places is None else x + self.places(torch.arange(ids.shape[1]))  # type: ignore[no-any-return]

    def _mask(self, length: int, attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
        square = torch.ones(length, length, dtype=torch.bool)
        causal = square.tril() if self.form.causal else square
        causal = causal.triu(1 - self.form.reach) if self.form.reach else causal
        additive = self.form.spelling in ("eager", "heads-flat")
        if attention_mask is None and not self.form.reach and (not self.form.causal or not additive):
            return None
        visible = causal
        if attention_mask is not None:
            seen = causal & attention_mask.bool()[:, None, None, :]
            visible = seen | torch.eye(length, dtype=torch.bool)  # padding sees itself
        if not additive:
            return visible
        return torch.zeros(visible.shape, dtype=x.dtype).masked_fill(~visible, torch.finfo(x.dtype).min)


def positions(length: int, dtype: torch.dtype) -> Tensor:
    """Return the angles of rotary positions, ``[T, dh]``."""
    frequencies = torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=dtype)
    return torch.arange(length, dtype=dtype)[:, None] * frequencies


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Apply rotary positions, ``[…, T, dh]``."""
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def build(form: Form, *, dtype: torch.dtype = torch.float64) -> Model:
    """Return a model with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Model(form)
        for norm in (module for module in model.modules() if isinstance(module, nn.RMSNorm)):
            nn.init.normal_(norm.weight, 1.0, 0.2)
    return model.to(dtype).eval()


def examples(form: Form, *, batch: int = 3, length: int = 12, padding: str = "both") -> dict[str, Tensor]:
    """Return inputs; with a mask, row 0 is padded on the left and row 1 on the right."""
    generator = torch.Generator().manual_seed(length)
    named = {"ids": torch.randint(0, VOCABULARY, (batch, length), generator=generator)}
    if form.masked:
        mask = torch.ones(batch, length, dtype=torch.int64)
        if padding == "both":
            mask[0, : length // 3] = 0
            mask[1 % batch, length - length // 4 :] = 0
        named["attention_mask"] = mask
    return named


def canonical(model: nn.Module, named: dict[str, Tensor]) -> Program:
    """Capture a model and run the passes that the routing comes after."""
    return canonical_pipeline().run(program_of(model, named))


def routed(program: Program, parts: RouteParts) -> Program:
    """Route a program between the pipeline's checks."""
    return Pipeline((RouteTokens(parts),)).run(program)


def parts_of(spec: RouteSpec, *, seed: int = 5, threshold: float | None = None) -> RouteParts:
    """Draw parts whose priors are large enough to see; thresholds of the middle, or as given."""
    drawn = draw_parts(spec, WIDTH, seed)
    tensors = {name: t * 5 if "fallback" in name or "surprise.down" in name else t for name, t in drawn.tensors.items()}
    generator = torch.Generator().manual_seed(seed)
    tensors |= {name: torch.randn(t.shape, generator=generator) for name, t in tensors.items() if name.endswith("bias")}
    if threshold is not None:
        tensors |= {name: torch.tensor(threshold) for name in tensors if name.endswith("threshold")}
    return dataclasses.replace(drawn, tensors=tensors)


@dataclass(frozen=True)
class Reference:
    """What a routed model must compute.

    Attributes:
        model: The dense model.
        parts: What is routed.
    """

    model: Model
    parts: RouteParts

    @torch.no_grad()
    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, dict[int, list[list[int]]]]:
        """Return the logits and, by layer, the chosen tokens of every sequence."""
        valid = torch.ones(ids.shape, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        x = self.model.embedded(ids)
        states, chosen = [], {}
        for number, layer in enumerate(self.model.layers):
            assert isinstance(layer, Layer)
            states.append(x)
            if number not in self.parts.spec.layers:
                x = self._dense(layer, x, valid)
                continue
            unit = self.parts.spec.unit
            if unit == "mlp":
                x = torch.stack([self._first(layer, row, row, valid[b]) for b, row in enumerate(x)])
            chosen[number], x = self._route(number, layer, x, valid, states)
            if unit == "attention":
                x = self._second(layer, x)
        return self.model.head(self.model.norm(x)), chosen

    def _dense(self, layer: Layer, x: Tensor, valid: Tensor) -> Tensor:
        return torch.stack([self._layer(layer, row, row, valid[b]) for b, row in enumerate(x)])

    def _route(
        self, number: int, layer: Layer, x: Tensor, valid: Tensor, states: list[Tensor]
    ) -> tuple[list[list[int]], Tensor]:
        spec = self.parts.spec
        normed = x if self.model.form.post else (layer.norm_2 if spec.unit == "mlp" else layer.norm_1)(x)
        score = self._score(number, x, normed, valid, states)
        index, taken = self._select(number, score, valid)
        chosen = [row[bits].tolist() for row, bits in zip(index, taken, strict=True)]
        out = x + self._prior(number, normed)
        for b, tokens in enumerate(chosen):
            if tokens:
                rows = self._unit(layer, x[b], tokens, valid[b])
                out[b, tokens] = x[b, tokens] + self._gate(score[b, tokens]).unsqueeze(-1) * (rows - x[b, tokens])
        return chosen, out

    def _unit(self, layer: Layer, row: Tensor, tokens: list[int], valid: Tensor) -> Tensor:
        spec = self.parts.spec
        if spec.unit == "mlp":
            return self._second(layer, row[tokens])
        keys = list(range(len(row))) if spec.keys_values == "all" else tokens
        if spec.unit == "attention":
            return self._first(layer, row[tokens], row[keys], valid, tokens, keys)
        return self._layer(layer, row[tokens], row[keys], valid, tokens, keys)

    def _layer(self, layer: Layer, rows: Tensor, others: Tensor, valid: Tensor, *places: list[int]) -> Tensor:
        if self.model.form.parallel:
            return self._attended(layer, rows, others, valid, *places) + layer.mlp(layer.norm_1(rows))  # type: ignore[no-any-return]
        return self._second(layer, self._first(layer, rows, others, valid, *places))

    def _first(self, layer: Layer, rows: Tensor, others: Tensor, valid: Tensor, *places: list[int]) -> Tensor:
        x = self._attended(layer, rows, others, valid, *places)
        return layer.norm_1(x) if self.model.form.post else x

    def _second(self, layer: Layer, x: Tensor) -> Tensor:
        if self.model.form.post:
            return layer.norm_2(x + layer.mlp(x))  # type: ignore[no-any-return]
        return x + layer.mlp(layer.norm_2(x))  # type: ignore[no-any-return]

    def _attended(
        self,
        layer: Layer,
        rows: Tensor,
        others: Tensor,
        valid: Tensor,
        *places: list[int],
    ) -> Tensor:
        """Return the rows ``[n, d]`` plus their attention over others ``[m, d]`` of the same sequence.

        ``places`` are the positions of the rows, and those of the others; both are the whole sequence without them.
        """
        form, attention = self.model.form, layer.attention
        tokens = places[0] if places else list(range(len(rows)))
        keys = places[-1] if places else tokens
        norm = nn.Identity() if form.post else layer.norm_1
        widths = [WIDTH, HEAD * form.kv_heads, HEAD * form.kv_heads]
        q = attention.qkv(norm(rows)).split(widths, -1)[0].view(len(tokens), HEADS, HEAD)
        _, k, v = (part.view(len(keys), -1, HEAD) for part in attention.qkv(norm(others)).split(widths, -1))
        if form.rotary:
            angles = positions(len(valid), rows.dtype)
            q, k = (rotated(part, angles[places][:, None]) for part, places in ((q, tokens), (k, keys)))
        mixed = torch.empty_like(q)
        for n, token in enumerate(tokens):
            first, last = token - form.reach if form.reach else -1, token if form.causal else len(valid)
            seen = [m for m, key in enumerate(keys) if key == token or (valid[key] and first < key <= last)]
            for head in range(HEADS):
                group = head * form.kv_heads // HEADS
                weights = (k[seen, group] @ q[n, head] / math.sqrt(HEAD)).softmax(0)
                mixed[n, head] = weights @ v[seen, group]
        return rows + attention.out(mixed.reshape(len(tokens), WIDTH))  # type: ignore[no-any-return]

    def _part(self, number: int, name: str) -> Tensor:
        return self.parts.of(number, name).double()

    def _score(self, number: int, x: Tensor, normed: Tensor, valid: Tensor, states: list[Tensor]) -> Tensor:
        kind = self.parts.spec.score
        if kind == "surprise":
            return self._surprise(number, states[number - 1], states[number], valid)
        weight = self._part(number, "router.weight")
        if kind == "linear":
            return normed @ weight + self._part(number, "router.bias")
        if kind == "mod":
            return x @ weight
        score = x @ weight[0]
        score[:, 1:] += torch.where(valid[:, :-1], x[:, :-1] @ weight[1], 0.0)
        return score

    def _surprise(self, number: int, before: Tensor, after: Tensor, valid: Tensor) -> Tensor:
        normed = (
            before / (before.square().mean(-1, keepdim=True) + PRIOR_EPS).sqrt() * self._part(number, "surprise.norm")
        )
        prior = self._swiglu(normed, number, "surprise")
        case = SurpriseCase(before.shape[1], WIDTH, len(before), window=self.parts.spec.surprise_window)
        operands = SurpriseOperands(after - before, prior, self._part(number, "surprise.criteria"), valid)
        return surprise_by_loop(case, operands)

    def _swiglu(self, normed: Tensor, number: int, stem: str) -> Tensor:
        gate, up, down = (self._part(number, f"{stem}.{name}") for name in ("gate", "up", "down"))
        return (functional.silu(normed @ gate.T) * (normed @ up.T)) @ down.T

    def _prior(self, number: int, normed: Tensor) -> Tensor:
        kind = self.parts.spec.fallback
        if kind == "identity":
            return torch.zeros_like(normed)
        if kind == "linear":
            return normed @ self._part(number, "fallback.weight").T + self._part(number, "fallback.bias")
        return self._swiglu(normed, number, "fallback")

    def _gate(self, score: Tensor) -> Tensor:
        kind = self.parts.spec.gate
        if kind == "one":
            return torch.ones_like(score)
        return {"score": score, "sigmoid": score.sigmoid(), "surprise": 1 - (-score).exp()}[kind]

    def _select(self, number: int, score: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        spec, tokens = self.parts.spec, score.shape[1]
        count = spec.slots(number, tokens)
        if spec.rule == "top-k":
            return expected_top_k(score, valid, count, spec.window)
        share = spec.capacity_of(number)
        operands = SelectOperands(
            score,
            valid,
            torch.arange(count),
            self.parts.of(number, "threshold"),
            torch.tensor([share.numerator, share.denominator, spec.margin]),
            torch.zeros(len(score), 2, dtype=torch.int64),
        )
        return expected_budget(operands)[:2]
