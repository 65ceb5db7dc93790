"""route_tokens: chosen layers, or their attention or MLP sublayers, compute K of the T tokens.

Before::  y = x + f(x)          After::  r = score(x)                                [B, T], fp32
                                         index, taken = select_tokens(r, valid)      K slots, or a running budget
                                         z = gather_tokens(x, index)                 [B, K, d]
                                         rows = z + g · f(z)                         f on K tokens; g in their domain
                                         y = scatter_tokens(x + prior(x), index, taken, rows)

K is the capacity's share of T and static, so the graph is. Rotary tables, masks and whatever else lies along the
tokens are gathered where they meet them, so positions stay absolute. Keys and values are the selected tokens' (then
the K/V cache shrinks by the capacity) or all tokens' (then only queries are routed). Padding, where the model has an
``attention_mask [B, T]`` input, is never selected. In an AttnRes model tokens are gathered from every source of a
read, and a skipped sublayer's source is zero, or its prior, for every later read.

At capacity 1 with gate 1 the program computes what it did: the index is 0 … T-1. Below that it computes less.

Refused (PassError, UsageError): a layer that does not exist, a unit whose inside is read elsewhere, an operation that
does not keep tokens apart, several streams, a scaled skip path, one token.

Sources: Mixture-of-Depths (arXiv 2404.02258), Subjective Depth and Timescale Transformers (arXiv 2511.21408); the
running budget makes the selection causal and the same in every bucket and chunk (``depthwire/ops/select_tokens.py``).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from depthwire.errors import PassError, UsageError
from depthwire.passes._base import Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import aten, is_call, value
from depthwire.passes._route_score import RouteScore
from depthwire.passes._token_region import TokenRegion
from depthwire.passes._token_tables import Selection
from depthwire.passes.analysis.routed_units import Unit, find_units
from depthwire.passes.analysis.routing_ops import GATHER, SCATTER, SELECT, SELECT_BUDGET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from depthwire.program import Program
    from depthwire.route import RouteSpec
    from depthwire.route_parts import RouteParts


THRESHOLDS = "route.thresholds"
BUDGETS = "route.budgets"
STATES = "route.states"
MASK = "attention_mask"


@dataclass(frozen=True)
class RouteTokens(Pass):
    """Route layers over tokens.

    Attributes:
        parts: What is routed, and the routers, priors and thresholds.
    """

    name: ClassVar[str] = "route_tokens"
    adds_parameters: ClassVar[bool] = True
    adds_constants: ClassVar[bool] = True
    parts: RouteParts

    def options(self) -> Mapping[str, object]:
        """Return the specification; the parts are parameters of the program."""
        spec = self.parts.spec.as_dict()
        return {name: item if isinstance(item, (bool, int, str)) else str(item) for name, item in spec.items()}

    def run(self, program: Program) -> PassResult:
        """Route every unit that the specification names.

        Raises:
            PassError: See the module's docstring.
            UsageError: A layer that does not exist, or parts that do not fit the model.
        """
        _refuse_routed(program)
        units = find_units(program, self.parts.spec)
        self.parts.check(int(value(units[0].state).shape[-1]))
        edit = GraphEditor(program, self.name)
        routing = _Routing(self.parts, program, edit, units[0])
        for number, unit in enumerate(units):
            routing.route(number, unit)
        return PassResult(edit.finish(), len(units))

    def ensures(self, program: Program) -> list[str]:
        """Every unit selects once, and what is scattered has been gathered with the same index."""
        graph = program.exported.graph
        selects = [node for node in graph.nodes if is_call(node, SELECT, SELECT_BUDGET)]
        wrong = []
        if len(selects) != len(self.parts.spec.layers):
            wrong.append(f"{len(selects)} selections for {len(self.parts.spec.layers)} layers")
        gathered = {node.args[1] for node in graph.nodes if is_call(node, GATHER)}
        scatters = [node for node in graph.nodes if is_call(node, SCATTER)]
        wrong += [f"{node.name} scatters what was not gathered" for node in scatters if node.args[1] not in gathered]
        return wrong


def _refuse_routed(program: Program) -> None:
    for node in program.exported.graph.nodes:
        if is_call(node, SELECT, SELECT_BUDGET):
            raise PassError(
                "route.routed-already",
                "The model is routed already",
                at=where(node),
                want="a model without token routing",
                got=str(node.target),
                todo="Convert it as it is, without --route; its own routing is compiled.",
            )


class _Routing:
    """What the units of one program share: the valid tokens, the slots, and the tables of thresholds and budgets."""

    def __init__(self, parts: RouteParts, program: Program, edit: GraphEditor, first: Unit) -> None:
        self._parts, self._program, self._edit = parts, program, edit
        self._batch, self._tokens = (int(size) for size in value(first.state).shape[:2])
        self._score = torch.promote_types(value(first.state).dtype, torch.float32)
        _refuse_tokens(parts.spec, self._tokens, first)
        self._slots: dict[int, torch.fx.Node] = {}
        self._mask = next((node for node in edit.graph.nodes if node.op == "placeholder" and self._is_mask(node)), None)
        self._valid = self._find_valid(edit.copy_of(first.state))
        self._tables: tuple[torch.fx.Node, ...] = ()
        if parts.spec.rule == "budget":
            self._add_tables()

    def _is_mask(self, node: torch.fx.Node) -> bool:
        val = value(node)
        return node.name == MASK and isinstance(val, torch.Tensor) and tuple(val.shape) == (self._batch, self._tokens)

    def _find_valid(self, state: torch.fx.Node) -> torch.fx.Node:
        if self._mask is None:
            ones = torch.ones(self._batch, self._tokens, dtype=torch.bool)
            return self._edit.add_constant("route.valid", ones)
        first = next(node for node in self._edit.graph.nodes if node.op == "call_function")
        return self._edit.call(aten.ne.Scalar, (self._mask, 0), before=first, like=state)

    def _add_tables(self) -> None:
        """One table each for all units, so that they can become inputs of the graph."""
        spec = self._parts.spec
        capacities = [spec.capacity_of(layer) for layer in spec.layers]
        thresholds = torch.stack([self._parts.of(layer, "threshold").to(self._score) for layer in spec.layers])
        budgets = torch.tensor([[share.numerator, share.denominator, spec.margin] for share in capacities])
        states = torch.zeros(len(capacities), self._batch, 2, dtype=torch.int64)
        tables = {THRESHOLDS: thresholds, BUDGETS: budgets, STATES: states}
        self._tables = tuple(self._edit.add_constant(name, table) for name, table in tables.items())

    def route(self, number: int, unit: Unit) -> None:
        """Route one unit."""
        spec, edit = self._parts.spec, self._edit
        place, like = edit.copy_of(unit.results[0]), unit.anchor
        scoring = RouteScore(edit, self._parts, unit, self._valid, place)
        score = scoring.score()
        selection = self._select(number, unit, score, place)
        region = TokenRegion(edit, self._program, frozenset(map(edit.copy_of, unit.boundary)), selection, place)
        taken = selection.taken or self._all_taken(selection)
        gate = None
        if spec.gate != "one":
            gathered = edit.call(GATHER, (score, selection.index), before=place, like=like)
            gate = scoring.gate(gathered)
        if len(unit.results) > 1 and spec.fallback != "identity":
            raise UsageError(
                "route.options",
                "A layer of two sublayers has no single update that a prior could stand in for",
                at=unit.module,
                want="fallback identity, or unit attention or mlp, for an AttnRes model",
                got=f"unit {spec.unit}, fallback {spec.fallback}",
                todo="Route the attention or the MLP sublayers.",
            )
        prior = scoring.fallback()
        state = edit.copy_of(unit.state)
        for original in unit.results:
            result = edit.copy_of(original)
            region.move_to(result)
            rows = region.rows(result).node
            base = self._base(unit, state, prior, result)
            if gate is not None:
                rows = self._gated(rows, gate, region.gather(state) if unit.residual else None, result, like)
            out = edit.call(SCATTER, (base, selection.index, taken, rows), before=result, like=like)
            edit.replace(result, out, keep_name=True)

    def _select(self, number: int, unit: Unit, score: torch.fx.Node, place: torch.fx.Node) -> Selection:
        spec, like = self._parts.spec, unit.anchor
        count = spec.slots(unit.layer, self._tokens)
        if count not in self._slots:
            self._slots[count] = self._edit.add_constant(f"route.slots_{count}", torch.arange(count))
        if spec.rule == "budget":
            rows = (
                self._edit.call(aten.select.int, (table, 0, number), before=place, like=like) for table in self._tables
            )
            args: tuple[object, ...] = (score, self._valid, *rows, self._slots[count])
            chosen = self._edit.call(SELECT_BUDGET, args, before=place, like=like)
        else:
            args = (score, self._valid, self._slots[count], spec.window)
            chosen = self._edit.call(SELECT, args, before=place, like=like)
        index, taken = (
            self._edit.call(operator.getitem, (chosen, position), before=place, like=like) for position in (0, 1)
        )
        # Top-k over tokens that are all valid fills every slot.
        full = spec.rule == "top-k" and self._mask is None
        return Selection(index, None if full else taken, self._tokens, count, spec.keys_values == "all")

    def _all_taken(self, selection: Selection) -> torch.fx.Node:
        """Return the selection's own bits, which nothing has needed so far."""
        chosen = selection.index.args[0]
        return next(user for user in chosen.users if user.args[1] == 1)  # type: ignore[union-attr]

    def _base(
        self, unit: Unit, state: torch.fx.Node, prior: torch.fx.Node | None, result: torch.fx.Node
    ) -> torch.fx.Node:
        """Return what tokens get that are not computed."""
        if unit.residual:
            if prior is None:
                return state
            return self._edit.call(aten.add.Tensor, (state, prior), before=result, like=unit.anchor)
        if prior is not None:
            return prior
        return self._edit.call(aten.zeros_like.default, (state,), before=result, like=unit.anchor)

    def _gated(
        self,
        rows: torch.fx.Node,
        gate: torch.fx.Node,
        before: torch.fx.Node | None,
        result: torch.fx.Node,
        like: torch.fx.Node,
    ) -> torch.fx.Node:
        """Scale the selected tokens' updates."""

        def call(target: object, *args: torch.fx.Node) -> torch.fx.Node:
            return self._edit.call(target, args, before=result, like=like)  # type: ignore[arg-type]

        if before is None:
            return call(aten.mul.Tensor, rows, gate)
        update = call(aten.mul.Tensor, call(aten.sub.Tensor, rows, before), gate)
        return call(aten.add.Tensor, before, update)


def _refuse_tokens(spec: RouteSpec, tokens: int, unit: Unit) -> None:
    if tokens < 2:
        raise PassError(
            "route.one-token",
            "There is nothing to choose from",
            at=where(unit.state),
            want="a program over two or more tokens a sequence",
            got=f"{tokens}",
            todo="Capture with a longer --seq-len.",
        )
    if spec.window and (tokens % spec.window or spec.window > tokens):
        raise UsageError(
            "route.options",
            "The window does not divide the sequence",
            at="--route-window",
            want=f"a divisor of {tokens}",
            got=str(spec.window),
            todo="Choose a window that divides --seq-len.",
        )
