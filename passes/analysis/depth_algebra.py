"""Finds every AttnRes read in a graph by its mathematics, not by one spelling of it.

Each node gets what it holds in the normal form of ``depth_values``, forwards through the graph, in one walk. A value
may be described in more than one way (a normalised branch output is a source times its inverse root mean square, and a
source of its own), so a node has a few alternatives. What ends up as a whole ``Mix`` is a read. A softmax over depth
that ends in none is declined, with the reason that was met first.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import CASTS, TRANSPARENT, aten, is_call, value
from depthwire.passes.analysis.depth_axes import is_identity, sizes
from depthwire.passes.analysis.depth_constants import Constants
from depthwire.passes.analysis.depth_layout import EXPANSIONS, PERMUTATIONS, RESHAPES, has_queries, root
from depthwire.passes.analysis.depth_ops import TRANSFERS
from depthwire.passes.analysis.depth_product import Context
from depthwire.passes.analysis.depth_softmax import last_bias
from depthwire.passes.analysis.depth_stacks import BY_DEPTH, WRITES, Alternatives, buffer, joined, tuple_of
from depthwire.passes.analysis.depth_values import (
    Banks,
    Difference,
    Dot,
    Exp,
    ExpSum,
    Gauge,
    Level,
    Logits,
    LogSoft,
    Mix,
    Read,
    Soft,
    Source,
    Tainted,
    Term,
    Value,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_MOST = 4
_VIEWS = (*RESHAPES, *PERMUTATIONS, *EXPANSIONS)


@dataclass(frozen=True)
class Anchor:
    """A softmax over depth that is no read.

    Attributes:
        node: The softmax (or sigmoid).
        reason: Last part of the decline's code.
        at: Where the reason was met.
    """

    node: torch.fx.Node
    reason: str
    at: torch.fx.Node


@dataclass(frozen=True)
class DepthAlgebra:
    """What was found in a graph.

    Attributes:
        reads: What a node holds, for each node that holds (a view of) reads.
        lanes: For each node that takes one source out of several again, that source.
        anchors: What was declined.
        constants: The constant part of the graph.
    """

    reads: dict[torch.fx.Node, Read]
    lanes: dict[torch.fx.Node, Source]
    anchors: list[Anchor]
    constants: Constants


def find_reads(exported: ExportedProgram) -> DepthAlgebra:
    """Walk through a graph once; linear in its nodes and in the sources of its stacks."""
    return _Walk(exported).result()


class _Walk:
    def __init__(self, exported: ExportedProgram) -> None:
        self._graph = exported.graph
        self._constants = Constants(exported)
        self._banks = Banks()
        self._values: dict[torch.fx.Node, Alternatives] = {}
        self._tuples: dict[torch.fx.Node, list[Alternatives]] = {}
        self._softmaxes: dict[torch.fx.Node, set[Logits]] = {}
        self._anchors: dict[torch.fx.Node, Anchor] = {}
        self._failures: dict[Logits, tuple[str, torch.fx.Node]] = {}

    def result(self) -> DepthAlgebra:
        for node in self._graph.nodes:
            if node.op in ("call_function", "placeholder") and node not in self._constants:
                self._visit(node)
        reads: dict[torch.fx.Node, Read] = {}
        lanes: dict[torch.fx.Node, Source] = {}
        for node, alternatives in self._values.items():
            for term in alternatives:
                if not isinstance(term, Term):
                    continue
                mix = term.mix
                if mix is not None and _is_read(term):
                    reads.setdefault(node, Read(term, mix))
                elif self._is_lane(node, term):
                    lanes.setdefault(node, term.over.sources[0])
        return DepthAlgebra(reads, lanes, self._declined(reads), self._constants)

    def _visit(self, node: torch.fx.Node) -> None:
        val = value(node)
        context = Context(node, self._constants, self._banks, self._failures)
        if not isinstance(val, torch.Tensor):
            if isinstance(val, (list, tuple)) and node.op == "call_function":
                self._tuples[node] = tuple_of(context, self._alternatives)
            return
        if not val.dtype.is_floating_point:
            return
        found = self._transfer(context) if node.op == "call_function" else []
        self._note_softmax(node, found)
        self._values[node] = self._settled(context, found)

    def _transfer(self, context: Context) -> list[Value]:
        node = context.node
        if is_call(node, operator.getitem):
            source: Any = node.args[0]
            items = self._tuples.get(source)
            return list(items[node.args[1]]) if items is not None else []  # type: ignore[index]
        if is_call(node, *BY_DEPTH):
            return joined(context, self._alternatives)
        if is_call(node, *WRITES):
            return buffer(context, self._alternatives)
        transfer = TRANSFERS.get(node.target)
        if transfer is None:
            return self._pointwise(context)
        inputs = [argument for argument in node.all_input_nodes if argument not in self._constants]
        choices = [self._operands(node, argument) for argument in inputs]
        found: list[Value] = []
        for chosen in itertools.islice(itertools.product(*choices), 4 * _MOST):
            result = transfer(context, dict(zip(inputs, chosen, strict=True)))
            found += result
        return found

    def _pointwise(self, context: Context) -> list[Value]:
        """Return the loss of a value over sources under an operator that is not known, if it may act pointwise."""
        for argument in context.node.all_input_nodes:
            for each in self._alternatives(argument)[:1]:
                if each.deep and sizes(each.dims) == list(value(context.node).shape):
                    return [each if isinstance(each, Tainted) else Tainted(each.dims, "unsupported", context.node)]
        return []

    def _alternatives(self, node: object) -> Alternatives:
        return self._values.get(node, []) if isinstance(node, torch.fx.Node) else []

    def _operands(self, node: torch.fx.Node, argument: torch.fx.Node) -> list[Value | None]:
        """Return what an operand may be. Arithmetic on a read takes the read as it stands."""
        found: list[Value | None] = list(self._alternatives(argument))
        if not is_call(node, *_VIEWS, *TRANSPARENT, aten.select.int, aten.slice.Tensor) and not self._merges(node):
            found = [each for each in found if not (isinstance(each, Term) and _is_read(each))]
        return found or [None]

    def _merges(self, node: torch.fx.Node) -> bool:
        """Tell whether a read may become part of a longer one here: next to weights of parts, or their change."""
        if is_call(node, aten.sub.Tensor):
            return True
        return any(
            isinstance(each, Term) and any(isinstance(factor, _OF_PARTS) for factor, _ in each.factors)
            for argument in node.all_input_nodes
            for each in self._alternatives(argument)
        )

    def _settled(self, context: Context, found: list[Value]) -> Alternatives:
        """Keep the terms, or else what says why there is none; where no depth is, a node is a source as well."""
        node = context.node
        terms: list[Value] = []
        for each in found:
            if isinstance(each, Term) and each not in terms and sizes(each.dims) == list(value(node).shape):
                terms.append(each)
        if not terms:
            terms += [each for each in found if isinstance(each, Tainted) and each.deep][:1]
        if not any(each.deep for each in terms) and all(self._needs_root(node, each) for each in terms):
            terms = [*terms[: _MOST - 1], root(context, node)]
        return terms[:_MOST]

    def _needs_root(self, node: torch.fx.Node, found: Value) -> bool:
        """Tell whether a node is to be a possible source besides what it is made of: not if it just widens one."""
        if not isinstance(found, Term) or has_queries(found.dims):
            return True
        if found.find(Mix) or found.find(Level) or found.find(Difference):
            return True
        if found.find(Gauge) and not (found.find(Exp) or found.find(ExpSum)):
            return True
        if found.find(Dot) or found.find(Soft) or found.find(Exp) or found.power != 1:
            return False
        if not found.pure or found.bank is None:
            return True
        source: Any = node.args[0] if node.args else None
        narrowed = is_call(node, *CASTS) and value(source).dtype.itemsize > value(node).dtype.itemsize
        return narrowed or not is_identity(found.dims, found.bank.shape)

    def _is_lane(self, node: torch.fx.Node, term: Term) -> bool:
        if not term.pure or term.deep or term.bank is None or len(term.bank) != 1 or not node.args:
            return False
        source = term.bank.sources[0]
        if source.blank or source.node is node or not is_identity(term.dims, term.bank.shape):
            return False
        taken = [
            argument for argument in node.all_input_nodes if any(each.deep for each in self._alternatives(argument))
        ]
        first: Any = node.args[0]
        if is_call(node, operator.getitem):
            taken = [each for each in first.all_input_nodes if any(term.deep for term in self._alternatives(each))]
        return bool(taken) and not is_call(node, *BY_DEPTH, aten.copy.default)

    def _note_softmax(self, node: torch.fx.Node, found: list[Value]) -> None:
        """Remember every softmax over depth, and why it has no weights."""
        terms = [each for each in found if isinstance(each, Term)]
        made = {
            factor.logits for each in terms for factor, _ in each.factors if isinstance(factor, (Soft, LogSoft, Mix))
        }
        if is_call(node, *_SOFTMAX):
            if made:
                self._softmaxes[node] = made
            elif found and isinstance(found[0], Tainted):
                self._anchors[node] = Anchor(node, found[0].reason, found[0].node)

    def _declined(self, reads: dict[torch.fx.Node, Read]) -> list[Anchor]:
        done = {read.mix.logits for read in reads.values()}
        for node, made in self._softmaxes.items():
            deep = {logits for logits in made if len(logits.bank) > 1}
            if not deep or deep & done or any(_same(a, b) for a in deep for b in done):
                continue
            biased = [logits for logits in deep if last_bias(logits) is None]
            if biased:
                self._anchors[node] = Anchor(node, "bias-not-last", node)
                continue
            reason, at = next((self._failures[each] for each in deep if each in self._failures), ("values", node))
            self._anchors[node] = Anchor(node, reason, at)
        order = {node: index for index, node in enumerate(self._graph.nodes)}
        return sorted(self._anchors.values(), key=lambda anchor: order[anchor.node])


def _same(a: Logits, b: Logits) -> bool:
    """Tell whether two logits are the same, up to a query that was taken out of several."""
    return a.bank is b.bank and a.query == b.query and a.scale == b.scale and a.bias == b.bias


def _is_read(term: Term) -> bool:
    mix = term.mix
    if mix is None or last_bias(mix.logits) is None:
        return False
    others = [atom for dim in term.dims for atom in dim if not isinstance(atom.axis, int)]
    return len({atom.axis for atom in others}) == len(others) and all(atom.inner == 1 for atom in others)


_OF_PARTS = (Exp, ExpSum, Gauge, Difference)
_SOFTMAX = (
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten.scaled_dot_product_attention.default,
    aten.sigmoid.default,
)
