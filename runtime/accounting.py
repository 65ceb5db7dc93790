"""What a routed graph computes, by layer, against the same graph over all tokens.

Everything is read off the ONNX file: K from the slots of each selection, the work of every product from its shapes, and
the work that all T tokens would have cost from the axes that run over selected tokens (``_token_axes``). What scores
the tokens, and what a dense model has not (routers, priors), is counted apart.

Counts are of what is *computed*: all K slots, whether a token has taken them or not. How many were taken is known
only after a call (``runtime.routed``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from depthwire.runtime._onnx_shapes import Graph, read_shapes
from depthwire.runtime._onnx_work import Counter, find_attention, key_value_bytes
from depthwire.runtime._token_axes import GATHER, SELECT, is_own, product_axes, token_axes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from onnx import NodeProto

    from depthwire.artifact import Artifact

_MODULE_KEY = "depthwire.module"
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_ROUTE = "route."  # prefix of the names of all that the routing pass adds


@dataclass(frozen=True)
class Work:
    """An amount of work.

    Attributes:
        flops: Floating-point operations of all products, attention's among them.
        attention_flops: Those of queries with keys and of weights with values.
        kv_bytes: Bytes of the keys and values that are attended to.
    """

    flops: int = 0
    attention_flops: int = 0
    kv_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.attention_flops + other.attention_flops,
            self.kv_bytes + other.kv_bytes,
        )

    def as_dict(self) -> dict[str, int]:
        """Return JSON-ready values."""
        return {"flops": self.flops, "attention_flops": self.attention_flops, "kv_bytes": self.kv_bytes}


@dataclass(frozen=True)
class Selected:
    """One selection of tokens.

    Attributes:
        layer: Number of the layer, ``None`` where its module has none.
        module: Path of the module.
        tokens: T.
        slots: K.
        taken: Name of the value ``[B, K]`` that says which slots hold a selected token.
        state: Name of the value ``[B, 2]`` with the counts behind the last token; ``None`` without a running budget.
    """

    layer: int | None
    module: str
    tokens: int
    slots: int
    taken: str
    state: str | None


@dataclass(frozen=True)
class LayerWork:
    """The work of one layer, or of all that belongs to none.

    Attributes:
        layer: Its number, ``None`` for what belongs to no layer.
        tokens: T, or 0 where nothing is selected.
        computed: K of its selections, the least if there are several; 0 where nothing is selected.
        spent: What is computed.
        dense: What it would be over all tokens.
        routing: Operations of routers, priors and scores, which are not in ``spent``.
    """

    layer: int | None
    tokens: int
    computed: int
    spent: Work
    dense: Work
    routing: int

    @property
    def ratio(self) -> float:
        """Operations, with those of the routing, relative to the dense layer's; 1 for a layer without products."""
        return (self.spent.flops + self.routing) / self.dense.flops if self.dense.flops else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "layer": self.layer,
            "tokens": self.tokens or None,
            "computed": self.computed or None,
            **self.spent.as_dict(),
            "routing_flops": self.routing,
            **{f"dense_{name}": value for name, value in self.dense.as_dict().items()},
            "ratio": self.ratio,
        }


@dataclass(frozen=True)
class Account:
    """The work of one call of a graph.

    Attributes:
        layers: By number.
        rest: What belongs to no layer: embeddings, the head.
        selections: In the order of the graph.
    """

    layers: tuple[LayerWork, ...]
    rest: LayerWork
    selections: tuple[Selected, ...]

    @property
    def total(self) -> LayerWork:
        """Everything together."""
        parts = (*self.layers, self.rest)
        spent = sum((part.spent for part in parts), Work())
        dense = sum((part.dense for part in parts), Work())
        return LayerWork(None, 0, 0, spent, dense, sum(part.routing for part in parts))

    @property
    def layers_ratio(self) -> float:
        """As ``LayerWork.ratio``, of all layers without the rest."""
        dense = sum(part.dense.flops for part in self.layers)
        return sum(part.spent.flops + part.routing for part in self.layers) / dense if dense else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "layers": [layer.as_dict() for layer in self.layers],
            "rest": self.rest.as_dict(),
            "total": self.total.as_dict(),
            "layers_ratio": self.layers_ratio,
        }


def account_graphs(artifact: Artifact) -> list[dict[str, Any]]:
    """Return the work of every graph of a routed artefact, JSON-ready; of others nothing.

    Raises:
        BuildError: ``runtime.shapes``.
    """
    route = artifact.manifest.route
    return [
        {"file": graph.file, "capacity": graph.capacity, **account(artifact.path(graph.file)).as_dict()}
        for graph in ([] if route is None else route.graphs)
    ]


@dataclass
class _Tally:
    spent: Work = field(default_factory=Work)
    dense: Work = field(default_factory=Work)
    routing: int = 0


def account(model: Path) -> Account:
    """Count the work of an ONNX file.

    Args:
        model: The file; its weights are not read.

    Raises:
        BuildError: ``runtime.shapes``.
    """
    graph = read_shapes(model)
    selections = find_selections(graph)
    shares = [Fraction(one.tokens, one.slots) for one in selections]
    axes = token_axes(graph, [one.slots for one in selections])
    counter, attended = Counter(graph), find_attention(graph)
    kept = _reaches_outputs(graph)
    whole_products = {
        (layer_of(node), weight)
        for node in graph.nodes
        if (weight := _weight(node, graph)) and not product_axes(node, graph, axes)
    }
    tallies: dict[int | None, _Tally] = {None: _Tally()}
    for node in graph.nodes:
        flops = counter.flops(node)
        stored = key_value_bytes(node, graph, attended)
        if not flops and not stored:
            continue
        tally = tallies.setdefault(layer_of(node), _Tally())
        if node.output[0] not in kept or any(name.startswith(_ROUTE) for name in node.input):
            tally.routing += flops
            continue
        attends = bool(stored)
        loops = product_axes(node, graph, axes)
        # What runs on all tokens and again on the selected ones a dense model runs once.
        again = bool(loops) and (layer_of(node), _weight(node, graph)) in whole_products
        dense = 0 if again else _scaled(flops, [shares[of] for of in loops])
        tally.spent += Work(flops, flops * attends, sum(count for count, _ in stored))
        whole = sum(_scaled(count, [shares[of] for of in axes.get(name, {}).values()]) for count, name in stored)
        tally.dense += Work(dense, dense * attends, whole)
    parts = {layer: _layer(layer, tally, selections) for layer, tally in tallies.items()}
    numbered = sorted(layer for layer in parts if layer is not None)
    return Account(tuple(parts[layer] for layer in numbered), parts[None], selections)


def _layer(layer: int | None, tally: _Tally, selections: tuple[Selected, ...]) -> LayerWork:
    own = [one for one in selections if one.layer == layer and layer is not None]
    return LayerWork(
        layer=layer,
        tokens=max((one.tokens for one in own), default=0),
        computed=min((one.slots for one in own), default=0),
        spent=tally.spent,
        dense=tally.dense,
        routing=tally.routing,
    )


def _scaled(count: int, shares: list[Fraction]) -> int:
    """Return a count over all tokens in place of the selected ones; exact, as every marked axis is a multiple of K."""
    whole = Fraction(count)
    for share in shares:
        whole *= share
    return int(whole)


def _weight(node: NodeProto, graph: Graph) -> str | None:
    """Return the name of the weight that a product multiplies by."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    return next((name for name in map(graph.origin, node.input[:2]) if name in graph.constants), None)


def find_selections(graph: Graph) -> tuple[Selected, ...]:
    """Return the selections of a graph in its order."""
    found = []
    for node in graph.nodes:
        if is_own(node, SELECT):
            state = node.output[2] if len(node.output) > 2 and node.output[2] else None
            tokens, slots = graph.shapes[node.input[0]][1], graph.shapes[node.output[0]][1]
            found.append(Selected(layer_of(node), _module(node), tokens, slots, node.output[1], state))
    return tuple(found)


def layer_of(node: NodeProto) -> int | None:
    """Return the number of the layer that a node belongs to: the first number in its module's path."""
    match = _LAYER.search(_module(node))
    return int(match[1]) if match else None


def _module(node: NodeProto) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == _MODULE_KEY), "")


def _reaches_outputs(graph: Graph) -> frozenset[str]:
    """Return the values that results depend on otherwise than by what is selected: the others only score tokens."""
    scores: Mapping[str, NodeProto] = {node.input[0]: node for node in graph.nodes if is_own(node, SELECT)}
    kept: set[str] = set()
    stack = list(graph.outputs)
    while stack:
        name = stack.pop()
        if name in kept:
            continue
        kept.add(name)
        node = graph.producers.get(name)
        if node is None or is_own(node, SELECT):
            continue
        kept.update(output for output in node.output if output)
        # Gates are made of gathered scores.
        gate = is_own(node, GATHER) and node.input[0] in scores
        stack += [operand for operand in node.input if operand and not (gate and operand == node.input[0])]
    return frozenset(kept)
