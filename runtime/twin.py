"""The fp32 twin of a graph in half precision: the same graph and the same stored weights, computed in fp32.

ONNX Runtime's CPU provider has no bfloat16 products and computes float16 in fp32, so it says nothing of half-precision
numerics. It can say that the file's structure is right: every half-precision type of the file is made float32, the
weights are widened, and what then runs must agree with the twin of the program to fp32 rounding.
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
def twin_of(artifact: Artifact) -> Iterator[Artifact]:
    """Write the twin of an artefact's graph beside it, and remove it afterwards.

    Args:
        artifact: Of any precision; ``with_graph`` chooses the graph.

    Yields:
        An artefact with the twin as its model and the same goldens; where nothing is in half precision, the artefact
        itself.
    """
    if artifact.manifest.precision is None or artifact.manifest.precision.rest == "fp32":
        yield artifact
        return
    import onnx_ir

    model = onnx_ir.load(artifact.model)
    widen(model)
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


def _is_low(dtype: ir.DataType) -> bool:
    return dtype.name in ("FLOAT16", "BFLOAT16")


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    import numpy as np
    import onnx_ir

    def read() -> ir.TensorProtocol:
        return onnx_ir.Tensor(np.asarray(tensor.numpy()).astype(np.float32), name=tensor.name)

    shape = onnx_ir.Shape(tuple(int(size) for size in tensor.shape.numpy()))
    return onnx_ir.LazyTensor(read, dtype=onnx_ir.DataType.FLOAT, shape=shape, name=tensor.name)
