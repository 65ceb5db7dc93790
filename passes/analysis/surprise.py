"""The surprise of an update, spelled in elementary operations: found by what it is a function of.

::

    D_st = mean(Δ²)    D_ch = mean((Δ - Δ̂)²)    MA = mean of D_st over the last tokens
    a = β_ce · (D_st - D_ch + offset)            b = β_cu · (D_st - m · MA)
    rank = softplus(a) + softplus(b)
    gate = s(a) + s(b) - s(a) · s(b), s the sigmoid

a and b are linear in the mean squares and in the moving average, with coefficients that are polynomials in the model's
scalars (``Terms``): they are read off whatever order the sums and products have. What the moving average and the
outermost function compute is decided by evaluating them, so pooling, convolution and differences of running sums are
one thing, as are the ways to write a softplus or a probabilistic or.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from depthwire.passes._match import CASTS, aten, independent_of_inputs, is_call, is_float, scalar, strip, value
from depthwire.passes.analysis.reach import ancestors
from depthwire.passes.analysis.token_choice import path_from

if TYPE_CHECKING:
    from depthwire.passes.analysis.token_routing import Finder, Routing

Node = torch.fx.Node
Poly = dict[tuple[Node, ...], float]
"""A polynomial in scalars of the model: products of nodes, with a factor each."""

_AGREE = 1e-4  # relative; fp32 rounding in sums of some hundred terms stays below, another function far above
_SUMS: dict[Any, tuple[float, float]] = {
    aten.add.Tensor: (1.0, 1.0),
    aten.sub.Tensor: (1.0, -1.0),
    aten.rsub.Scalar: (-1.0, 1.0),
}
_VIEWS = (
    *CASTS,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.reshape.default,
    aten.view.default,
    aten.clone.default,
    aten.detach.default,
)


@dataclass(frozen=True)
class Square:
    """A mean square over the width: of ``left``, or of its difference from ``right``."""

    left: Node
    right: Node | None = None


@dataclass(frozen=True)
class Average:
    """A moving average of a mean square over so many tokens."""

    of: Square
    window: int


Terms = dict[Square | Average | None, Poly]
"""A linear form; ``None`` stands for its constant."""


@dataclass(frozen=True)
class Surprise:
    """A surprise.

    Attributes:
        delta: The update, ``[B, T, d]``; a pair is a difference.
        change: The update minus its prediction, up to its sign.
        offset: Of the expected change.
        m_cu: Factor of the moving average.
        beta_ce: Steepness.
        beta_cu: Steepness.
        window: Tokens in the moving average.
        kind: Whether the value is the rank or the gate.
    """

    delta: Square
    change: Square
    offset: Poly
    m_cu: Poly
    beta_ce: Poly
    beta_cu: Poly
    window: int
    kind: Literal["rank", "gate"]


@dataclass
class SurpriseFinder:
    """Recognises surprises among the scores and gates of one routing."""

    finder: Finder
    routing: Routing
    _terms: dict[Node, Terms | None] = field(default_factory=dict)
    _same: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Collect the scalars."""
        free = independent_of_inputs(self.finder.exported)
        self._scalars = {node for node in free if is_float(node) and value(node).numel() == 1}

    def find(self, score: Node) -> Surprise | None:
        """Return the surprise that a score or gate is, ``None`` if it is none."""
        region, parts = self._outer(score)
        if len(parts) != 2:
            return None
        terms = [self.terms(part) for part in parts]
        for signs in itertools.product((1.0, -1.0), repeat=2):  # softplus(-z) is as good as -logsigmoid(z)
            kind = self._kind(score, region, parts, signs)
            first, second = (_times(form, {None: {(): sign}}) for form, sign in zip(terms, signs, strict=True))
            found = None if kind is None else self._criteria(first, second, kind) or self._criteria(second, first, kind)
            if found is not None:
                return found
        return None

    def looks_like_one(self, score: Node) -> bool:
        """Tell whether a score is made of two linear forms in mean squares."""
        _, parts = self._outer(score)
        return bool(parts) and any(isinstance(key, Square) for part in parts for key in self.terms(part) or {})

    def _outer(self, score: Node) -> tuple[list[Node], list[Node]]:
        """Return what leads from the linear forms to a score, and the forms."""
        region, parts, stack = set(), [], [score]
        while stack:
            node = stack.pop()
            if node in region or node in parts:
                continue
            terms = self.terms(node)
            if terms is not None and any(key is not None for key in terms):
                parts.append(node)
                continue
            pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
            pointwise = pointwise or is_call(node, *_VIEWS, aten.log_sigmoid.default)
            if node.op != "call_function" or not pointwise or value(node).numel() != value(score).numel():
                return [], []
            region.add(node)
            stack += [operand for operand in node.all_input_nodes if operand not in self.finder.given.nodes]
        order = self.finder.order
        return sorted(region, key=order.__getitem__), sorted(parts, key=order.__getitem__)

    def _kind(
        self, score: Node, region: list[Node], parts: list[Node], signs: tuple[float, ...]
    ) -> Literal["rank", "gate"] | None:
        """Return what a score is of two linear forms with these signs, as evaluating it says."""
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(value(part).shape, generator=generator, dtype=torch.float64) * 2 for part in parts)
        known = {part: point.to(value(part).dtype) for part, point in zip(parts, (a, b), strict=True)}
        got = self.finder.values(region, known)[score].double().flatten()
        softplus = torch.nn.functional.softplus
        rank = (softplus(signs[0] * a) + softplus(signs[1] * b)).flatten()
        if _close(got, rank):
            return "rank"
        return "gate" if _close(got, -torch.expm1(-rank)) else None

    def _criteria(self, first: Terms | None, second: Terms | None, kind: Literal["rank", "gate"]) -> Surprise | None:
        if first is None or second is None:
            return None
        averages = [key for key in second if isinstance(key, Average)]
        if len(averages) != 1 or set(second) != {averages[0].of, averages[0]}:
            return None
        delta, average = averages[0].of, averages[0]
        others = [key for key in first if isinstance(key, Square) and key != delta]
        if len(others) != 1 or not set(first) <= {delta, others[0], None} or delta not in first:
            return None
        beta_ce, beta_cu = first[delta], second[delta]
        if _sum(first[others[0]], beta_ce):  # the two must cancel
            return None
        offset = _quotient(first.get(None, {}), beta_ce)
        m_cu = _quotient(_scaled(second[average], -1.0), beta_cu)
        if offset is None or m_cu is None:
            return None
        return Surprise(delta, others[0], offset, m_cu, beta_ce, beta_cu, average.window, kind)

    def terms(self, node: Node) -> Terms | None:
        """Return a value as a linear form in mean squares and their averages, ``None`` if it is none."""
        if node not in self._terms:
            self._terms[node] = None  # of itself a value is nothing
            self._terms[node] = self._form(node)
        return self._terms[node]

    def _form(self, node: Any) -> Terms | None:
        number = scalar(node)
        if number is not None:
            return {None: {(): number}}
        if not isinstance(node, Node) or not is_float(node):
            return None
        if node in self._scalars:
            # Sums and products of scalars are taken apart: a factor of all terms may stand within one.
            parts = self._combined(node) if node.op == "call_function" else None
            return parts or {None: {(self._one(strip(node)),): 1.0}}
        square = _square(node)
        if square is not None:
            return square
        if node.op != "call_function" or value(node).dim() > 3:
            return None
        average = self._average(node)
        return {average: {(): 1.0}} if average is not None else self._combined(node)

    def _one(self, node: Node) -> Node:
        """Return the first of the nodes that compute the same of the model's scalars."""
        return self._same.setdefault(_spelling(node), node)

    def _combined(self, node: Node) -> Terms | None:
        arguments: tuple[Any, ...] = node.args
        if is_call(node, *_VIEWS):
            return self.terms(arguments[0])
        if is_call(node, aten.neg.default):
            return _times(self.terms(arguments[0]), {None: {(): -1.0}})
        binary = is_call(node, *_SUMS, aten.mul.Tensor, aten.div.Tensor) and len(arguments) == 2 and not node.kwargs
        if not binary or any(value(part).numel() not in (1, value(node).numel()) for part in node.all_input_nodes):
            return None  # something else, or tokens with tokens
        left, right = (self.terms(part) if isinstance(part, Node) else self._form(part) for part in arguments)
        if is_call(node, aten.mul.Tensor):
            return _times(left, right)
        if is_call(node, aten.div.Tensor):
            number = scalar(arguments[1])
            return _times(left, {None: {(): 1 / number}}) if number else None
        return _added(left, right, *_SUMS[node.target])

    def _average(self, node: Node) -> Average | None:
        """Return the moving average that a value is, as evaluating it says."""
        region: set[Node] = set()
        squares: dict[Node, Terms] = {}
        masks: set[Node] = set()
        given, stack = self.finder.given, [node]
        while stack:
            step = stack.pop()
            square = _square(step) if step not in given.nodes else None
            if square is not None and step is not node:
                squares[step] = square
            elif step in given.inputs:
                masks.add(step)
            elif step not in region and step not in given.nodes:
                if step.op != "call_function" or len(region) > 40 or value(step) is None or _big(step, node):
                    return None
                region.add(step)
                stack += step.all_input_nodes
        mask = self.routing.mask
        if masks and (mask is None or not all(mask in ancestors([m]) for m in masks)):
            return None
        if len(squares) != 1 or any(value(source).numel() != value(node).numel() for source in squares):
            return None
        source, terms = next(iter(squares.items()))
        key, factor = next((key, poly[()]) for key, poly in terms.items())
        window = self._window(node, region, source, masks)
        # Over one token it is the mean square itself; a sum of squares would have to be divided first.
        return Average(key, window) if isinstance(key, Square) and factor == 1.0 and window not in (None, 1) else None

    def _window(self, node: Node, region: set[Node], source: Node, masks: set[Node]) -> int | None:
        batch, tokens = self.routing.shape
        if tokens < 2:
            return None

        def computed(static: Tensor, valid: Tensor) -> Tensor:
            known: dict[Node, Tensor] = {source: static.to(value(source).dtype).reshape(value(source).shape)}
            paths: set[Node] = set()
            mask = self.routing.mask
            if masks and mask is not None:
                known[mask] = valid.to(value(mask).dtype)
                paths = {step for end in masks for step in path_from(mask, end, self.finder.given)}
            return self.finder.values({*region, *paths}, known)[node].double().reshape(batch, tokens)

        everywhere = torch.ones(batch, tokens, dtype=torch.bool)
        impulse = torch.zeros(batch, tokens, dtype=torch.float64)
        impulse[:, 1] = 1.0
        weight = float(computed(impulse, everywhere)[0, 1])
        if not 0 < weight <= 1 + _AGREE:
            return None
        window = round(1 / weight)
        generator = torch.Generator().manual_seed(0)
        for number in range(4):
            static = torch.rand(batch, tokens, generator=generator, dtype=torch.float64)
            valid = everywhere.clone()
            if self.routing.mask is not None and number:
                cut = int(torch.randint(1, tokens, (1,), generator=generator))
                valid[:, slice(0, cut) if number % 2 else slice(cut, tokens)] = False
            first = static.gather(1, valid.byte().argmax(1, keepdim=True))
            filled = torch.cat([first.expand(-1, window - 1), torch.where(valid, static, first)], 1)
            wanted = filled.unfold(1, window, 1).mean(-1)
            if not _close(computed(static, valid)[valid], wanted[valid]):
                return None
        return window


def _big(step: Node, node: Node) -> bool:
    """Tell whether a value is more than rows of tokens: a moving average never widens to states."""
    found = value(step)
    return not isinstance(found, Tensor) or (found.dim() > 2 and found.shape[-1] > 4 * value(node).numel())


def _square(node: Node) -> Terms | None:
    """Return a mean (or sum) of squares over the last axis of ``[B, T, d]``."""
    if not is_call(node, aten.mean.dim, aten.sum.dim_IntList):
        return None
    source: Any = node.args[0]
    dims: Any = node.args[1]
    if value(source).dim() != 3 or [int(dim) % 3 for dim in dims] != [2]:
        return None
    factor = 1.0 if is_call(node, aten.mean.dim) else float(value(source).shape[-1])
    source = strip(source)
    if is_call(source, aten.mse_loss.default) and source.args[2:] == (0,):
        return {Square(_plain(source.args[0]), _plain(source.args[1])): {(): factor}}
    squared = is_call(source, aten.square.default)
    squared = squared or (is_call(source, aten.pow.Tensor_Scalar) and scalar(source.args[1]) == 2.0)
    squared = squared or (is_call(source, aten.mul.Tensor) and source.args[0] is source.args[1])
    return {Square(_plain(source.args[0])): {(): factor}} if squared else None


def _plain(node: Any) -> Node:
    """Take off casts, copies and broadcasts to the shape that a value has."""
    node = strip(node)
    while is_call(node, operator.getitem) and is_call(node.args[0], aten.broadcast_tensors.default):
        source = node.args[0].args[0][node.args[1]]
        if value(source).shape != value(node).shape:
            break
        node = strip(source)
    return node  # type: ignore[no-any-return]


def _spelling(node: Node) -> str:
    """Return what a scalar is computed of, spelled out."""
    if node.op != "call_function":
        return node.name
    parts = torch.fx.node.map_arg((node.args, node.kwargs), _spelling)
    return f"{node.target}{parts}"


def _close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= _AGREE * want.abs().max())


def _scaled(poly: Poly, factor: float) -> Poly:
    return {nodes: factor * number for nodes, number in poly.items()}


def _sum(left: Poly, right: Poly) -> Poly:
    found = dict(left)
    for nodes, number in right.items():
        found[nodes] = found.get(nodes, 0.0) + number
    return {nodes: number for nodes, number in found.items() if number != 0.0}


def _product(left: Poly, right: Poly) -> Poly:
    found: Poly = {}
    for one, a in left.items():
        for other, b in right.items():
            found = _sum(found, {tuple(sorted((*one, *other), key=lambda node: node.name)): a * b})
    return found


def _added(left: Terms | None, right: Terms | None, a: float, b: float) -> Terms | None:
    """Add linear forms, with a factor each."""
    if left is None or right is None:
        return None
    keys = [*left, *(key for key in right if key not in left)]
    return {key: _sum(_scaled(left.get(key, {}), a), _scaled(right.get(key, {}), b)) for key in keys}


def _times(left: Terms | None, right: Terms | None) -> Terms | None:
    """Multiply linear forms, one of which is a constant."""
    if left is None or right is None:
        return None
    if set(left) != {None}:
        left, right = right, left
    if set(left) != {None}:
        return None
    return {key: _product(poly, left[None]) for key, poly in right.items()}


def _quotient(poly: Poly, divisor: Poly) -> Poly | None:
    """Return a polynomial over one product, ``None`` if that does not divide it."""
    if len(divisor) != 1:
        return None
    (nodes, number), found = next(iter(divisor.items())), {}
    for product, factor in poly.items():
        rest = list(product)
        for node in nodes:
            if node not in rest:
                return None
            rest.remove(node)
        found[tuple(rest)] = factor / number
    return found
