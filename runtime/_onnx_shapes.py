"""Every value of an ONNX graph with its shape and the size of its elements; weights in external files stay there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from depthwire.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from onnx import ModelProto, NodeProto, ValueInfoProto

DOMAIN = "depthwire"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """A graph to be read.

    Attributes:
        nodes: In the order of computation.
        shapes: Of every value; all of them static.
        types: ONNX's number of the type of every value.
        constants: Names of initialisers; those of graph inputs among them.
        producers: The node that computes a value.
        outputs: Names of the graph's results.
        model: What all of it was read from.
    """

    nodes: tuple[NodeProto, ...]
    shapes: Mapping[str, Shape]
    types: Mapping[str, int]
    constants: frozenset[str]
    producers: Mapping[str, NodeProto]
    outputs: tuple[str, ...]
    model: ModelProto

    def count(self, name: str) -> int:
        """Return the number of elements of a value."""
        return math.prod(self.shapes[name])

    def origin(self, name: str) -> str:
        """Return what a value is a view or a copy of."""
        while name in self.producers and self.producers[name].op_type in ("Transpose", "Reshape", "Cast"):
            name = self.producers[name].input[0]
        return name

    def bytes_of(self, name: str) -> int:
        """Return the bytes of a value."""
        return self.count(name) * item_size(self.types[name])


def read_shapes(path: Path) -> Graph:
    """Read a graph and infer the shapes that its file leaves out.

    Raises:
        BuildError: ``runtime.shapes``: it is no ONNX file, or not all of its shapes are static.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(path), load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (DecodeError, OSError, onnx.shape_inference.InferenceError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    shapes: dict[str, Shape] = {}
    types: dict[str, int] = {}
    for info in (*inferred.value_info, *inferred.input, *inferred.output):
        shape = _static(info)
        if shape is not None:
            shapes[info.name] = shape
            types[info.name] = info.type.tensor_type.elem_type
    for tensor in inferred.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
        types[tensor.name] = tensor.data_type
    nodes = tuple(model.graph.node)
    unknown = [name for node in nodes for name in node.output if name and name not in shapes]
    if unknown:
        raise _unreadable(path, f"no static shape of {', '.join(unknown[:4])}")
    return Graph(
        nodes=nodes,
        shapes=shapes,
        types=types,
        constants=frozenset(tensor.name for tensor in model.graph.initializer),
        producers={name: node for node in nodes for name in node.output if name},
        outputs=tuple(output.name for output in model.graph.output),
        model=model,
    )


def item_size(elem_type: int) -> int:
    """Return the bytes of one element of an ONNX type; types below a byte count as one."""
    import onnx

    if elem_type in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
        return 1
    return int(onnx.helper.tensor_dtype_to_np_dtype(elem_type).itemsize)


def ints_of(node: NodeProto, name: str) -> list[int] | None:
    """Return an attribute that is a list of integers, or one integer, as a list."""
    for attribute in node.attribute:
        if attribute.name == name:
            return list(attribute.ints) or [attribute.i]
    return None


def _static(info: ValueInfoProto) -> Shape | None:
    tensor = info.type.tensor_type
    if not tensor.HasField("shape") or any(not dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None
    return tuple(dim.dim_value for dim in tensor.shape.dim)


def _unreadable(path: Path, got: str) -> BuildError:
    return BuildError(
        "runtime.shapes",
        "The work of the graph cannot be counted",
        at=str(path),
        want="an ONNX file whose values all have static shapes",
        got=got,
        todo="Convert the model again.",
    )
