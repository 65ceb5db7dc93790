"""What a routing moves: rows taken out by its index or matrix, and how each place puts them back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import argument, aten, is_call, scalar, value
from depthwire.passes.analysis.token_routing import Refused, Role

if TYPE_CHECKING:
    from depthwire.passes.analysis.token_choice import Put
    from depthwire.passes.analysis.token_routing import Finder, Routing

Node = torch.fx.Node
_GATHERS: dict[Any, int] = {aten.gather.default: 2, aten.take_along_dim.default: 1}
"""Operator -> position of its index; the axis is at the other of 1 and 2."""
_INDICES = {Role.INDEX, Role.WIDE}
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class Move:
    """Rows ``[B, K, …]`` of states or of a table.

    Attributes:
        node: The rows.
        source: ``[B, T, …]``, or a table ``[T, …]`` that all sequences share.
        table: Which of the two.
    """

    node: Node
    source: Node
    table: bool


class Way(Enum):
    """How rows are put back."""

    REPLACE = auto()  # in place of the base's
    ADD = auto()  # added to the base's


@dataclass(frozen=True)
class Written:
    """What a put writes into the slots that hold a token."""

    put: Put
    rows: Node
    way: Way


def moves_of(finder: Finder, routing: Routing) -> list[Move]:
    """Return what a routing takes out, in graph order."""
    found = (_move(node, finder, routing) for node in finder.exported.graph.nodes)
    return [move for move in found if move is not None]


def _move(node: Node, finder: Finder, routing: Routing) -> Move | None:
    roles, closure = routing.roles, set(routing.closure)
    if (
        node in closure
        or node.op != "call_function"
        or any(put.matrix and put.index in node.args for put in routing.puts)
    ):
        return None
    arguments: tuple[Any, ...] = node.args
    table: bool | None = None
    if is_call(node, *_GATHERS):
        index, dim = arguments[_GATHERS[node.target]], argument(node, _GATHERS[node.target] ^ 3, "dim")
        if roles.get(index) in _INDICES and dim == 1 and value(node).shape[2:] == value(arguments[0]).shape[2:]:
            table = False
    elif is_call(node, aten.index.Tensor):
        *rows, index = arguments[1]
        if roles.get(index) is Role.INDEX and (not rows or finder.in_rows(node, routing.shape[0])):
            table = not rows
    elif is_call(node, *_PRODUCTS) and roles.get(arguments[0]) is Role.MATRIX:
        table = value(arguments[1]).dim() == 2
    return None if table is None else Move(node, arguments[0 if not is_call(node, *_PRODUCTS) else 1], table)


def written(routing: Routing, moves: list[Move]) -> list[Written] | Refused:
    """Return what every put of a routing writes, or why that cannot be told for slots without a token."""
    taken_out = {move.node: move for move in moves}
    found = []
    for put in routing.puts:
        rows: Any = put.rows
        if put.matrix:  # a slot without a token is a row of zeros: nothing is added
            before = rows.args[1] if is_call(rows, aten.sub.Tensor) and len(rows.args) == 2 else None
            if before in taken_out and taken_out[before].source is put.base:
                found.append(Written(put, rows.args[0], Way.REPLACE))
            else:
                found.append(Written(put, rows, Way.ADD))
            continue
        kept = _where_taken(rows, routing)
        if kept is not None:
            rows, other = kept
            own = isinstance(other, torch.fx.Node) and other in taken_out and taken_out[other].source is put.base
            if not (scalar(other) == 0.0 if put.adds else own) and not routing.rule.full:
                return Refused(put.node, "padding-overwritten", put.rows)
        elif not routing.rule.full:
            return Refused(put.node, "padding-overwritten", put.rows)
        found.append(Written(put, rows, Way.ADD if put.adds else Way.REPLACE))
    return found


def _where_taken(rows: Node, routing: Routing) -> tuple[Node, Any] | None:
    """Return what slots with and without a token get, of a choice between the two."""
    if is_call(rows, aten.where.self, aten.where.ScalarOther):
        condition, yes, other = rows.args
        if routing.roles.get(condition) is Role.TAKEN:  # type: ignore[arg-type]
            return yes, other  # type: ignore[return-value]
    return None
