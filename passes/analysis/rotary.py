"""Rotary positions by their mathematics: a linear map of the last axis that turns pairs of features.

A value is described as ``y[…, j] = Σ_t factor_t[…, j] · x[…, index_t[j]]`` over a base x, with constant factors.
Slices, reshapes and concatenations permute such a description, products with constants scale it, sums join it; so the
spelling does not matter. A rotary embedding is what comes out as

    y_i = c · x_i - s · x_k          y_k = c · x_k + s · x_i

for pairs (i, k) that lie half the rotated width apart or side by side; features behind the rotated ones pass through.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import VIEWS, argument, aten, commuted, is_call, is_float, scalar, value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_SAME = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
_RESHAPES = (*VIEWS, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
# Where the axes stand among the arguments, and under which name.
_AXIS: dict[Any, tuple[int, str]] = {
    aten.slice.Tensor: (1, "dim"),
    aten.select.int: (1, "dim"),
    aten.unsqueeze.default: (1, "dim"),
    aten.squeeze.dim: (1, "dim"),
    aten.flip.default: (1, "dims"),
    aten.roll.default: (2, "dims"),
}
_PARTS: dict[Any, tuple[int, str]] = {
    aten.split.Tensor: (2, "dim"),
    aten.split_with_sizes.default: (2, "dim"),
    aten.split.sizes: (2, "dim"),
    aten.chunk.default: (2, "dim"),
    aten.unbind.int: (1, "dim"),
}
_ENDS = (aten.add.Tensor, aten.sub.Tensor, aten.cat.default, *_RESHAPES)
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
_MOST_TERMS = 8


@dataclass(frozen=True)
class Rotary:
    """One rotary embedding.

    Attributes:
        output: The node that computes it.
        source: What is rotated; of the output's shape.
        cos: c for every pair, of the source's rank with axes of size 1 where it does not vary: ``[…, pairs]``.
        sin: s likewise, each in the dtype that the factors had, fp32 at least.
        interleaved: Whether the features of a pair lie side by side, not half the rotated width apart.
        inside: The nodes from the source (without it) to the output (with it).
        consistent: Whether both features of every pair have the same c and opposite s; the tables are the first one's.
    """

    output: torch.fx.Node
    source: torch.fx.Node
    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool
    inside: frozenset[torch.fx.Node]
    consistent: bool


@dataclass(frozen=True)
class _Term:
    """``index`` ``[1…, trail…]`` into the base's last axis; ``factor`` ``[… or 1, trail…]``."""

    index: torch.Tensor
    factor: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> _Term:
        return _Term(change(self.index), change(self.factor))

    def times(self, factor: torch.Tensor | float) -> _Term:
        return _Term(self.index, self.factor * factor)


@dataclass(frozen=True)
class _Form:
    """A value as a linear map of the last axis of ``base``; ``lead`` axes come before it and stay as they are."""

    base: torch.fx.Node
    terms: tuple[_Term, ...]

    @property
    def lead(self) -> int:
        return int(value(self.base).dim()) - 1

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> _Form:
        return _Form(self.base, tuple(term.map(change) for term in self.terms))

    def times(self, factor: torch.Tensor | float) -> _Form:
        return _Form(self.base, tuple(term.times(factor) for term in self.terms))


def find_rotaries(graph: torch.fx.Graph, constants: Mapping[str, torch.Tensor]) -> list[Rotary]:
    """Return the rotary embeddings of a graph in its order; one that is part of a larger one is not named apart.

    Args:
        graph: A functional graph.
        constants: Known tensors by the name of their placeholder; the angles must come from these.
    """
    finder = _Finder(constants)
    found = [rotary for node in graph.nodes for rotary in finder.visit(node)]
    outer: list[Rotary] = []
    for rotary in reversed(found):
        if not any(rotary.output in larger.inside for larger in outer):
            outer.append(rotary)
    return outer[::-1]


class _Finder:
    def __init__(self, constants: Mapping[str, torch.Tensor]) -> None:
        self._constants = constants
        self._forms: dict[torch.fx.Node, _Form] = {}
        # Nodes that only pick features of a base: what a rotation may be said to rotate.
        self._picks: dict[torch.fx.Node, list[tuple[torch.fx.Node, torch.Tensor]]] = {}
        self._waiting: dict[torch.fx.Node, int] = {}
        self._steps: dict[Any, Callable[[torch.fx.Node], _Form | None]] = {
            operator.getitem: self._part,
            aten.neg.default: self._negated,
            aten.add.Tensor: self._sum,
            aten.sub.Tensor: self._sum,
            **dict.fromkeys(_SAME, self._copied),
            **dict.fromkeys(_RESHAPES, self._reshaped),
            **dict.fromkeys((*_AXIS, *_PARTS), self._viewed),
            **dict.fromkeys(_PRODUCTS, self._scaled),
            **dict.fromkeys((aten.cat.default, aten.stack.default), self._joined),
        }

    def visit(self, node: torch.fx.Node) -> Iterator[Rotary]:
        """Describe a node, whose inputs were visited; yield the rotary embedding that ends here."""
        form = self._step(node) if node.op == "call_function" and (is_float(node) or _gives_parts(node)) else None
        if form is not None:
            self._forms[node] = form
            self._waiting[node] = len(node.users)
            if _is_pick(form) and not _gives_parts(node):
                self._picks.setdefault(form.base, []).append((node, form.terms[0].index))
            elif is_call(node, *_ENDS):
                rotary = self._rotary(node, form)
                if rotary is not None:
                    yield rotary
        for source in node.all_input_nodes:  # tables are large: drop what nothing else will look at
            if source in self._waiting:
                self._waiting[source] -= 1
                if not self._waiting[source]:
                    del self._forms[source], self._waiting[source]

    def _base(self, node: torch.fx.Node) -> torch.fx.Node:
        return self._forms[node].base if node in self._forms else node

    def _form(self, node: Any) -> _Form | None:
        if not isinstance(node, torch.fx.Node) or node.name in self._constants or not is_float(node):
            return self._forms.get(node) if isinstance(node, torch.fx.Node) else None
        return self._forms.get(node) or (_identity(node) if value(node).dim() else None)

    def _step(self, node: torch.fx.Node) -> _Form | None:
        step = self._steps.get(node.target)
        return None if step is None else step(node)

    def _part(self, node: torch.fx.Node) -> _Form | None:
        parts: Any = node.args[0]
        form = self._forms.get(parts)
        if form is None:
            return None
        return form.map(lambda tensor: parts.target(tensor, *parts.args[1:], **parts.kwargs)[node.args[1]])

    def _copied(self, node: torch.fx.Node) -> _Form | None:
        return self._form(node.args[0])

    def _negated(self, node: torch.fx.Node) -> _Form | None:
        form = self._form(node.args[0])
        return None if form is None else form.times(-1.0)

    def _reshaped(self, node: torch.fx.Node) -> _Form | None:
        """Reshapes that keep the axes before the described ones."""
        form = self._form(node.args[0])
        if form is None:
            return None
        before, after, lead = value(node.args[0]).shape, value(node).shape, form.lead  # type: ignore[arg-type]
        if after[:lead] != before[:lead] or len(after) <= lead:
            return None
        trail = [int(size) for size in after[lead:]]
        return form.map(lambda tensor: tensor.reshape(*tensor.shape[:lead], *trail))

    def _viewed(self, node: torch.fx.Node) -> _Form | None:
        """Slices and the like of the described axes; an operator of several parts leaves them to whoever takes one."""
        target: Any = node.target
        form = self._form(node.args[0])
        place, name = (_AXIS | _PARTS)[target]
        rank = value(node.args[0]).dim() + (target is aten.unsqueeze.default)  # type: ignore[arg-type]
        if form is None or not _all_behind(argument(node, place, name, 0), rank, form.lead):
            return None
        return form if target in _PARTS else form.map(lambda tensor: target(tensor, *node.args[1:], **node.kwargs))

    def _scaled(self, node: torch.fx.Node) -> _Form | None:
        number = scalar(node.args[1])
        if number is not None:
            form = self._form(node.args[0])
            divides = is_call(node, aten.div.Tensor, aten.div.Scalar)
            return None if form is None or number == 0 else form.times(1 / number if divides else number)
        if not is_call(node, aten.mul.Tensor):
            return None
        for source, table in commuted(node):
            known = self._constants.get(getattr(table, "name", ""))
            if known is None or not isinstance(source, torch.fx.Node):
                continue
            form, shape = self._form(source), value(node).shape
            if form is None or value(source).shape != shape or known.dim() > len(shape) or not is_float(table):
                return None
            wide = torch.promote_types(known.dtype, torch.float32)
            return form.times(known.to(wide).reshape([1] * (len(shape) - known.dim()) + list(known.shape)))
        return None

    def _sum(self, node: torch.fx.Node) -> _Form | None:
        left, right = node.args[:2]
        if not isinstance(left, torch.fx.Node) or not isinstance(right, torch.fx.Node):
            return None
        if self._base(left) is not self._base(right) or argument(node, 2, "alpha", 1) != 1:
            return None
        first, second = self._form(left), self._form(right)
        if first is None or second is None or value(left).shape != value(right).shape:
            return None
        if is_call(node, aten.sub.Tensor):
            second = second.times(-1.0)
        terms = list(first.terms)
        for term in second.terms:
            same = next((n for n, known in enumerate(terms) if torch.equal(known.index, term.index)), None)
            if same is None:
                terms.append(term)
            else:
                terms[same] = _Term(term.index, terms[same].factor + term.factor)
        return _Form(first.base, tuple(terms)) if len(terms) <= _MOST_TERMS else None

    def _joined(self, node: torch.fx.Node) -> _Form | None:
        parts: Any = node.args[0]
        if len({self._base(part) for part in parts}) != 1:
            return None
        forms = [self._form(part) for part in parts]
        axis, stacks = argument(node, 1, "dim", 0), is_call(node, aten.stack.default)
        rank = int(value(node).dim())
        described = [form for form in forms if form is not None]
        if len(described) < len(forms) or not _all_behind(axis, rank, described[0].lead):
            return None
        if stacks:
            described = [form.map(lambda tensor: tensor.unsqueeze(axis)) for form in described]
        lead, axis = described[0].lead, axis % rank
        terms = []
        for number in range(max(len(form.terms) for form in described)):
            row = [form.terms[number] if number < len(form.terms) else form.terms[0].times(0.0) for form in described]
            shape = torch.broadcast_shapes(*(term.factor.shape[:lead] for term in row))  # type: ignore[no-untyped-call]
            factors = [term.factor.expand(*shape, *term.factor.shape[lead:]) for term in row]
            terms.append(_Term(torch.cat([term.index for term in row], axis), torch.cat(factors, axis)))
        return _Form(described[0].base, tuple(terms))

    def _rotary(self, node: torch.fx.Node, form: _Form) -> Rotary | None:
        if value(node).shape[-1] % 2 or value(node).dim() < 2:
            return None
        found: Rotary | None = None
        picks = [(form.base, _identity(form.base).terms[0].index), *self._picks.get(form.base, ())]
        for source, index in reversed(picks):
            if value(source).shape != value(node).shape or index.shape[-1] != value(node).shape[-1]:
                continue
            relative = _relative(form, index)
            if relative is None:
                continue
            inside = _between(node, {source, form.base})
            for cos, sin, interleaved, consistent in _rotations(relative, int(index.shape[-1])):
                found = Rotary(node, source, cos, sin, interleaved, inside, consistent)
                if consistent:
                    return found
        return found


def _gives_parts(node: torch.fx.Node) -> bool:
    return node.target in _PARTS


def _identity(node: torch.fx.Node) -> _Form:
    *lead, width = value(node).shape
    index = torch.arange(width, dtype=torch.int32).reshape([1] * len(lead) + [-1])
    return _Form(node, (_Term(index, torch.ones(index.shape)),))


def _is_pick(form: _Form) -> bool:
    return len(form.terms) == 1 and bool(form.terms[0].factor.eq(1).all())


def _all_behind(axes: Any, rank: int, lead: int) -> bool:
    named = axes if isinstance(axes, (list, tuple)) else [axes]
    return bool(named) and all(isinstance(axis, int) and axis % rank >= lead for axis in named)


def _relative(form: _Form, index: torch.Tensor) -> list[_Term] | None:
    """Return a form's terms with columns of a picked value in place of indices of its base.

    ``None`` where the form reads something that the picked value does not hold, or holds in another row.
    """
    width = index.shape[-1]
    place = torch.full((int(value(form.base).shape[-1]),), -1, dtype=torch.long)
    place[index.reshape(-1).long()] = torch.arange(index.numel())
    rows = torch.arange(index.numel()).reshape(index.shape) // width
    terms = []
    for term in form.terms:
        flat = place[term.index.long()]
        used = term.factor.ne(0)
        if bool((used & ((flat < 0) | (flat // width != rows))).any()):
            return None
        terms.append(_Term(flat % width, term.factor))
    return terms


def _rotations(terms: list[_Term], width: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool, bool]]:
    """Yield (cos, sin, interleaved, consistent) for every way to read the terms as rotations of pairs."""
    column = torch.arange(width)
    turned = torch.zeros(width, dtype=torch.bool)
    for term in terms:
        used = (term.factor.ne(0) & (term.index != column)).reshape(-1, width)
        turned |= used.any(0)
    if not bool(turned.any()):
        return
    last = int(turned.nonzero().max()) + 1
    for rotated in sorted({last + last % 2, width}):
        for interleaved in (False, True):
            partner = (column ^ 1) if interleaved else (column + rotated // 2) % rotated
            partner = torch.where(column < rotated, partner, column)
            found = _pairs(terms, partner, rotated, interleaved=interleaved)
            if found is not None:
                cos, sin, consistent = found
                yield cos, sin, interleaved, consistent


def _pairs(
    terms: list[_Term], partner: torch.Tensor, rotated: int, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor, bool] | None:
    column = torch.arange(len(partner))
    own = other = torch.zeros(())
    for term in terms:
        straight, crossed = term.index == column, (term.index == partner) & (partner != column)
        if bool((term.factor.ne(0) & ~straight & ~crossed).any()):
            return None
        own = own + term.factor * straight
        other = other + term.factor * crossed
    if not bool(own[..., rotated:].eq(1).all()):
        return None
    if interleaved:
        first, second = slice(0, rotated, 2), slice(1, rotated, 2)
    else:
        first, second = slice(0, rotated // 2), slice(rotated // 2, rotated)
    cos, sin = own[..., first], -other[..., first]
    if not bool(cos.any()):  # a plain exchange of features, such as the inner part of most spellings
        return None
    consistent = torch.equal(cos, own[..., second]) and torch.equal(sin, other[..., second])
    return _narrowed(cos), _narrowed(sin), consistent


def _narrowed(table: torch.Tensor) -> torch.Tensor:
    """Return a table with size 1 on every axis before the last along which it does not vary."""
    for axis in range(table.dim() - 1):
        first = table.narrow(axis, 0, 1)
        if torch.equal(table, first.expand_as(table)):
            table = first
    return table


def _between(node: torch.fx.Node, ends: set[torch.fx.Node]) -> frozenset[torch.fx.Node]:
    """Return what a node is computed by from some ends, itself included."""
    inside: set[torch.fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in ends or current in inside or current.op != "call_function":
            continue
        inside.add(current)
        waiting += current.all_input_nodes
    return frozenset(inside)
