"""What an ONNX graph needs memory for: its weights by what they are for, and the most that its values take at once.

Only the graph is read; weights in external files stay where they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from depthwire.runtime._onnx_graph import GraphFacts, read_graph, tensor_bytes
from depthwire.runtime._onnx_shapes import DOMAIN, Graph, item_size, read_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


# Through these a value is the same numbers, so that what a product reads is traced back to a weight, and a result to
# the product it came from.
_SAME = frozenset({"Transpose", "Reshape", "Cast", "CastLike", "Identity", "DequantizeLinear", "Squeeze", "Unsqueeze"})
# Their results are the memory of their first input.
_VIEWS = frozenset({"Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Einsum"})
_QUANTISES = frozenset({"QuantizeLinear", "DequantizeLinear"})
_FLOAT = 1  # TensorProto.FLOAT
_FLOAT32 = 4  # bytes of it
_MODULE_KEY = "depthwire.module"


@dataclass(frozen=True)
class Weights:
    """The weights of a graph, by what another precision would make of them.

    Attributes:
        linear: Elements of the weights of linear layers, two-dimensional, which int8 and int4-weights quantise.
        channels: Their output channels: one scale each in int8.
        embedding: Elements of embeddings, and of an output head; they are never quantised.
        rest: Elements of all other floating-point weights: norms, queries, stacked experts, convolutions, tables.
        fixed: Bytes of what is no floating-point number.
        stored: Bytes of everything as it is in the file, scales too.
        linear_stored: Of these, the bytes of the weights of linear layers.
    """

    linear: int
    channels: int
    embedding: int
    rest: int
    fixed: int
    stored: int
    linear_stored: int


@dataclass(frozen=True)
class Selection:
    """One TopK, or one selection of tokens that has a TopK in its body.

    Attributes:
        node: Name of the node.
        module: Module of the model that it comes from, empty where the file does not say.
        k: How many values it returns, of one window.
        of: Of how many.
    """

    node: str
    module: str
    k: int
    of: int


@dataclass(frozen=True)
class ModelFacts:
    """What the memory of an engine follows from.

    Attributes:
        path: The ONNX file.
        graph: Nodes, products and bytes, for the builder's side.
        weights: Its weights.
        floating: Bytes of an element of most floating-point weights: 4 or 2.
        brain: Whether most of them are bfloat16.
        calls: Number of calls of function bodies.
        interface: Bytes of inputs without a default, and of outputs.
        peaks: Most bytes that values take at once, and the node at which they do, by the size of a floating-point
            element: 0 (as the file has it), 4 and 2.
        selections: Every selection, in the order of the graph.
    """

    path: Path
    graph: GraphFacts
    weights: Weights
    floating: int
    brain: bool
    calls: int
    interface: int
    peaks: dict[int, tuple[int, str]]
    selections: tuple[Selection, ...]


def read_model(path: Path) -> ModelFacts:
    """Read the facts of an ONNX file with static shapes.

    Raises:
        BuildError: ``build.parse-failed`` or ``runtime.shapes``: it is no ONNX file, or not all shapes are static.
    """
    from onnx import TensorProto

    facts = read_graph(path)
    graph = read_shapes(path)
    weights, kind = _weights(graph, facts.weight_bytes)
    given = [value.name for value in graph.model.graph.input if value.name not in graph.constants]
    functions = {(function.domain, function.name) for function in graph.model.functions}
    return ModelFacts(
        path=path,
        graph=facts,
        weights=weights,
        floating=item_size(kind),
        brain=kind == TensorProto.BFLOAT16,
        calls=sum((node.domain, node.op_type) in functions for node in graph.nodes),
        interface=sum(graph.bytes_of(name) for name in (*given, *graph.outputs)),
        peaks={size: peak(graph, size) for size in (0, 4, 2)},
        selections=tuple(_selections(graph)),
    )


def _weights(graph: Graph, stored: int) -> tuple[Weights, int]:
    """Return the weights by their use, and ONNX's number of the type that most floating-point ones have."""
    tables = {node.input[0] for node in graph.nodes if node.op_type == "Gather" and not node.domain}
    heads = {product for name in graph.outputs if (product := _product_behind(graph, name))}
    channels: dict[str, int] = {}
    for node in graph.nodes:
        if node.op_type in _PRODUCTS and not node.domain:
            for weight in {_origin(graph, name) for name in node.input[:2]} & graph.constants:
                if node.output[0] in heads:
                    tables.add(weight)
                else:
                    channels[weight] = graph.shapes[weight][-1] if graph.shapes[weight] else 1
    scales = {name for node in graph.nodes if node.op_type in _QUANTISES for name in node.input[1:2]}
    count = dict.fromkeys(("linear", "channels", "embedding", "rest"), 0)
    kinds = {_FLOAT: 0}
    movable = linear_stored = 0
    for tensor in graph.model.graph.initializer:
        name, elements, size = tensor.name, math.prod(tensor.dims), tensor_bytes(tensor)
        floating = _is_float(tensor.data_type)
        # Experts that are stacked, and convolutions, are never quantised.
        if name in channels and name not in tables and len(tensor.dims) == 2:
            count["linear"] += elements
            count["channels"] += channels[name]
            linear_stored += size
        elif floating and name in tables and len(tensor.dims) > 1:
            count["embedding"] += elements
        elif floating and name not in scales:
            count["rest"] += elements
        elif name not in scales:
            continue
        if floating:
            kinds[tensor.data_type] = kinds.get(tensor.data_type, 0) + elements
        movable += size
    weights = Weights(**count, fixed=stored - movable, stored=stored, linear_stored=linear_stored)
    return weights, max(kinds, key=lambda kind: kinds[kind])


def _origin(graph: Graph, name: str) -> str:
    while name in graph.producers and graph.producers[name].op_type in _SAME:
        name = graph.producers[name].input[0]
    return name


def _product_behind(graph: Graph, name: str) -> str | None:
    """Return the result of the product that a value is, but for its form and the adding of a bias."""
    while name in graph.producers:
        node = graph.producers[name]
        if node.op_type in _PRODUCTS:
            return str(node.output[0])
        if node.op_type == "Add":
            found = [each for each in node.input if each not in graph.constants]
            if len(found) != 1:
                return None
            name = found[0]
        elif node.op_type in _SAME:
            name = node.input[0]
        else:
            return None
    return None


def peak(graph: Graph, floating: int = 0) -> tuple[int, str]:
    """Return the most bytes that values of a graph take at once, and the node at which they do.

    Nodes run in the order of the file; a value lives from the node that makes it to the last one that reads it. A view
    (Reshape and the like) is the memory of what it views. A call of a function body is one operator that needs, beside
    its results, its inputs once more in float32: a body widens them, and nothing is said of how it is fused. Inputs and
    outputs of the graph have memory of their own and are not counted, nor are weights.

    Args:
        graph: The graph.
        floating: Bytes of an element of float32, float16 and bfloat16 values; 0 for what each of them has.
    """
    home: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type in _VIEWS and not node.domain:
            home[node.output[0]] = home.get(node.input[0], node.input[0])
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        for name in (*node.input, *node.output):
            last[home.get(name, name)] = index
    own = {home.get(name, name) for name in graph.outputs} | graph.constants
    own |= {value.name for value in graph.model.graph.input}
    functions = {(function.domain, function.name) for function in graph.model.functions}
    ends: dict[int, list[str]] = {}
    for name, index in last.items():
        ends.setdefault(index, []).append(name)
    size_of = _sizes(graph, floating)
    live = most = 0
    where = ""
    held: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        for name in node.output:
            if name and name not in home and name not in own:
                held[name] = size_of(name)
                live += held[name]
        scratch = 0
        if (node.domain, node.op_type) in functions:
            scratch = _FLOAT32 * sum(graph.count(name) for name in {*node.input} - graph.constants if name)
        if live + scratch > most:
            most, where = live + scratch, node.name or node.output[0]
        live -= sum(held.pop(name, 0) for name in ends.get(index, ()))
    return most, where


def _sizes(graph: Graph, floating: int) -> Callable[[str], int]:
    def size(name: str) -> int:
        if floating and _is_float(graph.types[name]):
            return graph.count(name) * floating
        return graph.bytes_of(name)

    return size


def _selections(graph: Graph) -> Iterator[Selection]:
    """Return every TopK and every token selection that has one in its body; K is read off the shapes."""
    for node in graph.nodes:
        module = next((entry.value for entry in node.metadata_props if entry.key == _MODULE_KEY), "")
        if node.op_type == "TopK" and not node.domain:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)
            yield Selection(node.name, module, graph.shapes[node.output[0]][axis], graph.shapes[node.input[0]][axis])
        elif node.domain == DOMAIN and node.op_type.startswith("SelectTokens_"):
            tokens, slots = graph.shapes[node.input[0]][1], graph.shapes[node.output[0]][1]
            window = next((attribute.i for attribute in node.attribute if attribute.name == "window"), 0) or tokens
            yield Selection(node.name, module, slots * window // tokens, window)


def _is_float(elem_type: int) -> bool:
    from onnx import TensorProto

    return elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
