"""What an engine builder must know of an ONNX file before it is let near it: sizes, and nodes that would kill it.

Only the graph is read; weights in external files stay where they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from depthwire.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

# Domains whose operators a TensorRT parser knows itself.
_BUILT_IN_DOMAINS = frozenset({"", "ai.onnx", "trt"})
_MATRIX_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Einsum"})
_SUB_BYTE_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}

_CHECKED_DTYPES = frozenset(
    {"FLOAT", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT4E2M1", "INT64", "INT32", "INT8", "UINT8", "INT4", "BOOL"}
)

_Key = tuple[str, str]


@dataclass(frozen=True)
class GraphFacts:
    """Facts of an ONNX graph, function bodies and subgraphs included.

    Attributes:
        nodes: Number of nodes once every call of a function is replaced by its body.
        products: Number of matrix products outside function bodies.
        weight_bytes: Bytes of all initialisers and constants, tied ones counted once per initialiser.
        attention: Names of standard ``Attention`` nodes; those in a body read ``domain::Function/node``.
        without_body: Names of custom nodes for which the file carries no function, with the operator.
        float32_products: Names of matrix products of which an operand is known to be float32.
    """

    nodes: int
    products: int
    weight_bytes: int
    attention: tuple[str, ...]
    without_body: tuple[str, ...]
    float32_products: tuple[str, ...]


@dataclass
class _Walk:
    functions: dict[_Key, FunctionProto]
    sizes: dict[_Key, int] = field(default_factory=dict)
    attention: list[str] = field(default_factory=list)
    without_body: list[str] = field(default_factory=list)
    weight_bytes: int = 0

    def count(self, nodes: Iterable[NodeProto], prefix: str) -> int:
        return sum(self._count_node(node, prefix) for node in nodes)

    def _count_node(self, node: NodeProto, prefix: str) -> int:
        name = prefix + (node.name or next(iter(node.output), node.op_type))
        key = (node.domain, node.op_type)
        self.weight_bytes += sum(map(tensor_bytes, _tensors(node.attribute)))
        inner = sum(self._count_graph(graph, prefix) for graph in _subgraphs(node))
        if key in self.functions:
            return inner + self._count_function(key)
        if node.domain not in _BUILT_IN_DOMAINS:
            self.without_body.append(f"{name} ({node.domain}::{node.op_type})")
        elif node.op_type == "Attention":
            self.attention.append(name)
        return inner + 1

    def _count_graph(self, graph: GraphProto, prefix: str) -> int:
        self.weight_bytes += sum(map(tensor_bytes, graph.initializer))
        return self.count(graph.node, prefix)

    def _count_function(self, key: _Key) -> int:
        if key not in self.sizes:
            self.sizes[key] = 0  # ONNX forbids recursion; a file that has it must not hang us
            self.sizes[key] = self.count(self.functions[key].node, f"{key[0]}::{key[1]}/")
        return self.sizes[key]


def read_graph(path: Path) -> GraphFacts:
    """Read the facts of an ONNX file.

    Args:
        path: The ``.onnx`` file; its external data is neither needed nor read.

    Raises:
        BuildError: ``build.parse-failed`` when the file is missing or is not ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model: ModelProto = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise BuildError(
            "build.parse-failed",
            "The ONNX file cannot be read",
            at=str(path),
            want="an ONNX model",
            got=str(error) or type(error).__name__,
            todo="Convert the model again.",
        ) from error
    graph = model.graph
    walk = _Walk({(function.domain, function.name): function for function in model.functions})
    walk.weight_bytes = sum(map(tensor_bytes, graph.initializer))
    nodes = walk.count(graph.node, "")
    return GraphFacts(
        nodes=nodes,
        products=sum(node.op_type in _MATRIX_PRODUCTS for node in graph.node),
        weight_bytes=walk.weight_bytes,
        attention=tuple(walk.attention),
        without_body=tuple(walk.without_body),
        float32_products=tuple(_float32_products(graph)),
    )


def named_dtypes(model: Path) -> dict[str, str]:
    """Return ONNX's names of the types of inputs, outputs, values and weights of the main graph, where known."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(str(model), load_external_data=False)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    names = {name: onnx.TensorProto.DataType.Name(kind) for name, kind in types.items()}
    return {name: kind for name, kind in names.items() if kind in _CHECKED_DTYPES}


def _float32_products(graph: GraphProto) -> Iterator[str]:
    from onnx import TensorProto

    typed = [*graph.input, *graph.output, *graph.value_info]
    float32 = {value.name for value in typed if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    float32 |= {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for node in graph.node:
        if node.op_type in _MATRIX_PRODUCTS and not float32.isdisjoint([*node.input, *node.output]):
            yield node.name or node.output[0]


def tensor_bytes(tensor: TensorProto) -> int:
    """Return the bytes of a tensor's data; two elements of a four-bit type share one."""
    import onnx

    count: int = math.prod(tensor.dims)
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    if kind in _SUB_BYTE_BITS:
        return -(-count * _SUB_BYTE_BITS[kind] // 8)
    if kind in {"STRING", "UNDEFINED"}:
        return int(tensor.ByteSize())
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _tensors(attributes: Iterable[AttributeProto]) -> Iterator[TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
