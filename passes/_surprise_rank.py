"""The nodes of a recognised surprise: its rank, its gate, and thresholds on the gate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import aten, is_call, strip, value
from depthwire.passes.analysis.routing_ops import SURPRISE

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.passes._edit import GraphEditor
    from depthwire.passes.analysis.surprise import Poly, Square, Surprise

Node = torch.fx.Node


@dataclass
class SurpriseRanks:
    """Makes the rank of every surprise once.

    Attributes:
        edit: The graph.
        constant: Makes a constant of a name and a tensor.
    """

    edit: GraphEditor
    constant: Callable[[str, torch.Tensor], Node]
    _made: dict[object, Node] = field(default_factory=dict)

    def rank(self, surprise: Surprise, valid: Node, like: Node, place: Node) -> Node:
        """Return the rank ``[B, T]``.

        Args:
            surprise: What was recognised.
            valid: ``[B, T]`` bool.
            like: The score or gate, whose provenance the nodes take.
            place: Before which node they are inserted, if they are not there already.
        """
        key = (surprise.delta, surprise.change, str(surprise.beta_ce), str(surprise.beta_cu), valid)
        if key not in self._made:

            def call(target: Any, *args: object) -> Node:
                return self.edit.call(target, args, before=place, like=like)

            delta, prior = self._states(surprise, call)
            dtype = torch.promote_types(value(delta).dtype, torch.float32)
            numbers = (surprise.offset, surprise.m_cu, surprise.beta_ce, surprise.beta_cu)
            criteria = call(aten.stack.default, [self._number(poly, dtype, call) for poly in numbers])
            self._made[key] = call(SURPRISE, delta, prior, criteria, valid, surprise.window)
        return self._made[key]

    def _states(self, surprise: Surprise, call: Callable[..., Node]) -> tuple[Node, Node]:
        """Return the update and its prediction."""
        delta = self._state(surprise.delta, call)
        change = surprise.change
        pair = (change.left, change.right)
        if change.right is None and is_call(change.left, aten.sub.Tensor) and len(change.left.args) == 2:
            pair = tuple(strip(part) for part in change.left.args)  # type: ignore[assignment, arg-type]
        if surprise.delta.right is None and surprise.delta.left in pair:
            other = pair[1] if pair[0] is surprise.delta.left else pair[0]
            if isinstance(other, Node) and value(other).shape == value(delta).shape:
                prior = self.edit.copy_of(other)
                same = value(prior).dtype == value(delta).dtype
                return delta, prior if same else call(aten.to.dtype, prior, value(delta).dtype)
        return delta, call(aten.sub.Tensor, delta, self._state(change, call))

    def _state(self, square: Square, call: Callable[..., Node]) -> Node:
        left = self.edit.copy_of(square.left)
        return left if square.right is None else call(aten.sub.Tensor, left, self.edit.copy_of(square.right))

    def _number(self, poly: Poly, dtype: torch.dtype, call: Callable[..., Node]) -> Node:
        """Return the value of a polynomial, ``[]``."""
        total: Node | None = None
        for nodes, factor in poly.items():
            term: Node | None = None
            for node in nodes:
                part = self.edit.copy_of(node)
                part = part if value(part).dim() == 0 else call(aten.reshape.default, part, [])
                part = part if value(part).dtype == dtype else call(aten.to.dtype, part, dtype)
                term = part if term is None else call(aten.mul.Tensor, term, part)
            if term is None:
                term = self.constant("routing.criterion", torch.tensor(factor, dtype=dtype))
            elif factor != 1.0:
                term = call(aten.mul.Tensor, term, factor)
            total = term if total is None else call(aten.add.Tensor, total, term)
        return self.constant("routing.criterion", torch.tensor(0.0, dtype=dtype)) if total is None else total


def gate_of(rank: Node, call: Callable[..., Node]) -> Node:
    """Return g = 1 - exp(-rank)."""
    return call(aten.neg.default, call(aten.expm1.default, call(aten.neg.default, rank)))


def rank_threshold(threshold: Node, call: Callable[..., Node]) -> Node:
    """Return the rank at which the gate reaches a threshold, -log(1 - g); -inf for -inf."""
    return call(aten.neg.default, call(aten.log1p.default, call(aten.neg.default, threshold)))
