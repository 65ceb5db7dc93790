"""What a value makes of its features: a linear map of the last axis, with constant factors.

A value is described as ``y[…, j] = Σ_t factor_t[…, j] · x[…, index_t[j]]`` over a base x. Slices, reshapes and
concatenations permute such a description, products with constants scale it, sums join it; so what is found by it does
not depend on the spelling. Everything that is no such map of something before it is a base of its own.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import VIEWS, argument, aten, commuted, is_call, is_float, scalar, value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
_MOST_TERMS = 8


@dataclass(frozen=True)
class Term:
    """One term of a map: ``index`` ``[1…, trail…]`` into the base's last axis; ``factor`` ``[… or 1, trail…]``."""

    index: torch.Tensor
    factor: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Term:
        """Move the features."""
        return Term(change(self.index), change(self.factor))

    def times(self, factor: torch.Tensor | float) -> Term:
        """Scale the term."""
        return Term(self.index, self.factor * factor)


@dataclass(frozen=True)
class FeatureMap:
    """A value as a linear map of the last axis of ``base``; the axes before that stay as they are."""

    base: torch.fx.Node
    terms: tuple[Term, ...]

    @property
    def lead(self) -> int:
        """Return the number of axes before the mapped one."""
        return int(value(self.base).dim()) - 1

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> FeatureMap:
        """Move the features."""
        return FeatureMap(self.base, tuple(term.map(change) for term in self.terms))

    def times(self, factor: torch.Tensor | float) -> FeatureMap:
        """Scale the value."""
        return FeatureMap(self.base, tuple(term.times(factor) for term in self.terms))


class FeatureMaps:
    """The maps of the nodes of a graph, visited in its order.

    Attributes:
        picks: By base, the nodes that only pick features of it, each with the indices that it picks.
    """

    def __init__(self, constants: Mapping[str, torch.Tensor]) -> None:
        """Start with nothing visited.

        Args:
            constants: Known tensors by the name of their placeholder; all factors come from these.
        """
        self._constants = constants
        self.picks: dict[torch.fx.Node, list[tuple[torch.fx.Node, torch.Tensor]]] = {}
        self._forms: dict[torch.fx.Node, FeatureMap] = {}
        self._waiting: dict[torch.fx.Node, int] = {}
        self._steps: dict[Any, Callable[[torch.fx.Node], FeatureMap | None]] = {
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

    def visit(self, node: torch.fx.Node) -> FeatureMap | None:
        """Describe a node whose inputs were visited; ``None`` if it is a base, or only picks features of one."""
        form = self._step(node) if node.op == "call_function" and (is_float(node) or node.target in _PARTS) else None
        mixes = form is not None
        if form is not None:
            self._forms[node] = form
            self._waiting[node] = len(node.users)
            if _is_pick(form):
                mixes = False
                if node.target not in _PARTS:
                    self.picks.setdefault(form.base, []).append((node, form.terms[0].index))
        for source in node.all_input_nodes:  # tables are large: drop what nothing else will look at
            if source in self._waiting:
                self._waiting[source] -= 1
                if not self._waiting[source]:
                    del self._forms[source], self._waiting[source]
        return form if mixes else None

    def _base(self, node: torch.fx.Node) -> torch.fx.Node:
        return self._forms[node].base if node in self._forms else node

    def _form(self, node: Any) -> FeatureMap | None:
        if not isinstance(node, torch.fx.Node) or node.name in self._constants or not is_float(node):
            return self._forms.get(node) if isinstance(node, torch.fx.Node) else None
        return self._forms.get(node) or (identity(node) if value(node).dim() else None)

    def _step(self, node: torch.fx.Node) -> FeatureMap | None:
        step = self._steps.get(node.target)
        return None if step is None else step(node)

    def _part(self, node: torch.fx.Node) -> FeatureMap | None:
        parts: Any = node.args[0]
        form = self._forms.get(parts)
        if form is None:
            return None
        return form.map(lambda tensor: parts.target(tensor, *parts.args[1:], **parts.kwargs)[node.args[1]])

    def _copied(self, node: torch.fx.Node) -> FeatureMap | None:
        return self._form(node.args[0])

    def _negated(self, node: torch.fx.Node) -> FeatureMap | None:
        form = self._form(node.args[0])
        return None if form is None else form.times(-1.0)

    def _reshaped(self, node: torch.fx.Node) -> FeatureMap | None:
        """Reshapes that keep the axes before the described ones."""
        form = self._form(node.args[0])
        if form is None:
            return None
        before, after, lead = value(node.args[0]).shape, value(node).shape, form.lead  # type: ignore[arg-type]
        if after[:lead] != before[:lead] or len(after) <= lead:
            return None
        trail = [int(size) for size in after[lead:]]
        return form.map(lambda tensor: tensor.reshape(*tensor.shape[:lead], *trail))

    def _viewed(self, node: torch.fx.Node) -> FeatureMap | None:
        """Slices and the like of the described axes; an operator of several parts leaves them to whoever takes one."""
        target: Any = node.target
        form = self._form(node.args[0])
        place, name = (_AXIS | _PARTS)[target]
        rank = value(node.args[0]).dim() + (target is aten.unsqueeze.default)  # type: ignore[arg-type]
        if form is None or not _all_behind(argument(node, place, name, 0), rank, form.lead):
            return None
        return form if target in _PARTS else form.map(lambda tensor: target(tensor, *node.args[1:], **node.kwargs))

    def _scaled(self, node: torch.fx.Node) -> FeatureMap | None:
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

    def _sum(self, node: torch.fx.Node) -> FeatureMap | None:
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
                terms[same] = Term(term.index, terms[same].factor + term.factor)
        return FeatureMap(first.base, tuple(terms)) if len(terms) <= _MOST_TERMS else None

    def _joined(self, node: torch.fx.Node) -> FeatureMap | None:
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
            terms.append(Term(torch.cat([term.index for term in row], axis), torch.cat(factors, axis)))
        return FeatureMap(described[0].base, tuple(terms))


def identity(node: torch.fx.Node) -> FeatureMap:
    """Return a node as a map of itself."""
    *lead, width = value(node).shape
    index = torch.arange(width, dtype=torch.int32).reshape([1] * len(lead) + [-1])
    return FeatureMap(node, (Term(index, torch.ones(index.shape)),))


def _is_pick(form: FeatureMap) -> bool:
    return len(form.terms) == 1 and bool(form.terms[0].factor.eq(1).all())


def _all_behind(axes: Any, rank: int, lead: int) -> bool:
    named = axes if isinstance(axes, (list, tuple)) else [axes]
    return bool(named) and all(isinstance(axis, int) and axis % rank >= lead for axis in named)
