"""legalize_experts: sparse experts without sorting, with static shapes, right for every split of tokens to experts.

Before::  sorted, order = sort(ids)                     After::  h = act(x @ W₁[e])            [E, T, ·], every expert
          h = act(grouped_mm(x[order // k], W₁, ends))           y = (h @ W₂[e])[ids, token]   [T·k, d], the chosen
          y = grouped_mm(h, W₂, ends)                            y · w
          (y · w[order])[inverse]

A grouped product has no ONNX operator, and how many rows an expert gets is known only at run time. Two static forms
compute the same rows, chosen by S = T·k rows and E experts:

* S > E: every expert for every token, and the chosen rows are then gathered. E/k times the arithmetic of the sparse
  form, and an activation of E·T rows. Nothing is multiplied by zero: an expert that was not chosen may overflow.
* S ≤ E (decoding): the weights of each row's expert are gathered. The arithmetic of the sparse form; S copies of an
  expert's weights move, where the dense form would read all E.

The rows between the products stay as they are, in their first order: what is computed row by row commutes with the
sort. In the dense form it is computed for the whole table, until it meets something that belongs to one row, such as
the routing weight.
Left alone: rows that something else reads in sorted order (``sorted-rows``), expert numbers that are not known to be
below E (``unbounded-ids``). The grouped product then has a translation of its own, which costs k times as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx.node import map_arg

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import aten, constants_of, is_call, value
from depthwire.passes.analysis.routing import (
    Index,
    Routing,
    Rows,
    axis_of,
    is_below,
    is_grouped_product,
    is_rowwise,
    routings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from depthwire.program import Program

_INDEX = aten.index.Tensor
Kinds = dict[torch.fx.Node, Rows]


@dataclass(frozen=True)
class LegalizeExperts(Pass):
    """Spell grouped products of sparse experts in batched ones."""

    name: ClassVar[str] = "legalize_experts"
    adds_constants: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """Rewrite every routing."""
        graph = program.exported.graph
        if not any(is_grouped_product(node) for node in graph.nodes):
            return PassResult(program, 0)
        verdicts = [(routing, _match(routing)) for routing in routings(graph, constants_of(program))]
        declines = tuple(verdict for _, verdict in verdicts if isinstance(verdict, Decline))
        matches = [(routing, verdict) for routing, verdict in verdicts if isinstance(verdict, dict)]
        if not matches:
            return PassResult(program, 0, declines)
        edit = GraphEditor(program, self.name)
        rewrites = sum(_Rewriter(edit, routing, kinds).rewrite() for routing, kinds in matches)
        return PassResult(edit.finish(), rewrites, declines)


def _match(routing: Routing) -> Kinds | Decline | None:
    """Return the kind of every value that the routing touches; ``None`` if it has no grouped product."""
    kinds: Kinds = {}
    for node in routing.ids.graph.nodes:
        kind = _kind(node, kinds, routing)
        if kind is not None:
            kinds[node] = kind
    products = [node for node in kinds if is_grouped_product(node)]
    if not products:
        return None
    if not is_below(routing.ids, routing.experts):
        want = f"numbers from a top-k over {routing.experts} scores"
        return Decline("legalize-experts.unbounded-ids", where(products[0]), want, where(routing.ids))
    for node, kind in kinds.items():
        stray = next((user for user in node.users if kind is not Rows.RESULT and user not in kinds), None)
        if stray is not None:
            want = "rows that are put back in their first order before anything else reads them"
            return Decline("legalize-experts.sorted-rows", where(stray), want, str(stray.target))
    return kinds


def _gathers(routing: Routing) -> bool:
    return routing.rows <= routing.experts


def _kind(node: torch.fx.Node, kinds: Mapping[torch.fx.Node, Rows], routing: Routing) -> Rows | None:
    if is_call(node, _INDEX):
        return _selected(node, kinds, routing)
    if is_grouped_product(node):
        rows, weights, offsets = (argument for argument in node.args[:3])
        known = kinds.get(rows)  # type: ignore[arg-type]
        counted = routing.indices.get(offsets) is Index.OFFSETS  # type: ignore[arg-type]
        if known is None or not counted or weights in kinds or int(value(weights).shape[0]) != routing.experts:  # type: ignore[arg-type]
            return None
        return Rows.DENSE if known in (Rows.TOKEN, Rows.DENSE) and not _gathers(routing) else Rows.ROW
    touched = {argument: kinds[argument] for argument in node.all_input_nodes if argument in kinds}
    found = set(touched.values())
    if not found or Rows.RESULT in found or not is_rowwise(node, touched):
        return None
    if len(found) == 1:
        return found.pop()
    return Rows.DENSE if Rows.DENSE in found and Rows.ROW not in found else Rows.ROW


def _selected(node: torch.fx.Node, kinds: Mapping[torch.fx.Node, Rows], routing: Routing) -> Rows | None:
    source: Any = node.args[0]
    index: Any = node.args[1]
    role = routing.indices.get(index[0]) if len(index) == 1 else None
    length = int(value(source).shape[0])
    if source in kinds:
        return Rows.RESULT if role is Index.INVERSE else None
    if role is Index.ORDER and length == routing.rows:
        return Rows.ROW
    if role is Index.SORTED and length == routing.experts:
        return Rows.EXPERT
    if role is Index.TOKEN and length * routing.top_k == routing.rows:
        return Rows.TOKEN
    return None


class _Rewriter:
    """Computes the rows of one routing in their first order, node by node."""

    def __init__(self, edit: GraphEditor, routing: Routing, kinds: Kinds) -> None:
        self._edit = edit
        self._routing = routing
        self._kinds = {edit.copy_of(node): kind for node, kind in kinds.items()}
        self._ids = edit.copy_of(routing.ids)
        self._made: dict[torch.fx.Node, torch.fx.Node] = {}
        self._flat: dict[int, torch.fx.Node] = {}

    def rewrite(self) -> int:
        """Return the number of results that were replaced."""
        results = 0
        for node, kind in list(self._kinds.items()):
            if kind is Rows.RESULT:
                source: Any = node.args[0]
                self._edit.replace(node, self._as(source, Rows.ROW, node), keep_name=True)
                results += 1
            elif is_grouped_product(node):
                self._made[node] = self._product(node)
            elif is_call(node, _INDEX):
                source = node.args[0]
                self._made[node] = source
            else:
                self._made[node] = self._rowwise(node, kind)
        return results

    def _call(self, target: Callable[..., Any], args: tuple[Any, ...], node: torch.fx.Node) -> torch.fx.Node:
        return self._edit.call(target, args, before=node, like=node)

    def _product(self, node: torch.fx.Node) -> torch.fx.Node:
        rows: Any = node.args[0]
        weights: Any = node.args[1]
        kind = self._kinds[rows]
        if kind not in (Rows.TOKEN, Rows.DENSE) or _gathers(self._routing):
            rows = self._as(rows, Rows.ROW, node)
            return self._chosen(rows, weights, node)
        dense = self._made[rows]
        if kind is Rows.TOKEN:
            dense = self._call(aten.unsqueeze.default, (dense, 0), node)
        return self._call(aten.matmul.default, (dense, weights), node)

    def _chosen(self, rows: torch.fx.Node, weights: torch.fx.Node, node: torch.fx.Node) -> torch.fx.Node:
        """Multiply each row ``[S, K]`` by its own expert's matrix."""
        count, width = self._routing.rows, int(value(weights).shape[-1])
        if _gathers(self._routing):
            own = self._call(aten.index_select.default, (weights, 0, self._ids), node)
            product = self._call(aten.matmul.default, (self._call(aten.unsqueeze.default, (rows, 1), node), own), node)
            return self._call(aten.reshape.default, (product, [count, width]), node)
        every = self._call(aten.matmul.default, (self._call(aten.unsqueeze.default, (rows, 0), node), weights), node)
        return self._pick(every, count, 1, node)

    def _rowwise(self, node: torch.fx.Node, kind: Rows) -> torch.fx.Node:
        args, kwargs = map_arg((node.args, node.kwargs), lambda operand: self._operand(operand, kind, node))
        axis = axis_of(node)
        if axis is not None:
            position, name, last = axis
            if name in kwargs:
                kwargs = {**kwargs, name: last}
            else:
                args = (*args[:position], last, *args[position + 1 :])
        return self._edit.call(node.target, args, kwargs, before=node, like=node)  # type: ignore[arg-type]

    def _operand(self, operand: torch.fx.Node, kind: Rows, node: torch.fx.Node) -> torch.fx.Node:
        return self._as(operand, kind, node) if operand in self._kinds else operand

    def _as(self, operand: torch.fx.Node, wanted: Rows, node: torch.fx.Node) -> torch.fx.Node:
        """Return an operand's value as rows of another kind."""
        kind, made = self._kinds[operand], self._made[operand]
        if kind is wanted:
            return made
        count = self._routing.rows
        if wanted is Rows.DENSE:  # tokens broadcast over experts, experts over tokens
            return made if kind is Rows.TOKEN else self._call(aten.unsqueeze.default, (made, 1), node)
        if kind is Rows.EXPERT:
            return self._call(aten.index_select.default, (made, 0, self._ids), node)
        if kind is Rows.TOKEN:
            tokens, *rest = (int(size) for size in value(made).shape)
            wide = self._call(aten.unsqueeze.default, (made, 1), node)
            wide = self._call(aten.expand.default, (wide, [tokens, self._routing.top_k, *rest]), node)
            return self._call(aten.reshape.default, (wide, [count, *rest]), node)
        return self._pick(made, count // self._routing.top_k, self._routing.top_k, node)

    def _pick(self, table: torch.fx.Node, columns: int, top_k: int, node: torch.fx.Node) -> torch.fx.Node:
        """Take, of a table ``[E, columns, …]``, the entry of each row: its expert, and its number divided by top_k."""
        rest = [int(size) for size in value(table).shape[2:]]
        flat = self._call(aten.reshape.default, (table, [self._routing.experts * columns, *rest]), node)
        if columns not in self._flat:
            constant = torch.arange(self._routing.rows) // top_k
            name = self._edit.free_constant_name("row_token")
            offset = self._edit.add_constant(name, constant.to(value(self._ids).dtype))
            scaled = self._call(aten.mul.Tensor, (self._ids, columns), node)
            self._flat[columns] = self._call(aten.add.Tensor, (scaled, offset), node)
        return self._call(aten.index_select.default, (flat, 0, self._flat[columns]), node)
