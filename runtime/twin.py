"""The fp32 twin of a graph of another precision: the same graph and the same stored weights, computed in fp32.

ONNX Runtime's CPU provider has no bfloat16 products, computes float16 in fp32, and fuses 8- and 4-bit products into
kernels of its own arithmetic, so it says nothing of an engine's numerics. It can say that the file's structure is
right: every half-precision type of the file is made float32, the weights are widened or multiplied by their scales, and
what then runs must agree with the twin of the program to fp32 rounding. Inputs of layers are not rounded to int8 in
either twin: a value half-way between two integers would fall to either side. (Their scales are compared with the
program's when the file is written: ``export/census.py``.)
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from depthwire.artifact import GOLDENS, MODEL, Artifact

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir


@contextlib.contextmanager
def twin_of(artifact: Artifact, *, rounding: bool = False) -> Iterator[Artifact]:
    """Write the twin of an artefact's graph beside it, and remove it afterwards.

    Args:
        artifact: Of any precision; ``with_graph`` chooses the graph.
        rounding: Keep the rounding of layers' inputs to int8: for goldens, which the rounded model made.

    Yields:
        An artefact with the twin as its model and the same goldens; for a graph of fp32, the artefact itself.
    """
    if artifact.manifest.precision is None:
        yield artifact
        return
    import onnx_ir

    model = onnx_ir.load(artifact.model)
    widen(model)
    multiply_out(model, rounding=rounding)
    root = artifact.root.resolve()
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.twin-") as folder:
        onnx_ir.save(model, Path(folder) / MODEL, external_data=f"{MODEL}.data")
        if artifact.path(GOLDENS).is_file():
            (Path(folder) / GOLDENS).hardlink_to(artifact.path(GOLDENS))
        manifest = artifact.manifest.model_copy(deep=True)
        manifest.files, manifest.kernels, manifest.engines = {}, None, {}
        yield Artifact(Path(folder), manifest)


def widen(model: ir.Model) -> None:
    """Make every float16 and bfloat16 of a model float32, in place."""
    import onnx_ir

    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for value in graph.initializers.values():
            if value.const_value is not None and _is_low(value.const_value.dtype):
                value.const_value = _widened(value.const_value)
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            values += node.outputs
            for name, attribute in list(node.attributes.items()):
                if attribute.is_ref():
                    continue
                if node.op_type == "Cast" and name == "to" and _is_low(onnx_ir.DataType(attribute.as_int())):
                    node.attributes[name] = onnx_ir.AttrInt64(name, int(onnx_ir.DataType.FLOAT))
                elif attribute.type == onnx_ir.AttributeType.TENSOR and _is_low(attribute.as_tensor().dtype):
                    node.attributes[name] = onnx_ir.AttrTensor(name, _widened(attribute.as_tensor()))
        for value in values:
            if value.dtype is not None and _is_low(value.dtype):
                value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)


def multiply_out(model: ir.Model, *, rounding: bool = False) -> None:
    """Replace quantised weights by their fp32 values and, unless it is kept, drop the rounding of inputs, in place."""
    import onnx_ir

    graph = model.graph
    for node in [node for node in graph if node.op_type == "DequantizeLinear" and node.domain == ""]:
        integers = node.inputs[0]
        rounded = None if integers is None else integers.producer()
        if rounded is not None and rounding:
            continue
        source = None if rounded is None else rounded.inputs[0]
        if source is None:
            source = _product(node)
            graph.register_initializer(source)
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], source)
        graph.remove(node, safe=True)
    for node in [node for node in graph if node.op_type == "QuantizeLinear" and node.domain == "" and not rounding]:
        graph.remove(node, safe=True)
    used = {value for node in graph for value in node.inputs} | set(graph.outputs)
    for name in [
        name for name, value in graph.initializers.items() if value not in used and not value.is_graph_input()
    ]:
        del graph.initializers[name]


def _product(node: ir.Node) -> ir.Value:
    """Return the weight that a ``DequantizeLinear`` computes from initializers."""
    import numpy as np
    import onnx_ir

    integers, scales = (value.const_value for value in node.inputs[:2] if value is not None)
    if integers is None or scales is None:
        raise ValueError(f"{node.name} dequantises no initializer")
    axis, block = (node.attributes.get_int(name, default) for name, default in (("axis", 1), ("block_size", 0)))

    def read() -> ir.TensorProtocol:
        values = np.asarray(integers.numpy()).astype(np.float32)
        factors = np.asarray(scales.numpy(), dtype=np.float32)
        if block:
            factors = np.repeat(factors, block, axis=axis)
        elif factors.ndim:
            factors = factors.reshape([-1 if place == axis % values.ndim else 1 for place in range(values.ndim)])
        return onnx_ir.Tensor(values * factors)

    shape = onnx_ir.Shape(tuple(int(size) for size in integers.shape.numpy()))
    return onnx_ir.Value(
        name=f"{node.name}.fp32",
        shape=shape,
        type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
        const_value=onnx_ir.LazyTensor(read, dtype=onnx_ir.DataType.FLOAT, shape=shape),
    )


def _is_low(dtype: ir.DataType) -> bool:
    return dtype.name in ("FLOAT16", "BFLOAT16")


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    import numpy as np
    import onnx_ir

    def read() -> ir.TensorProtocol:
        return onnx_ir.Tensor(np.asarray(tensor.numpy()).astype(np.float32), name=tensor.name)

    shape = onnx_ir.Shape(tuple(int(size) for size in tensor.shape.numpy()))
    return onnx_ir.LazyTensor(read, dtype=onnx_ir.DataType.FLOAT, shape=shape, name=tensor.name)
