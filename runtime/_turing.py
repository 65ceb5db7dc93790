"""Small float32 products as sums of products, for Turing GPUs, on which TensorRT-RTX multiplies in float16 alone.

A float16 graph keeps two kinds of float32 products: those inside the bodies of the operators that read AttnRes sources,
and those of routers, which give a score or two for each token. Both are dot products with few columns, so
``ReduceSum(a[..., M, K, 1] · b[..., 1, K, N])`` over K costs them little. Larger ones stay, and the build is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthwire.runtime._onnx_shapes import DOMAIN, read_shapes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from onnx import ModelProto, NodeProto

TURING = "SM75"

MOST_COLUMNS = 16
"""Columns of a product outside function bodies that is still written as a sum."""


def without_small_products(model: ModelProto, small: frozenset[str]) -> ModelProto:
    """Return the graph with products in bodies, and those of the main graph that are named, written as sums.

    Args:
        model: The graph; it is changed.
        small: Names of results, from ``small_products``.
    """
    for function in model.functions:
        if function.domain == DOMAIN:
            nodes = list(_summed(function.node, None))
            del function.node[:]
            function.node.extend(nodes)
    nodes = list(_summed(model.graph.node, small))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def small_products(path: Path) -> Mapping[str, str]:
    """Return the float32 products of a file's main graph with few columns: name of the result -> name of the node."""
    import onnx

    graph = read_shapes(path)
    return {
        node.output[0]: node.name or node.output[0]
        for node in graph.nodes
        if node.op_type == "MatMul"
        and graph.types[node.output[0]] == onnx.TensorProto.FLOAT
        and graph.shapes[node.output[0]][-1] <= MOST_COLUMNS
    }


def _summed(nodes: Iterable[NodeProto], names: frozenset[str] | None) -> Iterable[NodeProto]:
    from onnx import TensorProto, helper

    def integer(name: str, value: int) -> NodeProto:
        tensor = helper.make_tensor(name, TensorProto.INT64, [1], [value])
        return helper.make_node("Constant", [], [name], name=name, value=tensor)

    for node in nodes:
        if node.op_type != "MatMul" or node.domain or (names is not None and node.output[0] not in names):
            yield node
            continue
        out = node.output[0]
        wide, tall, terms = f"{out}.left", f"{out}.right", f"{out}.terms"
        axes = {name: f"{out}.{name}" for name in ("last", "rows", "inner")}
        yield integer(axes["last"], -1)
        yield integer(axes["rows"], -3)
        yield integer(axes["inner"], -2)
        yield helper.make_node("Unsqueeze", [node.input[0], axes["last"]], [wide], name=wide)
        yield helper.make_node("Unsqueeze", [node.input[1], axes["rows"]], [tall], name=tall)
        yield helper.make_node("Mul", [wide, tall], [terms], name=terms)
        yield helper.make_node("ReduceSum", [terms, axes["inner"]], [out], name=node.name or out, keepdims=0)
