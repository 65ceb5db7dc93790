"""Small ONNX models written node by node, and artefacts around them, for the tests of the engine builder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from depthwire.artifact import MODEL, REPORT, Artifact, Manifest, SourceInfo, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

OPSETS = (("", 23), ("depthwire", 1))


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Sequence[onnx.TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    external: bool = False,
) -> Path:
    """Write a model; with ``external`` its weights go to a file beside it."""
    model = helper.make_model(
        helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(weights)),
        functions=list(functions),
        opset_imports=[helper.make_opsetid(*opset) for opset in OPSETS],
        ir_version=10,
    )
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    else:
        onnx.save(model, path)
    return path


def value(name: str, *shape: int, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """Describe a graph input or output."""
    return helper.make_tensor_value_info(name, dtype, list(shape))


def read_function() -> onnx.FunctionProto:
    """Return the body of ``depthwire::Read(a, b) = softmax(a) * b``, two nodes."""
    body = [
        helper.make_node("Softmax", ["a"], ["s"], name="softmax", axis=-1),
        helper.make_node("Mul", ["s", "b"], ["o"], name="product"),
    ]
    return helper.make_function("depthwire", "Read", ["a", "b"], ["o"], body, [helper.make_opsetid("", 23)])


def tiny(folder: Path, *, dtype: type[np.floating[Any]] = np.float32, body: bool = True, width: int = 32) -> Path:
    """RMSNormalization, one matrix product, and two calls of a function: 4 nodes, 6 with the bodies expanded."""
    rng = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("RMSNormalization", ["x", "gain"], ["n"], name="norm", axis=-1),
        helper.make_node("MatMul", ["n", "weight"], ["m"], name="product"),
        helper.make_node("Read", ["m", "x"], ["r"], name="read_0", domain="depthwire"),
        helper.make_node("Read", ["r", "x"], ["y"], name="read_1", domain="depthwire"),
    ]
    weights = [
        numpy_helper.from_array(rng.standard_normal((width, width)).astype(dtype), "weight"),
        numpy_helper.from_array(np.ones(width, dtype), "gain"),
    ]
    x, y = (value(name, 1, 8, width, dtype=kind) for name in "xy")
    functions = [read_function()] if body else []
    return save(folder / MODEL, nodes, inputs=[x], outputs=[y], weights=weights, functions=functions, external=True)


def attention(folder: Path, *, in_body: bool = False) -> Path:
    """One ``Attention`` node, in the graph or in a function's body."""
    node = helper.make_node("Attention", ["x", "x", "x"], ["y"], name="attention_0", is_causal=1)
    functions = []
    if in_body:
        opset = [helper.make_opsetid("", 23)]
        functions = [helper.make_function("depthwire", "Block", ["x"], ["y"], [node], opset)]
        node = helper.make_node("Block", ["x"], ["y"], name="block", domain="depthwire")
    x, y = (value(name, 1, 4, 16, 16) for name in "xy")
    return save(folder / MODEL, [node], inputs=[x], outputs=[y], functions=functions)


def unsupported(folder: Path) -> Path:
    """A ScatterElements with a reduction, which the TensorRT-RTX parser does not take."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="fine"),
        helper.make_node("ScatterElements", ["r", "i", "x"], ["y"], name="scatter_sum", axis=1, reduction="add"),
    ]
    index = numpy_helper.from_array(np.zeros((1, 8), np.int64), "i")
    return save(folder / MODEL, nodes, inputs=[value("x", 1, 8)], outputs=[value("y", 1, 8)], weights=[index])


class _Graph:
    """Nodes and random weights of a transformer in the making."""

    def __init__(self, dtype: type[np.floating[Any]]) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"{kind.lower()}_{name}", **attributes))
        return name

    def constant(self, array: npt.NDArray[Any]) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant((self._rng.standard_normal(shape, dtype=np.float32) * 0.02).astype(self.dtype))


def transformer(
    folder: Path,
    *,
    layers: int,
    width: int,
    hidden: int,
    vocabulary: int,
    length: int = 128,
    heads: int = 8,
    dtype: type[np.floating[Any]] = np.float32,
) -> Path:
    """A pre-norm transformer with random weights: 28 nodes a layer, of which 9 are matrix products."""
    graph, per_head = _Graph(dtype), width // heads
    op, weight, constant = graph.op, graph.weight, graph.constant
    split = constant(np.array([1, length, heads, per_head], np.int64))
    joined = constant(np.array([1, length, width], np.int64))
    low = -1e4 if dtype is np.float16 else -1e9
    mask = constant(np.triu(np.full((length, length), low, dtype), 1)[None, None])
    scale = constant(np.array(per_head**-0.5, dtype))
    x = op("Gather", weight(vocabulary, width), "ids")
    for _ in range(layers):
        y = op("RMSNormalization", x, weight(width), axis=-1)
        q, k, v = (
            op("Transpose", op("Reshape", op("MatMul", y, weight(width, width)), split), perm=[0, 2, 1, 3])
            for _ in range(3)
        )
        scores = op("Mul", op("MatMul", q, op("Transpose", k, perm=[0, 1, 3, 2])), scale)
        mixed = op("MatMul", op("Softmax", op("Add", scores, mask), axis=-1), v)
        merged = op("Reshape", op("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
        x = op("Add", x, op("MatMul", merged, weight(width, width)))
        y = op("RMSNormalization", x, weight(width), axis=-1)
        gate = op("MatMul", y, weight(width, hidden))
        inner = op("Mul", op("Mul", gate, op("Sigmoid", gate)), op("MatMul", y, weight(width, hidden)))
        x = op("Add", x, op("MatMul", inner, weight(hidden, width)))
    logits = op("MatMul", x, weight(width, vocabulary))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return save(
        folder / MODEL,
        graph.nodes,
        inputs=[value("ids", 1, length, dtype=TensorProto.INT64)],
        outputs=[value(logits, 1, length, vocabulary, dtype=kind)],
        weights=graph.weights,
        external=True,
    )


def artifact_of(folder: Path) -> Artifact:
    """Write a manifest and a report for the ``model.onnx`` in a folder, and load the whole with its checks."""
    model = onnx.load(folder / MODEL, load_external_data=False)

    def infos(values: Sequence[onnx.ValueInfoProto]) -> list[TensorInfo]:
        found = []
        for item in values:
            tensor = item.type.tensor_type
            dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
            found.append(TensorInfo(name=item.name, shape=[d.dim_value for d in tensor.shape.dim], dtype=dtype))
        return found

    manifest = Manifest(
        depthwire="0.1.0",
        created="2026-01-01T00:00:00Z",
        source=SourceInfo(kind="module", reference="tests"),
        recipe={},
        inputs=infos(model.graph.input),
        outputs=infos(model.graph.output),
        opsets=dict(OPSETS),
    )
    artifact = Artifact(folder, manifest)
    (folder / REPORT).write_text(json.dumps({"stages": []}), encoding="utf-8")
    for path in sorted(folder.iterdir()):
        artifact.add_file(path.name)
    artifact.write_manifest()
    return Artifact.load(folder)
