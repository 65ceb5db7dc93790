"""Where a graph chooses tokens: from the place where computed rows are put back, to the score that chose them.

::

    score, threshold, padding mask  ──►  top-k, comparisons, prefix sums, sorts  ──►  index, bits, 0/1 matrix
                   roots                                 core                               ▼
                                                                         put: scatter, index_put, M' @ rows

The core is everything between: integers and bits, and the floating-point values that only carry them. Which rule it
computes is not decided here (``token_rules``); here it is cut out.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind

from depthwire.passes._match import CASTS, VIEWS, argument, aten, is_call, is_float, scalar, value

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Node = torch.fx.Node

TOP = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
_RANKS = (*TOP, aten.kthvalue.default)
_COMPARES = tuple(
    getattr(getattr(aten, name), kind) for name in ("ge", "gt", "le", "lt") for kind in ("Tensor", "Scalar")
)
_COPIES = (aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default)
_CARRIES = (
    # What may carry integers and bits in floating point.
    *CASTS,
    *VIEWS,
    *_COPIES,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.cumsum.default,
    aten.matmul.default,
    aten.scatter.value,
    aten.scatter.src,
)
_PARTS = (aten.select.int, aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim, aten.amin.default)
_SHAPES = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default)
_SCATTERS = (aten.scatter.src, aten.scatter_add.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class Core:
    """How an index or a matrix is made of scores.

    Attributes:
        score: What tokens are ranked by or compared.
        threshold: What scores are compared with: a node, a number, or nothing.
        masks: Values that are given, not computed from states, and take part: which tokens are padding.
        nodes: Everything between.
        shapes: States whose shape alone is looked at.
    """

    score: Node
    threshold: Node | float | None
    masks: tuple[Node, ...]
    nodes: frozenset[Node]
    shapes: frozenset[Node]


@dataclass(frozen=True)
class Put:
    """Where computed rows are put back.

    Attributes:
        node: The result ``[B, T, …]``.
        base: What the other tokens keep; ``None`` for zeros.
        index: The index ``[B, K, …]`` or the matrix ``[B, T, K]``.
        rows: ``[B, K, …]``.
        adds: Whether rows are added to the base's.
        matrix: Whether ``index`` is a matrix.
    """

    node: Node
    base: Node | None
    index: Node
    rows: Node
    adds: bool
    matrix: bool


@dataclass
class Given:
    """What a program is given besides floating-point states: constants, buffers, integer and boolean inputs."""

    exported: ExportedProgram
    tensors: dict[Node, torch.Tensor] = field(default_factory=dict)
    nodes: set[Node] = field(default_factory=set)
    inputs: set[Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Sort the placeholders, and collect what is computed from these alone."""
        exported = self.exported
        known = {**exported.constants, **exported.state_dict}
        specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                if spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                    self.tensors[node] = known[str(spec.target)]
                    self.nodes.add(node)
                elif spec.kind is InputKind.USER_INPUT and not is_float(node):
                    self.nodes.add(node)
                    self.inputs.add(node)
            elif node.op == "call_function" and node.all_input_nodes and self.nodes.issuperset(node.all_input_nodes):
                self.nodes.add(node)
                if not self.inputs.isdisjoint(node.all_input_nodes):
                    self.inputs.add(node)  # depends on an input: no constant


def find_puts(graph: torch.fx.Graph) -> list[Put]:
    """Return every place where rows might be put back into states ``[B, T, …]``, in graph order."""
    puts = []
    for node in graph.nodes:
        if node.op != "call_function" or not is_float(node) or value(node).dim() < 3:
            continue
        if is_call(node, *_SCATTERS) and int(node.args[1]) == 1 and isinstance(node.args[3], Node):
            base, _, index, rows = node.args
            puts.append(Put(node, base, index, rows, node.target is aten.scatter_add.default, matrix=False))
        elif is_call(node, aten.index_put.default) and len(node.args[1]) == 2 and None not in node.args[1]:
            adds = bool(argument(node, 3, "accumulate", default=False))
            puts.append(Put(node, node.args[0], node.args[1][1], node.args[2], adds, matrix=False))
        elif is_call(node, *_PRODUCTS) and all(value(operand).dim() == 3 for operand in node.args):
            matrix, rows = node.args
            whole = [user for user in node.users if _adds(user, node)]
            if len(node.users) == 1 and whole:
                base = next(operand for operand in whole[0].args if operand is not node)
                puts.append(Put(whole[0], base, matrix, rows, adds=True, matrix=True))
            else:
                puts.append(Put(node, None, matrix, rows, adds=True, matrix=True))
    return puts


def _adds(user: Node, node: Node) -> bool:
    if not is_call(user, aten.add.Tensor) or argument(user, 2, "alpha", 1) != 1 or len(user.all_input_nodes) != 2:
        return False
    return all(value(operand).shape == value(node).shape for operand in user.all_input_nodes)


def core_of(start: Node, given: Given) -> Core | None:
    """Return what an index or matrix is made of, ``None`` unless it comes from scores through ranks or comparisons."""
    walk = _Walk(given)
    if not walk.back(start) or len(walk.scores) != 1 or len(walk.thresholds) > 1:
        return None
    threshold = next(iter(walk.thresholds), None)
    order = {node: place for place, node in enumerate(start.graph.nodes)}
    masks = tuple(sorted(walk.masks, key=order.__getitem__))
    return Core(next(iter(walk.scores)), threshold, masks, frozenset(walk.nodes), frozenset(walk.shapes))


@dataclass
class _Walk:
    given: Given
    scores: set[Node] = field(default_factory=set)
    thresholds: set[Node | float] = field(default_factory=set)
    masks: set[Node] = field(default_factory=set)
    nodes: set[Node] = field(default_factory=set)
    shapes: set[Node] = field(default_factory=set)

    def back(self, start: Node) -> bool:
        """Go back to the roots; tell whether everything on the way belongs to a choice."""
        stack: list[Any] = [start]
        while stack:
            node = stack.pop()
            if node in self.nodes:
                continue
            if node in self.given.nodes:
                if node in self.given.inputs:
                    self.masks.add(node)
                continue
            if node.op != "call_function":
                return False
            self.nodes.add(node)
            if is_call(node, *_SHAPES):
                self.shapes.add(node.args[0])
            elif is_call(node, *_RANKS) and is_float(node.args[0]):
                stack += self._scores(node.args[0])
            elif is_call(node, *_COMPARES) and is_float(node.args[0]):
                stack += self._compared(node)
            elif isinstance(value(node), torch.Tensor) and is_float(node) and not is_call(node, *_CARRIES):
                return False
            else:
                stack += node.all_input_nodes
        return True

    def _compared(self, node: Node) -> list[Node]:
        found: list[Node] = []
        for operand in node.args[:2]:
            number = scalar(operand)
            if number is not None:
                self.thresholds.add(number)
            elif isinstance(operand, Node) and value(operand).numel() == 1 and value(node).numel() > 1:
                self.thresholds.add(operand)
            elif isinstance(operand, Node):
                found += self._scores(operand)
        return found

    def _scores(self, node: Any) -> list[Node]:
        """Take off what puts padding behind the other tokens; return what else is needed for it."""
        needed: list[Node] = []
        while True:
            ranked = _ranked(node)
            if ranked is not None:  # the k-th value itself
                self.nodes.update(ranked)
                return [*needed, ranked[-1].args[0]] if isinstance(ranked[-1].args[0], Node) else needed
            masked = self._masked(node)
            if masked is None:
                self.scores.add(node)
                return needed
            self.nodes.add(node)
            node, others = masked
            needed += others

    def _masked(self, node: Node) -> tuple[Node, list[Node]] | None:
        """Return the operand that is a state, and the given ones, of a value made of both."""
        if not is_call(
            node, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther,
            aten.where.ScalarSelf, aten.add.Tensor, aten.sub.Tensor
        ):  # fmt: skip
            return None
        states = [operand for operand in node.all_input_nodes if operand not in self.given.nodes]
        others = [operand for operand in node.all_input_nodes if operand in self.given.nodes]
        if (
            len(states) != 1
            or not self.given.inputs.intersection(others)
            or value(states[0]).shape != value(node).shape
        ):
            return None
        return states[0], others


def _ranked(node: Any) -> list[Node] | None:
    """Return the way from a value back to a ranking whose values it takes, ``None`` if there is none."""
    way = []
    while is_call(
        node, aten.select.int, aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim, aten.amin.default
    ):
        way.append(node)
        node = node.args[0]
    if is_call(node, operator.getitem) and node.args[1] == 0 and is_call(node.args[0], *_RANKS):
        return [*way, node]
    return None


def padding_roots(masks: tuple[Node, ...], given: Given, shape: tuple[int, int]) -> list[Node]:
    """Return the values ``[B, T]`` of which all these are made, the nearest first: what may say which tokens count.

    Args:
        masks: What takes part in a choice.
        given: What the program is given.
        shape: (B, T).
    """
    chains = [_chain(mask, given) for mask in masks]
    shared = [node for node in chains[0] if all(node in chain for chain in chains)]
    return [node for node in shared if tuple(value(node).shape) == shape and not is_float(node)]


def path_from(root: Node, mask: Node, given: Given) -> list[Node]:
    """Return the operations that lead from a root to a mask, in order."""
    chain = _chain(mask, given)
    return chain[: chain.index(root)][::-1]


def _chain(mask: Node, given: Given) -> list[Node]:
    """Return a mask and what it is made of, as long as that is one value."""
    chain = [mask]
    while chain[-1].op == "call_function":
        operands = [node for node in chain[-1].all_input_nodes if node in given.inputs]
        if len(operands) != 1:
            break
        chain.append(operands[0])
    return chain
