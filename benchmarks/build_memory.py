"""Peak memory of TensorRT-RTX building a transformer, next to what was predicted, for each precision of the weights.

The transformer is written node by node with random weights: RMSNorm, attention, SwiGLU, rows of 128 tokens. In ``int8``
weights (by column) and operands are quantised, in ``int4`` weights alone, in blocks of 32; the rest is float16. No GPU
is needed; nothing is run.

Prints one JSON object a precision: ``peak`` and ``predicted`` (margin included) in bytes, and ``fitted``, the
prediction without its margin over the peak.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from depthwire.runtime._batch_profile import open_batch
from depthwire.runtime._build_process import BuildRequest, spawn
from depthwire.runtime._onnx_graph import read_graph
from depthwire.runtime.target import load_target

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
LENGTH, VOCABULARY, HEADS, BLOCK = 128, 16_000, 8, 32
_DTYPES: dict[str, Any] = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16}


class Graph:
    """A transformer in the making."""

    def __init__(self, precision: str) -> None:
        """Start with nothing; ``precision`` is one of ``PRECISIONS``."""
        self.precision = precision
        self.dtype: Any = _DTYPES.get(precision, np.float16)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)
        self._operands: dict[str, str] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node and return its result."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, array: NDArray[Any]) -> str:
        """Append a constant and return its name."""
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def weight(self, *shape: int) -> str:
        """Append random weights that are not quantised."""
        return self.constant((self._rng.standard_normal(shape, dtype=np.float32) * 0.02).astype(self.dtype))

    def linear(self, x: str, rows: int, columns: int) -> str:
        """Append a product with weights in the precision asked for."""
        if self.precision not in {"int8", "int4"}:
            return self.op("MatMul", x, self.weight(rows, columns))
        narrow: Any = np.int8 if self.precision == "int8" else ml_dtypes.int4
        whole = self.constant(self._rng.integers(-7, 8, (rows, columns)).astype(narrow))
        if self.precision == "int4":
            scales = self.constant(np.full((rows // BLOCK, columns), 0.01, self.dtype))
            return self.op("MatMul", x, self.op("DequantizeLinear", whole, scales, axis=0, block_size=BLOCK))
        scales = self.constant(np.full(columns, 0.01, self.dtype))
        return self.op("MatMul", self._quantised(x), self.op("DequantizeLinear", whole, scales, axis=1))

    def _quantised(self, x: str) -> str:
        if x not in self._operands:
            scale, zero = self.constant(np.array(0.05, self.dtype)), self.constant(np.array(0, np.int8))
            narrow = self.op("QuantizeLinear", x, scale, zero)
            self._operands[x] = self.op("DequantizeLinear", narrow, scale, zero)
        return self._operands[x]

    def save(self, folder: Path, out: str, width: int) -> Path:
        """Write the model with its weights beside it."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1, LENGTH])
        logits = helper.make_tensor_value_info(out, kind, [1, LENGTH, width])
        graph = helper.make_graph(self.nodes, "transformer", [ids], [logits], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights", size_threshold=1024)
        return folder / "model.onnx"


def transformer(folder: Path, precision: str, layers: int, width: int) -> Path:
    """Write a pre-norm transformer: SwiGLU of four times the width, an untied head."""
    graph = Graph(precision)
    op, linear = graph.op, graph.linear
    split = graph.constant(np.array([1, LENGTH, HEADS, width // HEADS]))
    joined = graph.constant(np.array([1, LENGTH, width]))
    mask = graph.constant(np.triu(np.full((LENGTH, LENGTH), -1e4), 1)[None, None].astype(graph.dtype))
    x = op("Gather", graph.weight(VOCABULARY, width), "ids")
    for _ in range(layers):
        y = op("RMSNormalization", x, graph.weight(width), axis=-1)
        q, k, v = (op("Transpose", op("Reshape", linear(y, width, width), split), perm=[0, 2, 1, 3]) for _ in range(3))
        scores = op("Add", op("MatMul", q, op("Transpose", k, perm=[0, 1, 3, 2])), mask)
        mixed = op("Transpose", op("MatMul", op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        x = op("Add", x, linear(op("Reshape", mixed, joined), width, width))
        y = op("RMSNormalization", x, graph.weight(width), axis=-1)
        gate = linear(y, width, 4 * width)
        inner = op("Mul", op("Mul", gate, op("Sigmoid", gate)), linear(y, width, 4 * width))
        x = op("Add", x, linear(inner, 4 * width, width))
    return graph.save(folder, op("MatMul", x, graph.weight(width, VOCABULARY)), VOCABULARY)


def measure(precision: str, layers: int, width: int, max_batch: int | None) -> dict[str, object]:
    """Build once and return what it took; with ``max_batch`` for every batch up to it."""
    memory = load_target("rtx").memory
    if memory is None:
        raise SystemExit("the target has no memory model")
    with tempfile.TemporaryDirectory() as folder:
        model = transformer(Path(folder), precision, layers, width)
        facts = read_graph(model)
        profile = {}
        if max_batch is not None:
            opened = open_batch(model)
            profile = opened.profile(max_batch)
            model.write_bytes(opened.model.SerializeToString())
        log = Path(folder, "log")
        request = BuildRequest(str(model), str(Path(folder, "engine")), ("SM86",), profile=profile)
        result = spawn(request, log=log, kept_log=log, estimated_seconds=1.0)
    predicted = memory.predict(
        weight_bytes=facts.weight_bytes, products=facts.products, nodes=facts.nodes, open_sizes=max_batch is not None
    )
    return {
        "precision": precision,
        "layers": layers,
        "width": width,
        "max_batch": max_batch,
        "nodes": facts.nodes,
        "products": facts.products,
        "weights": facts.weight_bytes,
        "peak": result.peak_rss_bytes,
        "predicted": predicted,
        "fitted": round(predicted / memory.margin / result.peak_rss_bytes, 3),
        "engine": result.bytes,
        "seconds": round(result.seconds, 1),
    }


def main() -> None:
    """Measure the precisions that are named, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("precisions", nargs="*", default=PRECISIONS, help=", ".join(PRECISIONS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--max-batch", type=int)
    arguments = parser.parse_args()
    for precision in arguments.precisions:
        print(json.dumps(measure(precision, arguments.layers, arguments.width, arguments.max_batch)), flush=True)


if __name__ == "__main__":
    main()
