"""The token routings of a graph: what chooses, by which rule, what is moved by it, and what every value of it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthwire.passes._match import aten, is_call, is_float, value
from depthwire.passes.analysis.reach import ancestors
from depthwire.passes.analysis.token_choice import Core, Given, Put, core_of, find_puts, padding_roots, path_from
from depthwire.passes.analysis.token_rules import (
    Budget,
    Point,
    Rule,
    Slots,
    budget_of,
    evaluate,
    in_slots,
    is_ascending,
    points,
    reference,
    slots_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.export import ExportedProgram

Node = torch.fx.Node


class Role(Enum):
    """What a value of a choice is."""

    INDEX = auto()  # [B, K], the slots' tokens
    WIDE = auto()  # the same along further axes
    TAKEN = auto()  # [B, K, 1 …], which slots hold a selected token
    SCORES = auto()  # [B, K], the slots' scores
    MATRIX = auto()  # [B, K, T], 1 at the slots' tokens
    TURNED = auto()  # [B, T, K]
    BITS = auto()  # [B, T], which tokens are selected


@dataclass(frozen=True)
class Refused:
    """A place that puts chosen rows back, but is not lowered, and why."""

    node: Node
    reason: str
    at: Node


@dataclass
class Routing:
    """One choice of tokens and all that is moved by it.

    Attributes:
        core: How it is made; of the first put.
        mask: Which tokens are no padding; ``None`` where there is none.
        rule: What it computes.
        puts: Where rows are put back.
        closure: The values that depend on the choice and given values alone.
        paths: What else is made of the mask for them.
        roles: What they are.
    """

    core: Core
    mask: Node | None
    rule: Rule
    puts: list[Put]
    closure: list[Node] = field(default_factory=list)
    paths: set[Node] = field(default_factory=set)
    roles: dict[Node, Role] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        batch, tokens = value(self.puts[0].node).shape[:2]
        return int(batch), int(tokens)


@dataclass
class Finder:
    """Finds routings.

    Attributes:
        exported: The program.
    """

    exported: ExportedProgram
    routings: list[Routing] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Find them all."""
        self.given = Given(self.exported)
        self.order = {node: place for place, node in enumerate(self.exported.graph.nodes)}
        families: dict[object, Routing] = {}
        for put in find_puts(self.exported.graph):
            found = self._match(put)
            if isinstance(found, Refused):
                if (found.reason, found.at) not in {(other.reason, other.at) for other in self.refused}:
                    self.refused.append(found)
            elif found is not None:
                core = found.core
                key = (core.score, core.threshold, found.mask, found.rule.slots, found.rule.budget)
                families.setdefault(key, found)
                if families[key] is not found:
                    families[key].puts.append(put)
        for routing in families.values():
            wrong = self._complete(routing)
            if wrong is None:
                self.routings.append(routing)
            else:
                self.refused.append(wrong)

    def _match(self, put: Put) -> Routing | Refused | None:
        core = core_of(put.index, self.given)
        if core is None:
            return None
        batch, tokens = (int(size) for size in value(put.node).shape[:2])
        shape = [int(size) for size in value(core.score).shape]
        if batch > 1 and shape[0] == batch * tokens:
            return Refused(put.node, "across-sequences", core.score)
        if [size for size in shape if size != 1] != [size for size in (batch, tokens) if size != 1]:
            return Refused(put.node, "several-choices", core.score) if len(shape) > 2 and tokens in shape else None
        slots = int(value(put.index).shape[2 if put.matrix else 1])
        if put.matrix and slots == tokens and core.nodes.isdisjoint(ancestors([put.rows])):
            return None  # it takes rows out: with as many slots as tokens the shapes do not tell
        return self._ruled(put, core, (batch, tokens)) if put.matrix or self.in_rows(put.node, batch) else None

    def _ruled(self, put: Put, core: Core, shape: tuple[int, int]) -> Routing | Refused:
        # What tells the slots with a token from the others says which rule it is, where the index alone does not.
        condition = put.rows.args[0] if is_call(put.rows, aten.where.self, aten.where.ScalarOther) else None
        bits = core_of(condition, self.given) if isinstance(condition, Node) else None
        if bits is None or (bits.score, bits.threshold) != (core.score, core.threshold):
            condition = None
        else:
            masks = tuple(sorted({*core.masks, *bits.masks}, key=self.order.__getitem__))
            core = replace(core, masks=masks, nodes=core.nodes | bits.nodes, shapes=core.shapes | bits.shapes)
        roots: list[Node | None] = [None]
        if core.masks:
            roots = [*padding_roots(core.masks, self.given, shape)]
            if not roots:
                return Refused(put.node, "padding-form", core.masks[0])
        for root in roots:
            rule = self._rule(put, condition, core, root)
            if rule is not None:
                return Routing(core, root, rule, [put])
        return Refused(put.node, "another-rule", core.score)

    def in_rows(self, node: Node, batch: int) -> bool:
        """Tell whether advanced indexing takes every row's own tokens."""
        if not is_call(node, aten.index.Tensor, aten.index_put.default):
            return True
        rows: Any = node.args[1][0]  # type: ignore[index]
        if not isinstance(rows, Node) or rows not in self.given.nodes or rows in self.given.inputs:
            return False
        known = self.values([rows], {})[rows]
        return tuple(known.shape) == (batch, 1) and torch.equal(known.flatten(), torch.arange(batch))

    def values(self, nodes: Iterable[Node], known: dict[Node, Tensor]) -> dict[Node, Tensor]:
        """Compute nodes, and the constants that they need."""
        wanted: set[Node] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node in wanted or node in known or node in self.given.tensors:
                continue
            wanted.add(node)
            stack += [operand for operand in node.all_input_nodes if operand in self.given.nodes]
        wanted = {node for node in wanted if node.op == "call_function"}
        return evaluate(sorted(wanted, key=self.order.__getitem__), {**self.given.tensors, **known})

    def computed(self, nodes: Iterable[Node], core: Core, mask: Node | None, point: Point) -> dict[Node, Tensor]:
        """Compute nodes of a choice at a point."""
        known = point.known(core, mask)
        return self.values({*nodes, *self._paths(core, mask)}, known)

    def closed(self, routing: Routing, point: Point, known: dict[Node, Tensor]) -> dict[Node, Tensor]:
        """Compute all values of a routing at a point, some of them given."""
        roots = {**point.known(routing.core, routing.mask), **known}
        return self.values({*routing.closure, *routing.paths}, roots)

    def masked(self, routing: Routing, point: Point, node: Node) -> Tensor | None:
        """Return a given value at a point; ``None`` if it depends on an input other than the mask."""
        if node not in self.given.inputs:
            return self.values([node], {})[node]
        mask = routing.mask
        if mask is None or mask not in padding_roots((node,), self.given, routing.shape):
            return None
        known = point.known(routing.core, mask)
        return self.values(path_from(mask, node, self.given), known)[node]

    def _paths(self, core: Core, mask: Node | None) -> set[Node]:
        return set() if mask is None else {node for end in core.masks for node in path_from(mask, end, self.given)}

    def _rule(self, put: Put, condition: Any, core: Core, mask: Node | None) -> Rule | None:
        shape = (int(value(put.node).shape[0]), int(value(put.node).shape[1]))
        tests = points(core, shape, padded=mask is not None)
        values = [(point, self.computed(core.nodes, core, mask, point)) for point in tests]
        slots = int(value(put.index).shape[2 if put.matrix else 1])
        budgets: list[Budget | None] = [None]
        if core.threshold is not None:
            budgets = [*self._budgets(core, mask, shape, slots)]
        for budget in budgets:
            rule = _agree(put, condition, values, slots, budget)
            if rule is not None:
                return rule
        return None

    def _budgets(self, core: Core, mask: Node | None, shape: tuple[int, int], slots: int) -> list[Budget]:
        """Return what a running budget may be, as each value that might be the selected bits says."""
        score = torch.arange(shape[1], 0, -1, dtype=torch.float32).repeat(shape[0], 1)
        threshold = core.threshold if isinstance(core.threshold, float) else 0.0
        point = Point(score + threshold, torch.ones(shape, dtype=torch.bool), threshold)
        found: list[Budget] = []
        values = self.computed(core.nodes, core, mask, point)
        for node in sorted(core.nodes, key=self.order.__getitem__, reverse=True):
            bits = values[node]
            if isinstance(bits, Tensor) and tuple(bits.shape) == shape and bool(((bits == 0) | (bits == 1)).all()):
                budget = budget_of(bits[0].bool().tolist(), slots)
                if budget is not None and budget not in found:
                    found.append(budget)
        return found

    def _complete(self, routing: Routing) -> Refused | None:
        """Find the roles of all values that depend on the choice."""
        core, mask = routing.core, routing.mask
        cores = [core_of(put.index, self.given) for put in routing.puts]
        inside = {node for other in cores if other is not None for node in other.nodes}
        for node in self.exported.graph.nodes:
            operands = node.all_input_nodes
            if node.op != "call_function" or inside.isdisjoint(operands) or _moves_states(node):
                continue
            if all(operand in inside or operand in self.given.nodes for operand in operands):
                inside.add(node)
        routing.closure = sorted(inside, key=self.order.__getitem__)
        others = {operand for node in inside for operand in node.all_input_nodes if operand in self.given.inputs}
        others -= self._paths(core, mask) | {mask}
        paths = self._paths(core, mask)
        for other in others:  # further values of the mask, which the choice itself has no use for
            if mask is None or mask not in padding_roots((other,), self.given, routing.shape):
                return Refused(routing.puts[0].node, "padding-form", other)
            paths.update(path_from(mask, other, self.given))
        routing.paths = paths
        tests = points(core, routing.shape, padded=mask is not None)
        candidates: dict[Node, Role] | None = None
        for point in tests:
            values = self.closed(routing, point, {})
            put = routing.puts[0]
            wanted = reference(point, routing.rule.slots, routing.rule.budget)
            own = own_slots(put, values, wanted, routing.shape[1])
            if own is None:
                return Refused(put.node, "another-rule", core.score)
            roles = {node: role for node in inside for role in [role_of(values[node], own, wanted, point)] if role}
            candidates = roles if candidates is None else {n: r for n, r in candidates.items() if roles.get(n) == r}
        routing.roles = candidates or {}
        allowed = {Role.INDEX, Role.WIDE, Role.TURNED}
        if routing.rule.slots == routing.shape[1]:
            allowed.add(Role.MATRIX)  # one that is its own transpose
        for put in routing.puts:
            if routing.roles.get(put.index) not in allowed:
                return Refused(put.node, "unsorted", put.index)
        return None


def _moves_states(node: Node) -> bool:
    """Tell whether a node takes rows ``[B, K, d]`` out of a table, which is a move."""
    if is_call(node, aten.gather.default, aten.index.Tensor, aten.matmul.default, aten.bmm.default):
        return is_float(node) and value(node).dim() > 2
    return False


def _agree(
    put: Put, condition: Any, tests: list[tuple[Point, dict[Node, Tensor]]], slots: int, budget: Budget | None
) -> Rule | None:
    exact = full = ascending = True
    for point, known in tests:
        tokens = point.score.shape[1]
        wanted = reference(point, slots, budget)
        own = own_slots(put, known, wanted, tokens)
        if own is None or (condition is not None and not torch.equal(known[condition][..., 0], own.taken)):
            return None
        full = full and bool(wanted.taken.all())
        exact = exact and torch.equal(own.index.to(torch.int64), wanted.index) and (full or not put.matrix)
        ascending = ascending and is_ascending(own)
    return Rule(slots, budget, exact, full, ascending)


def own_slots(put: Put, known: dict[Node, Tensor], wanted: Slots, tokens: int) -> Slots | None:
    """Return a put's slots as its model has them, if they hold what they are to hold; else ``None``."""
    tensor = known[put.index]
    found = slots_of(tensor.transpose(1, 2) if put.matrix else tensor, matrix=put.matrix)
    return None if found is None else in_slots(*found, wanted, tokens)


def role_of(found: object, own: Slots, wanted: Slots, point: Point) -> Role | None:
    """Return what a value is at one point, ``None`` if nothing in particular."""
    if not isinstance(found, Tensor) or found.dim() < 2 or found.shape[0] != own.index.shape[0]:
        return None
    batch, slots = own.index.shape
    tokens = point.score.shape[1]
    if found.shape == (batch, tokens) and slots != tokens:
        bits = torch.zeros(batch, tokens, dtype=torch.bool).scatter(1, wanted.index, wanted.taken)
        return Role.BITS if found.dtype == torch.bool and torch.equal(found, bits) else None
    matrix = _matrix_role(found, own, tokens)
    return _slots_role(found, own, point) if matrix is None and found.shape[1] == slots else matrix


def _matrix_role(found: Tensor, own: Slots, tokens: int) -> Role | None:
    matrix = torch.zeros(*own.index.shape, tokens).scatter(2, own.index.to(torch.int64).unsqueeze(2), 1.0)
    matrix = matrix * own.taken.unsqueeze(2)
    for role, wanted in ((Role.MATRIX, matrix), (Role.TURNED, matrix.transpose(1, 2))):
        if found.shape == wanted.shape and torch.equal(found.to(wanted.dtype), wanted):
            return role
    return None


def _slots_role(found: Tensor, own: Slots, point: Point) -> Role | None:
    shape = (*own.index.shape, *([1] * (found.dim() - 2)))
    taken, index = (tensor.reshape(shape).expand_as(found) for tensor in (own.taken, own.index.to(torch.int64)))
    if found.dtype == torch.bool:
        return Role.TAKEN if torch.equal(found, taken) else None
    if not found.dtype.is_floating_point:
        role = Role.INDEX if found.dim() == 2 else Role.WIDE
        return role if torch.equal(found[taken].to(torch.int64), index[taken]) else None
    if found.dim() > 2:
        return None
    scores = point.score.gather(1, index).to(found.dtype)
    return Role.SCORES if torch.equal(found[taken], scores[taken]) else None
