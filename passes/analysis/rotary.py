"""Rotary positions by their mathematics: a linear map of the features that turns pairs of them.

A rotary embedding is what comes out (``analysis.feature_maps``) as

    y_i = c · x_i - s · x_k          y_k = c · x_k + s · x_i

for pairs (i, k) that lie half the rotated width apart or side by side; features behind the rotated ones pass through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from depthwire.passes._match import VIEWS, aten, is_call, value
from depthwire.passes.analysis.feature_maps import FeatureMap, FeatureMaps, Term, identity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_ENDS = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.cat.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    *VIEWS,
)


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


def find_rotaries(graph: torch.fx.Graph, constants: Mapping[str, torch.Tensor]) -> list[Rotary]:
    """Return the rotary embeddings of a graph in its order; one that is part of a larger one is not named apart.

    Args:
        graph: A functional graph.
        constants: Known tensors by the name of their placeholder; the angles must come from these.
    """
    maps = FeatureMaps(constants)
    found: list[Rotary] = []
    for node in graph.nodes:
        form = maps.visit(node)
        rotary = _rotary(node, form, maps) if form is not None and is_call(node, *_ENDS) else None
        if rotary is not None:
            found.append(rotary)
    outer: list[Rotary] = []
    for rotary in reversed(found):
        if not any(rotary.output in larger.inside for larger in outer):
            outer.append(rotary)
    return outer[::-1]


def _rotary(node: torch.fx.Node, form: FeatureMap, maps: FeatureMaps) -> Rotary | None:
    if value(node).shape[-1] % 2 or value(node).dim() < 2:
        return None
    found: Rotary | None = None
    picks = [(form.base, identity(form.base).terms[0].index), *maps.picks.get(form.base, ())]
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


def _relative(form: FeatureMap, index: torch.Tensor) -> list[Term] | None:
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
        terms.append(Term(flat % width, term.factor))
    return terms


def _rotations(terms: list[Term], width: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool, bool]]:
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
    terms: list[Term], partner: torch.Tensor, rotated: int, *, interleaved: bool
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
