"""The ``[B, T, H·D]`` form of ``Attention``: what it takes away, what it leaves alone; it computes the same."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from depthwire.export._attention_heads import AttentionHeads
from depthwire.runtime.tolerances import tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH, LENGTH, WIDTH = 2, 5, 8


class Graph:
    """Nodes in the making; ``x`` is ``[B, T, heads·width]``, ``memory`` ``[B, S, …]`` for cross-attention."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.values: list[onnx.ValueInfoProto] = []
        self._rng = np.random.default_rng(0)

    def op(self, kind: str, *inputs: str, shape: tuple[int, ...], name: str = "", **attributes: Any) -> str:
        name = name or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        self.values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def constant(self, array: NDArray[Any]) -> str:
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def heads(self, x: str, width: int, heads: int, length: int = LENGTH, size: int = WIDTH) -> str:
        """Project and split: ``[B, heads, T, size]``."""
        weight = self.constant(self._rng.standard_normal((width, heads * size), dtype=np.float32) / 4)
        rows = self.op("MatMul", x, weight, shape=(BATCH, length, heads * size))
        sizes = self.constant(np.array([BATCH, length, heads, size]))
        apart = self.op("Reshape", rows, sizes, shape=(BATCH, length, heads, size))
        return self.op("Transpose", apart, shape=(BATCH, heads, length, size), perm=[0, 2, 1, 3])

    def rotate(self, x: str, heads: int, **attributes: Any) -> str:
        tables = [self.constant(self._rng.random((BATCH, LENGTH, WIDTH // 2), dtype=np.float32)) for _ in range(2)]
        return self.op("RotaryEmbedding", x, *tables, shape=(BATCH, heads, LENGTH, WIDTH), **attributes)

    def merge(self, x: str, heads: int, size: int = WIDTH, name: str = "") -> str:
        """Transpose back and merge."""
        apart = self.op("Transpose", x, shape=(BATCH, LENGTH, heads, size), perm=[0, 2, 1, 3])
        sizes = self.constant(np.array([BATCH, LENGTH, heads * size]))
        return self.op("Reshape", apart, sizes, shape=(BATCH, LENGTH, heads * size), name=name)

    def model(self, outputs: tuple[tuple[str, tuple[int, ...]], ...], memory: int = 0) -> ir.Model:
        shapes = {"x": (BATCH, LENGTH, 16), **({"memory": (BATCH, memory, 16)} if memory else {})}
        results = [self.op("Tanh", name, name=f"y{n}", shape=shape) for n, (name, shape) in enumerate(outputs)]
        shown = {result: shape for result, (_, shape) in zip(results, outputs, strict=True)}
        inside = [value for value in self.values if value.name not in shown]
        inputs, ends = (
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in group.items()]
            for group in (shapes, shown)
        )
        graph = helper.make_graph(self.nodes, "g", inputs, ends, self.weights, value_info=inside)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return ir.from_proto(model)


def grouped(*, rotary: bool = True, name: str = "", **options: Any) -> ir.Model:
    """Four query heads over two key heads."""
    graph = Graph()
    q, k, v = (graph.heads("x", 16, heads) for heads in (4, 2, 2))
    if rotary:
        q, k = graph.rotate(q, 4), graph.rotate(k, 2, interleaved=1)
    shape = (BATCH, 4, LENGTH, WIDTH)
    out = graph.op("Attention", q, k, v, shape=shape, is_causal=1, **options)
    return graph.model(((graph.merge(out, 4, name=name), (BATCH, LENGTH, 4 * WIDTH)),))


def run(model: ir.Model) -> list[NDArray[np.float32]]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    feed = {item.name: rng.standard_normal(item.shape, dtype=np.float32) for item in session.get_inputs()}
    outputs: list[NDArray[np.float32]] = session.run(None, feed)
    return outputs


def same(model: ir.Model, before: ir.Model) -> bool:
    pairs = zip(run(model), run(before), strict=True)
    return all(np.abs(a - b).max() <= tolerance("float32", "hidden").allowed(float(np.abs(b).max())) for a, b in pairs)


def rewritten(before: ir.Model) -> tuple[ir.Model, Counter[str]]:
    """Return the rewritten model and its operators; it computes the same, and a second run changes nothing."""
    model = before.clone()
    assert AttentionHeads()(model).modified
    RemoveUnusedNodesPass()(model)
    assert not AttentionHeads()(model).modified
    assert same(model, before)
    return model, Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("rotary", [True, False])
def test_heads_are_split_and_merged_by_the_operator(rotary: bool) -> None:
    model, kinds = rewritten(grouped(rotary=rotary, scale=0.3, name="mixed"))
    assert kinds == Counter({"MatMul": 3, "Attention": 1, "Tanh": 1} | ({"RotaryEmbedding": 2} if rotary else {}))
    node = next(node for node in model.graph if node.op_type == "Attention")
    numbers = {name: node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads", "is_causal")}
    assert numbers == {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1}
    assert node.outputs[0].name == "mixed"
    assert node.attributes["scale"].as_float() == pytest.approx(0.3)


def test_cross_attention_with_wider_values_and_a_mask() -> None:
    graph = Graph()
    q = graph.heads("x", 16, 3)
    k, v = graph.heads("memory", 16, 3, length=7), graph.heads("memory", 16, 3, length=7, size=4)
    mask = graph.constant(np.random.default_rng(2).random((LENGTH, 7)) > 0.3)
    out = graph.op("Attention", q, k, v, mask, shape=(BATCH, 3, LENGTH, 4))
    _, kinds = rewritten(graph.model(((graph.merge(out, 3, size=4), (BATCH, LENGTH, 12)),), memory=7))
    assert kinds == Counter({"MatMul": 3, "Attention": 1, "Tanh": 1})


def test_a_norm_between_the_split_and_the_transposition_stays() -> None:
    """As qwen3 has it: the norm of each head wants ``[B, T, H, D]``."""
    graph = Graph()
    q, k, v = (graph.heads("x", 16, 2) for _ in range(3))
    gain = graph.constant(np.linspace(0.5, 1.5, WIDTH, dtype=np.float32))
    swap = next(node for node in graph.nodes if node.output[0] == q)
    normed = graph.op("RMSNormalization", swap.input[0], gain, shape=(BATCH, LENGTH, 2, WIDTH))
    q = graph.op("Transpose", normed, shape=(BATCH, 2, LENGTH, WIDTH), perm=[0, 2, 1, 3])
    out = graph.op("Attention", graph.rotate(q, 2), k, v, shape=(BATCH, 2, LENGTH, WIDTH))
    _, kinds = rewritten(graph.model(((graph.merge(out, 2), (BATCH, LENGTH, 16)),)))
    assert (kinds["Transpose"], kinds["Reshape"], kinds["RMSNormalization"]) == (0, 2, 1)


def test_other_readers_of_the_heads_keep_theirs() -> None:
    graph = Graph()
    q, k, v = (graph.heads("x", 16, 2) for _ in range(3))
    out = graph.op("Attention", q, k, v, shape=(BATCH, 2, LENGTH, WIDTH))
    merged = graph.merge(out, 2)
    apart = next(node.input[0] for node in graph.nodes if node.output[0] == merged)
    ends = ((merged, (BATCH, LENGTH, 16)), (apart, (BATCH, LENGTH, 2, WIDTH)), (k, (BATCH, 2, LENGTH, WIDTH)))
    _, kinds = rewritten(graph.model(ends))
    assert kinds["Transpose"] == 1  # of the keys, for the third output


def untransposed() -> ir.Model:
    graph = Graph()
    q, k, v = (graph.heads("x", 16, 2) for _ in range(3))
    v = graph.op("Tanh", v, shape=(BATCH, 2, LENGTH, WIDTH))
    out = graph.op("Attention", q, k, v, shape=(BATCH, 2, LENGTH, WIDTH))
    return graph.model(((graph.merge(out, 2), (BATCH, LENGTH, 16)),))


def read_as_heads() -> ir.Model:
    graph = Graph()
    q, k, v = (graph.heads("x", 16, 2) for _ in range(3))
    out = graph.op("Attention", q, k, v, shape=(BATCH, 2, LENGTH, WIDTH))
    return graph.model(((out, (BATCH, 2, LENGTH, WIDTH)),))


def shared_rotation() -> ir.Model:
    graph = Graph()
    q, k, v = (graph.heads("x", 16, 2) for _ in range(3))
    q = graph.rotate(q, 2)
    out = graph.op("Attention", q, k, v, shape=(BATCH, 2, LENGTH, WIDTH))
    return graph.model(((graph.merge(out, 2), (BATCH, LENGTH, 16)), (q, (BATCH, 2, LENGTH, WIDTH))))


@pytest.mark.parametrize("build", [untransposed, read_as_heads, shared_rotation])
def test_attention_that_would_still_be_transposed_is_left_alone(build: Any) -> None:
    model = build()
    before = ir.to_proto(model).SerializeToString()
    assert not AttentionHeads()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_another_number_of_heads_is_noticed() -> None:
    before = grouped(rotary=False)
    model, _ = rewritten(before)
    node = next(node for node in model.graph if node.op_type == "Attention")
    for name, heads in (("q_num_heads", 2), ("kv_num_heads", 1)):  # half as many, twice as wide
        node.attributes[name] = ir.AttrInt64(name, heads)
    assert not same(model, before)
