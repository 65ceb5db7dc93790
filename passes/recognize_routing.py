"""recognize_routing: token routing spelled out in elementary operations becomes the operators of token routing.

Before::  i = sort(topk(r, K).indices)                     After::  i, taken = select_tokens(r, valid)
          z = gather(x, i)     or  x[b, i]  or  P @ x               z = gather_tokens(x, i)
          y = f(z)                                                  y = f(z)
          o = scatter(x, i, y) or  index_put  or  x + P' @ (y - z)  o = scatter_tokens(x, i, taken, y)

A routing is found from its end, where rows are put back into states, and known by what it computes: everything between
the scores and the index (or the 0/1 matrix P) is evaluated and compared with the operators' definition
(``analysis.token_rules``): top-k by sorts, k-th values or masks; a running budget by whatever prefix scans. Masks and
positions stay as they are spelled, on the operators' index and bits. A surprise (``analysis.surprise``) becomes
``surprise_score``; where tokens are ranked by its gate, which saturates, they are ranked by the surprise, and the gate
is made of it.

What differs, by the operators' definition: among equal scores the lower index comes first (``torch.topk`` leaves it
open), and slots without a token come last. Where the model has them elsewhere, the block must not tell
(``analysis.slot_flow``).

Left alone, with the reason (``REASONS``): choices that are not a choice of tokens within each sequence, other rules,
blocks in which slots meet. Choices that put no rows back into states (experts, sampling, beams) are not looked at.

Sources: Mixture-of-Depths (arXiv 2404.02258), Subjective Depth and Timescale Transformers (arXiv 2511.21408).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import CASTS, aten, is_call, value
from depthwire.passes._surprise_rank import SurpriseRanks, gate_of, rank_threshold
from depthwire.passes.analysis.routing_ops import GATHER, SCATTER, SELECT, SELECT_BUDGET
from depthwire.passes.analysis.slot_flow import SlotFlow
from depthwire.passes.analysis.surprise import Surprise, SurpriseFinder
from depthwire.passes.analysis.token_moves import Move, Way, Written, moves_of, written
from depthwire.passes.analysis.token_routing import Finder, Refused, Role, Routing

if TYPE_CHECKING:
    from depthwire.program import Program

Node = torch.fx.Node

_VIEWS = (aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default, aten.to.dtype)

_SLOTS = {Role.INDEX, Role.WIDE, Role.TAKEN}

# Reason -> what a routing needs there, what was found.
REASONS = {
    "across-sequences": ("a choice within each sequence", "tokens of all sequences ranked together"),
    "another-rule": ("the top-k of each sequence, or a running budget", "another choice of tokens"),
    "padding-form": ("one mask [batch, tokens] of the tokens that count", "other values that take part in the choice"),
    "padding-overwritten": ("slots without a token that write back what is there", "slots that may overwrite padding"),
    "padding-visible": ("attention that sees the slots with a token alone", "attention that sees other slots"),
    "surprise": ("the surprise that surprise_score computes", "another score made of mean squares"),
    "several-choices": ("one choice of tokens for each sequence", "several, such as experts that choose their tokens"),
    "slots-mixed": ("a block that treats slots without a token apart", "an operation in which slots meet"),
    "unsorted": ("slots in the order of the tokens", "slots in the order of the scores"),
}


@dataclass(frozen=True)
class RecognizeRouting(Pass):
    """Recognise token routing."""

    name: ClassVar[str] = "recognize_routing"
    adds_constants: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """Lower every routing; the count is that of the selections."""
        plans, refused = _plans(program)
        declines = tuple(_decline(item) for item in refused)
        if not plans:
            return PassResult(program, 0, declines)
        edit = GraphEditor(program, self.name)
        lowering = _Lowering(edit)
        for plan in plans:
            lowering.lower(plan)
        return PassResult(edit.finish(), len(plans), declines)

    def ensures(self, program: Program) -> list[str]:
        """No routing is spelled out any more."""
        return [f"{plan.routing.puts[0].node.name} is still spelled out" for plan in _plans(program)[0]]


@dataclass(frozen=True)
class _Plan:
    """What is done about one routing; the surprises are those of its score and of the moves that take out a gate."""

    routing: Routing
    moves: list[Move]
    puts: list[Written]
    surprises: dict[Node, Surprise]


def _plans(program: Program) -> tuple[list[_Plan], list[Refused]]:
    finder = Finder(program.exported)
    plans, refused = [], list(finder.refused)
    for routing in finder.routings:
        moves = moves_of(finder, routing)
        puts = written(routing, moves)
        if isinstance(puts, Refused):
            refused.append(puts)
            continue
        wrong = None if routing.rule.exact else SlotFlow(finder, routing, [move.node for move in moves]).wrong
        if wrong is not None:
            refused.append(Refused(routing.puts[0].node, *wrong))
            continue
        surprises = SurpriseFinder(finder, routing)
        scored = [routing.core.score, *(_scored(move, routing) for move in moves if not move.table)]
        known = {node: surprises.find(node) for node in scored if node is not None}
        found = {node: surprise for node, surprise in known.items() if surprise is not None}
        if routing.core.score not in found and surprises.looks_like_one(routing.core.score):
            refused.append(Refused(routing.core.score, "surprise", routing.core.score))
        plans.append(_Plan(routing, moves, puts, found))
    return plans, refused


def _needed(plan: _Plan) -> list[Node]:
    """Return the values of known roles that something else than the moves and puts is made of."""
    roles, closure = plan.routing.roles, set(plan.routing.closure)
    handled = closure | {move.node for move in plan.moves} | {item.put.node for item in plan.puts}
    handled |= {user for item in plan.puts for user in item.put.index.users}
    handled -= {move.node for move in plan.moves if move.table}  # these stay, on the operator's index
    stack = [node for node in plan.routing.closure if not handled.issuperset(node.users)]
    found: set[Node] = set()
    while stack:
        node = stack.pop()
        parts = [part for part in node.all_input_nodes if part in closure]
        if node in roles and not (is_call(node, *_VIEWS) and all(roles.get(part) in _SLOTS for part in parts)):
            found.add(node)
        else:
            stack += parts
    return [node for node in plan.routing.closure if node in found]


def _scored(move: Move, routing: Routing) -> Node | None:
    """Return the score or gate ``[B, T]`` that a move takes out, ``None`` if it takes out states."""
    source = move.source
    while is_call(source, *CASTS, aten.unsqueeze.default, aten.reshape.default, aten.view.default):
        source = source.args[0]  # type: ignore[assignment]
    shape = value(source).shape
    return source if tuple(shape[:2]) == routing.shape and value(move.source).numel() == shape[:2].numel() else None


def _decline(refused: Refused) -> Decline:
    want, got = REASONS[refused.reason]
    at = "" if refused.at is refused.node else f" at {where(refused.at)}: {refused.at.target}"
    return Decline(f"recognize-routing.{refused.reason}", where(refused.node), want, got + at)


@dataclass
class _Lowering:
    edit: GraphEditor
    constants: dict[object, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ranks = SurpriseRanks(self.edit, self._constant)

    def lower(self, plan: _Plan) -> None:
        routing, edit = plan.routing, self.edit
        valid = self._valid(routing)
        ranks = {}
        for node, found in plan.surprises.items():
            like = edit.copy_of(node)
            ranks[node] = self.ranks.rank(found, valid, like, self._behind([like, valid]))
        index, taken, score = self._select(plan, valid, ranks.get(routing.core.score))
        for node in _needed(plan):
            if routing.roles[node] in _SLOTS:
                self._stand_in(node, taken if routing.roles[node] is Role.TAKEN else index)
            else:
                self._rebuilt(node, routing.roles[node], index, taken, score)
        for move in plan.moves:
            old, scored = edit.copy_of(move.node), _scored(move, routing)
            if scored in plan.surprises:
                edit.replace(old, self._gate(ranks[scored], plan.surprises[scored], index, old))
            else:
                edit.replace(old, self._gather(move, index, old), keep_name=routing.rule.exact)
        for item in plan.puts:
            self._put(item, index, taken)

    def _valid(self, routing: Routing) -> Node:
        """Return which tokens are no padding, ``[B, T]`` bool."""
        if routing.mask is None:
            return self._constant("routing.valid", torch.ones(routing.shape, dtype=torch.bool))
        mask = self.edit.copy_of(routing.mask)
        if value(mask).dtype == torch.bool:
            return mask
        if mask not in self.constants:
            place = self._behind([mask])
            self.constants[mask] = self.edit.call(aten.ne.Scalar, (mask, 0), before=place, like=place)
        return self.constants[mask]

    def _select(self, plan: _Plan, valid: Node, rank: Node | None) -> tuple[Node, Node, Node]:
        """Return the index, the bits and the score ``[B, T]``."""
        core, rule, (batch, tokens) = plan.routing.core, plan.routing.rule, plan.routing.shape
        score = self.edit.copy_of(core.score) if rank is None else rank
        roots = [score, valid]
        if isinstance(core.threshold, Node):
            roots.append(self.edit.copy_of(core.threshold))
        like, place = score, self._behind(roots)

        def call(target: Any, *args: object) -> Node:
            return self.edit.call(target, args, before=place, like=like)

        dtype = torch.promote_types(value(score).dtype, torch.float32)
        score = score if value(score).dtype == dtype else call(aten.to.dtype, score, dtype)
        score = score if value(score).dim() == 2 else call(aten.reshape.default, score, [batch, tokens])
        slots = self._constant("routing.slots", torch.arange(rule.slots))
        if rule.budget is None:
            chosen = call(SELECT, score, valid, slots)
        else:
            threshold = self._threshold(core.threshold, dtype, call)
            if core.score in plan.surprises and plan.surprises[core.score].kind == "gate":
                threshold = rank_threshold(threshold, call)
            budget = self._constant("routing.budget", torch.tensor(rule.budget))
            state = self._constant("routing.state", torch.zeros(batch, 2, dtype=torch.int64))
            chosen = call(SELECT_BUDGET, score, valid, threshold, budget, state, slots)
        return call(operator.getitem, chosen, 0), call(operator.getitem, chosen, 1), score

    def _gate(self, rank: Node, surprise: Surprise, index: Node, old: Node) -> Node:
        """Return the slots' gates, or ranks, in the layout of what takes them out."""

        def call(target: Any, *args: object) -> Node:
            return self.edit.call(target, args, before=old, like=old)

        rows = call(GATHER, rank, index)
        rows = gate_of(rows, call) if surprise.kind == "gate" else rows
        wanted = value(old)
        rows = rows if value(rows).dtype == wanted.dtype else call(aten.to.dtype, rows, wanted.dtype)
        return rows if wanted.dim() == 2 else call(aten.reshape.default, rows, list(wanted.shape))

    def _threshold(self, threshold: Node | float | None, dtype: torch.dtype, call: Any) -> Node:
        if not isinstance(threshold, Node):
            return self._constant("routing.threshold", torch.tensor(threshold, dtype=dtype))
        node: Node = self.edit.copy_of(threshold)
        node = node if value(node).dtype == dtype else call(aten.to.dtype, node, dtype)
        return node if value(node).dim() < 2 else call(aten.reshape.default, node, [1])

    def _behind(self, nodes: list[Node]) -> Node:
        """Return the node before which everything that needs these is inserted."""
        wanted = set(nodes)
        node: Node
        for node in self.edit.graph.nodes:
            if not wanted and node.op != "placeholder":
                return node
            wanted.discard(node)
        raise ValueError("these nodes are not all in the graph")

    def _constant(self, stem: str, tensor: torch.Tensor) -> Node:
        key = (stem, str(tensor.tolist()))
        if key not in self.constants:
            self.constants[key] = self.edit.add_constant(self.edit.free_constant_name(stem), tensor)
        return self.constants[key]

    def _stand_in(self, old: Node, new: Node) -> None:
        """Let the users of an index, or of the bits, read the operator's."""
        copy = self.edit.copy_of(old)
        wanted = value(copy)
        place = self._behind([copy, new])
        node = new
        if wanted.dim() > 2:
            sizes = [*value(new).shape, *([1] * (wanted.dim() - 2))]
            node = self.edit.call(aten.reshape.default, (node, sizes), before=place, like=copy)
            if value(node).shape != wanted.shape:
                node = self.edit.call(aten.expand.default, (node, list(wanted.shape)), before=place, like=copy)
        if value(node).dtype != wanted.dtype:
            node = self.edit.call(aten.to.dtype, (node, wanted.dtype), before=place, like=copy)
        self.edit.replace(copy, node)

    def _rebuilt(self, old: Node, role: Role, index: Node, taken: Node, score: Node) -> None:
        """Make a matrix, bits of tokens or scores of slots, which something else needs, of the index."""
        copy = self.edit.copy_of(old)
        place = self._behind([copy, index])
        dtype, (batch, tokens) = value(copy).dtype, value(score).shape

        def call(target: Any, *args: object) -> Node:
            return self.edit.call(target, args, before=place, like=copy)

        if role is Role.SCORES:
            node = call(GATHER, score, index)
        elif role is Role.BITS:
            none = self._constant("routing.none", torch.zeros(batch, tokens, dtype=torch.bool))
            node = call(SCATTER, none, index, taken, taken)
        else:
            places = self._constant("routing.places", torch.arange(tokens))
            hits = call(aten.eq.Tensor, call(aten.unsqueeze.default, index, 2), places)
            node = call(aten.logical_and.default, hits, call(aten.unsqueeze.default, taken, 2))
            node = node if role is Role.MATRIX else call(aten.transpose.int, node, 1, 2)
        node = node if value(node).dtype == dtype else call(aten.to.dtype, node, dtype)
        self.edit.replace(copy, node)

    def _gather(self, move: Move, index: Node, place: Node) -> Node:
        source = self.edit.copy_of(move.source)
        if move.table and value(source).dim() == 2 and value(source).dtype.is_floating_point:
            return self.edit.call(aten.embedding.default, (source, index), before=place, like=place)  # one plain Gather
        if move.table:
            return self.edit.call(aten.index.Tensor, (source, [index]), before=place, like=place)
        batch = value(index).shape[0]
        if value(source).shape[0] != batch:
            sizes = [batch, *value(source).shape[1:]]
            source = self.edit.call(aten.expand.default, (source, sizes), before=place, like=place)
        return self.edit.call(GATHER, (source, index), before=place, like=place)

    def _put(self, item: Written, index: Node, taken: Node) -> None:
        old, rows = self.edit.copy_of(item.put.node), self.edit.copy_of(item.rows)

        def call(target: Any, *args: object) -> Node:
            return self.edit.call(target, args, before=old, like=old)

        if item.put.base is None:
            like = value(old)
            base = self.edit.call(
                aten.full.default, (list(like.shape), 0.0), {"dtype": like.dtype}, before=old, like=old
            )
        else:
            base = self.edit.copy_of(item.put.base)
            if item.way is Way.ADD:
                rows = call(aten.add.Tensor, call(GATHER, base, index), rows)
        if value(rows).dtype != value(base).dtype:
            rows = call(aten.to.dtype, rows, value(base).dtype)
        self.edit.replace(old, call(SCATTER, base, index, taken, rows), keep_name=True)
