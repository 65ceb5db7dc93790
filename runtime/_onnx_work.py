"""What the products of an ONNX graph cost: floating-point operations, and the bytes of keys and values.

A multiplication with its addition counts as two operations, as is usual. Counted are MatMul, Gemm, Einsum, Conv and
Attention, inside function bodies too; norms, activations and the moving of tokens are not products and count nothing.
Attention counts every query with every key, masked or not: that is what is computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from depthwire.runtime._onnx_shapes import Graph, ints_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from onnx import FunctionProto, NodeProto

    from depthwire.runtime._onnx_shapes import Shape

# Through these a value of keys or values is traced back to where it is smallest, which is what a cache would hold.
_MOVES = frozenset({"Transpose", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Tile", "Identity", "Mul"})
# Between a product of queries with keys and its softmax, and between that and the product with the values.
_BETWEEN = frozenset(
    {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Reshape", "Identity", "Softcap", "Tanh", "Squeeze", "Unsqueeze"}
)


@dataclass(frozen=True)
class Attended:
    """The parts of an attention that is spelled as two products around a softmax.

    Attributes:
        scores: Names of the products of queries with keys.
        mixes: Names of the products of weights with values.
    """

    scores: frozenset[str]
    mixes: frozenset[str]

    @property
    def all(self) -> frozenset[str]:
        """The results of both kinds."""
        return self.scores | self.mixes


def find_attention(graph: Graph) -> Attended:
    """Find attention in a graph that has no operator for it, by its softmax."""
    users: dict[str, list[NodeProto]] = {}
    for node in graph.nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)
    scores: set[str] = set()
    mixes: set[str] = set()
    for node in graph.nodes:
        if node.op_type == "Softmax" and not node.domain:
            before = _reached([graph.producers.get(node.input[0])], lambda at: _sources(at, graph))
            after = _reached(users.get(node.output[0], []), lambda at: users.get(at.output[0], []))
            pair = [{at.output[0] for at in side if _joins_tokens(at, graph)} for side in (before, after)]
            if all(pair):
                scores |= pair[0]
                mixes |= pair[1]
    return Attended(frozenset(scores), frozenset(mixes))


def _sources(node: NodeProto, graph: Graph) -> list[NodeProto | None]:
    return [graph.producers.get(name) for name in node.input]


def _reached(start: Iterable[NodeProto | None], following: object) -> list[NodeProto]:
    found: list[NodeProto] = []
    stack = list(start)
    seen: set[str] = set()
    while stack:
        node = stack.pop()
        if node is None or not node.output or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        if node.op_type == "MatMul":
            found.append(node)
        elif node.op_type in _BETWEEN:
            stack += following(node)  # type: ignore[operator]
    return found


def _joins_tokens(node: NodeProto, graph: Graph) -> bool:
    """Tell whether neither operand of a product is a weight."""
    return all(graph.origin(name) not in graph.constants for name in node.input)


def key_value_bytes(node: NodeProto, graph: Graph, attended: Attended) -> list[tuple[int, str]]:
    """Return the bytes and the name of what an attention reads as keys, or as values, as few as they are stored in."""
    if node.op_type == "Attention" and not node.domain:
        return [_stored(name, graph) for name in node.input[1:3]]
    return [_stored(node.input[1], graph)] if node.output and node.output[0] in attended.all else []


def _stored(name: str, graph: Graph) -> tuple[int, str]:
    best = (graph.bytes_of(name), name)
    while name in graph.producers and graph.producers[name].op_type in _MOVES:
        node = graph.producers[name]
        if node.op_type == "Mul" and graph.count(node.input[1]) > 1:
            break
        name = node.input[0]
        best = min(best, (graph.bytes_of(name), name), key=lambda pair: pair[0])
    return best


@dataclass
class Counter:
    """Counts the operations of nodes; bodies of functions are inferred once for each shape of their inputs."""

    graph: Graph
    _functions: dict[tuple[str, str], FunctionProto] = field(default_factory=dict)
    _bodies: dict[object, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look up the functions."""
        self._functions = {(function.domain, function.name): function for function in self.graph.model.functions}

    def flops(self, node: NodeProto) -> int:
        """Return the floating-point operations of one node's products."""
        if (node.domain, node.op_type) in self._functions:
            return self._called(node)
        if node.domain not in ("", "ai.onnx"):
            return 0
        shapes = [self.graph.shapes.get(name, ()) for name in node.input]
        return product_flops(node, shapes, self.graph.shapes[node.output[0]])

    def _called(self, node: NodeProto) -> int:
        key = (node.domain, node.op_type, tuple(self.graph.shapes.get(name, ()) for name in node.input))
        if key not in self._bodies:
            function = self._functions[node.domain, node.op_type]
            self._bodies[key] = self._body(node, function) if _multiplies(function) else 0
        return self._bodies[key]

    def _body(self, node: NodeProto, function: FunctionProto) -> int:
        """Return the operations of a body: of a model with this one call, inlined."""
        import onnx
        from onnx import helper, inliner

        inputs = [
            helper.make_tensor_value_info(name, self.graph.types[name], list(self.graph.shapes[name]))
            for name in dict.fromkeys(node.input)
            if name
        ]
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
        graph = helper.make_graph([node], "call", inputs, outputs)
        model = helper.make_model(
            graph, functions=[function], opset_imports=self.graph.model.opset_import, ir_version=10
        )
        flat = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model), data_prop=True).graph
        known = {
            info.name: tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
            for info in (*flat.value_info, *flat.input, *flat.output)
        }
        return sum(
            product_flops(inner, [known.get(name, ()) for name in inner.input], known[inner.output[0]])
            for inner in flat.node
        )


def _multiplies(function: FunctionProto) -> bool:
    return any(node.op_type in _PRODUCTS for node in function.node)


_PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum", "Conv", "Attention"})


def product_flops(node: NodeProto, shapes: Sequence[Shape], out: Shape) -> int:
    """Return the operations of one standard operator; 0 for what is no product."""
    kind = node.op_type
    if kind == "MatMul":
        return 2 * math.prod(out) * shapes[0][-1]
    if kind == "Gemm":
        inner = shapes[0][0 if (ints_of(node, "transA") or [0])[0] else 1]
        return 2 * math.prod(out) * inner
    if kind == "Conv":
        return 2 * math.prod(out) * math.prod(shapes[1][1:])
    if kind == "Einsum":
        return 2 * _einsum_loops(node, shapes)
    if kind == "Attention":
        return _attention_flops(node, shapes)
    return 0


def _einsum_loops(node: NodeProto, shapes: Sequence[Shape]) -> int:
    equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation")
    sizes: dict[str, int] = {}
    for term, shape in zip(equation.split("->")[0].split(","), shapes, strict=True):
        sizes.update(zip(term.strip(), shape, strict=False))
    return math.prod(sizes.values()) if len(shapes) > 1 else 0


def _attention_flops(node: NodeProto, shapes: Sequence[Shape]) -> int:
    """Standard ``Attention``, with operands ``[B, H, T, D]`` or ``[B, T, H·D]``; past keys come before the others."""
    query, key, value = shapes[:3]
    past = shapes[4][-2] if len(shapes) > 4 and shapes[4] else 0
    keys = key[-2] + past
    if len(query) == 4:
        batch, heads, queries, width = query
        value_width = value[3]
    else:
        batch, queries, joined = query
        heads = (ints_of(node, "q_num_heads") or [1])[0]
        width = joined // heads
        value_width = value[2] // (ints_of(node, "kv_num_heads") or [1])[0]
    return 2 * batch * heads * queries * keys * (width + value_width)
