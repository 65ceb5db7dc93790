"""Graphs for older parsers: what is missing is gone, the values are the same, and what cannot be lowered is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from depthwire.errors import BuildError
from depthwire.runtime._onnx_lower import lower
from depthwire.runtime.target import load_target

if TYPE_CHECKING:
    from collections.abc import Sequence

MISSING = ("Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter", "Swish")
HALF = {"x": np.float16}


def value(name: str, *shape: int, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, list(shape))


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    *,
    weights: Sequence[onnx.TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = 23,
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(weights))
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid("local", 1)] if functions else [])]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def run(model: onnx.ModelProto, feed: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return list(onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feed))


def operators(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def normed(dtype: int = TensorProto.FLOAT, *, in_body: bool = False) -> onnx.ModelProto:
    """RMSNormalization behind a Reshape (which changed in 19, 21, 23), in the graph or in a function's body."""
    numpy_dtype = helper.tensor_dtype_to_np_dtype(dtype)
    gain = numpy_helper.from_array(np.linspace(0.5, 2, 8).astype(numpy_dtype), "gain")
    shape = numpy_helper.from_array(np.array([2, 8], np.int64), "shape")
    norm = helper.make_node("RMSNormalization", ["r", "gain"], ["y"], axis=-1, epsilon=1e-5)
    functions = []
    if in_body:
        opset = [helper.make_opsetid("", 23)]
        functions = [helper.make_function("local", "Norm", ["r", "gain"], ["y"], [norm], opset)]
        norm = helper.make_node("Norm", ["r", "gain"], ["y"], domain="local")
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["r"]), norm]
    ends = value("x", 1, 16, dtype=dtype), value("y", 2, 8, dtype=dtype)
    return model_of(nodes, ends[:1], ends[1:], weights=[gain, shape], functions=functions)


@pytest.mark.parametrize("in_body", [False, True])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_norm_is_spelled_out(dtype: int, *, in_body: bool) -> None:
    model = normed(dtype, in_body=in_body)
    before = model.SerializeToString()
    lowered = lower(model, missing=MISSING, expand_functions=False, parser_opset=20)
    assert model.SerializeToString() == before
    onnx.checker.check_model(lowered.model, full_check=True)
    assert "RMSNormalization" not in operators(lowered.model)
    assert [(entry.domain, entry.version) for entry in lowered.model.opset_import] == [("", 20)]
    assert lowered.model.ir_version == 9
    assert not lowered.model.functions
    assert lowered.notes[-2:] == ("spelled out: RMSNormalization", "operator set 20 instead of 23")
    x = np.random.default_rng(0).standard_normal((1, 16)).astype(helper.tensor_dtype_to_np_dtype(dtype))
    ((want,), (got,)) = run(model, {"x": x}), run(lowered.model, {"x": x})
    # fp32: another order of summation over 8 values; fp16: one rounding more or less.
    np.testing.assert_allclose(got, want, rtol=2e-6 if dtype == TensorProto.FLOAT else 2e-3)


def test_a_sabotaged_body_is_noticed() -> None:
    model = normed()
    lowered = lower(model, missing=MISSING, expand_functions=True, parser_opset=20).model
    (root,) = [node for node in lowered.graph.node if node.op_type == "Sqrt"]
    root.op_type = "Exp"
    x = np.random.default_rng(0).standard_normal((1, 16)).astype(np.float32)
    assert np.abs(run(model, {"x": x})[0] - run(lowered, {"x": x})[0]).max() > 1e-2


def test_rotary_and_attention_are_spelled_out() -> None:
    rng = np.random.default_rng(1)
    angles = rng.standard_normal((6, 4)).astype(np.float32)
    tables = [
        numpy_helper.from_array(table, name) for table, name in ((np.cos(angles), "cos"), (np.sin(angles), "sin"))
    ]
    tables.append(numpy_helper.from_array(np.arange(6, dtype=np.int64)[None], "position"))
    nodes = [
        helper.make_node("RotaryEmbedding", ["q", "cos", "sin", "position"], ["turned"]),
        helper.make_node("Attention", ["turned", "q", "q"], ["y"], is_causal=1),
    ]
    ends = value("q", 1, 2, 6, 8), value("y", 1, 2, 6, 8)
    model = model_of(nodes, ends[:1], ends[1:], weights=tables)
    lowered = lower(model, missing=MISSING, expand_functions=True, parser_opset=20)
    onnx.checker.check_model(lowered.model, full_check=True)
    assert operators(lowered.model).isdisjoint(MISSING)
    feed = {"q": rng.standard_normal((1, 2, 6, 8)).astype(np.float32)}
    np.testing.assert_allclose(run(lowered.model, feed)[0], run(model, feed)[0], rtol=1e-5, atol=1e-6)


def test_axes_are_constants() -> None:
    """TensorRT computes no axis at run time; the standard's body of the norm does."""
    lowered = lower(normed(), missing=MISSING, expand_functions=True, parser_opset=20).model
    known = {tensor.name for tensor in lowered.graph.initializer}
    known |= {node.output[0] for node in lowered.graph.node if node.op_type == "Constant"}
    axes = [node.input[1] for node in lowered.graph.node if node.op_type.startswith("Reduce")]
    assert axes
    assert set(axes) <= known
    assert "Range" not in operators(lowered)


def test_what_the_parser_knows_stays() -> None:
    model = normed(in_body=True)
    lowered = lower(model, missing=("Swish",), expand_functions=False, parser_opset=24)
    assert lowered.model is model
    assert lowered.notes == ()
    alone = lower(model, missing=(), expand_functions=True, parser_opset=None)
    assert operators(alone.model) == {"Reshape", "RMSNormalization"}
    assert alone.model.opset_import[0].version == 23


def test_an_operator_without_a_body_is_refused() -> None:
    node = helper.make_node("TensorScatter", ["cache", "update", "at"], ["y"], axis=1)
    at = numpy_helper.from_array(np.zeros(1, np.int64), "at")
    ends = [value("cache", 1, 8, 4), value("update", 1, 2, 4)], [value("y", 1, 8, 4)]
    model = model_of([node], *ends, weights=[at], opset=24)
    with pytest.raises(BuildError) as caught:
        lower(model, missing=MISSING, expand_functions=False, parser_opset=20)
    assert (caught.value.code, caught.value.at) == ("bundle.operator", "TensorScatter")


@pytest.mark.parametrize(
    ("node", "opset", "reached"),
    [
        # INT4 blocks came with 21; a Resize of 19 means something else than one of 18; Reshape only got more types.
        (helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=0, block_size=4), 23, 21),
        # What later sets added, spelled out with its default, holds nothing up.
        (helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], block_size=0, precision=0, saturate=1), 23, 18),
        (helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], precision=TensorProto.FLOAT16), 23, 23),
        (helper.make_node("Resize", ["x", "", "s"], ["y"]), 23, 19),
        (helper.make_node("Reshape", ["x", "shape"], ["y"]), 24, 18),
        (helper.make_node("Gelu", ["x"], ["y"]), 23, 20),
    ],
)
def test_the_operator_set_goes_as_low_as_every_node_lets_it(node: onnx.NodeProto, opset: int, reached: int) -> None:
    model = model_of([node], [value("x", 4)], [value("y", 4)], opset=opset)
    lowered = lower(model, missing=(), expand_functions=False, parser_opset=18)
    assert lowered.model.opset_import[0].version == reached
    assert (lowered.notes[0] == f"operator set {reached} instead of {opset}") == (reached < opset)
    assert len(lowered.notes) == (1 if reached in {18, opset} else 2)
    assert reached == 18 or f"{node.op_type} (y) needs operator set {reached}" in lowered.notes[-1]
    known = onnx.defs.get_schema(node.op_type, reached).attributes
    assert {attribute.name for attribute in lowered.model.graph.node[0].attribute} <= set(known)


def test_the_targets_say_what_their_parsers_lack() -> None:
    orin = load_target("jetson-orin-nano-4")
    assert set(orin.operators_missing) == set(MISSING)
    assert (orin.parser_opset, orin.expand_functions) == (20, True)
