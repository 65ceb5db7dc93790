"""ONNX models of one depth-attention node, for testing the bodies of the operators: function, kernel, profile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto, helper

from depthwire.export.ops._depth_body import ReadForm, inter_body, read_body

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from tests.attn_res_cases import Case, Operands, TwoPhaseCase

OPSET = 23
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}

Arrays = dict[str, "NDArray[Any]"]


def read_model(case: Case, *, body: bool = True) -> onnx.ModelProto:
    """A model of one read, with fp32 interface: casts to and from the case's dtype stand around the node."""
    form = ReadForm(case.sources, add=case.add, unit=case.unit, norm=case.norm)
    attributes: dict[str, Any] = {"eps": case.eps, "scale": case.scale, "last_bias": case.last_bias}
    if case.norm:
        attributes["norm_eps"] = case.eps
    shapes = {name: [case.rows, case.width] for name in form.tensors}
    node = (form.name, form.vectors, form.tensors, form.outputs, attributes)
    text = read_body(form, opset=OPSET, widen=case.dtype != "float32")
    return _model([node], {name: [case.width] for name in form.vectors}, shapes, case.dtype, [text] if body else [])


def read_feeds(case: Case, tensors: Operands) -> Arrays:
    """The inputs of ``read_model``."""
    feeds = {f"source_{i}": source for i, source in enumerate(tensors.sources)}
    feeds["query"] = tensors.query
    if case.norm:
        feeds["norm_weight"] = tensors.norm_weight
    if case.add:
        feeds["delta"] = tensors.delta
    return {name: _array(tensor) for name, tensor in feeds.items()}


def two_phase_model(case: TwoPhaseCase, *, body: bool = True) -> onnx.ModelProto:
    """A model of both phases: ``bank_i`` and ``queries`` into AttnResInter, its results into the merge."""
    widen = case.dtype != "float32"
    bank = tuple(f"bank_{i}" for i in range(case.bank))
    form = ReadForm(case.own, add=case.add, merge=True, norm=case.norm)
    attributes: dict[str, Any] = {"eps": case.eps, "scale": case.scale, "last_bias": 0.0, "index": case.index}
    if case.norm:
        attributes["norm_eps"] = case.eps
    inter = (
        f"AttnResInter_{case.bank}",
        ("queries",),
        bank,
        ("inter_out", "inter_lse"),
        {"eps": case.eps, "scale": case.scale},
    )
    merge = (form.name, form.vectors, form.tensors, form.outputs, attributes)
    own = [name for name in form.tensors if not name.startswith("inter")]
    vectors = {"queries": [case.queries, case.width], **{name: [case.width] for name in form.vectors}}
    texts = [inter_body(case.bank, opset=OPSET, widen=widen), read_body(form, opset=OPSET, widen=widen)]
    shapes = {name: [case.rows, case.width] for name in (*bank, *own)}
    return _model([inter, merge], vectors, shapes, case.dtype, texts if body else [])


def two_phase_feeds(case: TwoPhaseCase, queries: Tensor, tensors: Operands) -> Arrays:
    """The inputs of ``two_phase_model``."""
    feeds = {f"bank_{i}": source for i, source in enumerate(tensors.sources[: case.bank])}
    feeds |= {f"source_{i}": source for i, source in enumerate(tensors.sources[case.bank :])}
    feeds |= {"queries": queries, "query": tensors.query}
    if case.norm:
        feeds["norm_weight"] = tensors.norm_weight
    if case.add:
        feeds["delta"] = tensors.delta
    return {name: _array(tensor) for name, tensor in feeds.items()}


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(tensor.float().numpy())
    return array


def _model(
    nodes: Sequence[tuple[str, Sequence[str], Sequence[str], Sequence[str], Mapping[str, Any]]],
    vectors: Mapping[str, list[int]],
    tensors: Mapping[str, list[int]],
    dtype: str,
    bodies: Sequence[str],
) -> onnx.ModelProto:
    cast = TYPES[dtype]
    graph_nodes = [helper.make_node("Cast", [name], [f"{name}_T"], to=cast) for name in tensors]
    outputs: list[str] = []
    for op_type, own_vectors, own_tensors, results, attributes in nodes:
        operands = [*own_vectors, *(f"{name}_T" if name in tensors else name for name in own_tensors)]
        last = op_type == nodes[-1][0]
        names = [f"{name}_T" if last else name for name in results]
        graph_nodes.append(helper.make_node(op_type, operands, names, name=op_type, domain="depthwire", **attributes))
        if last:
            graph_nodes += [helper.make_node("Cast", [f"{n}_T"], [n], to=TensorProto.FLOAT) for n in results]
            outputs = list(results)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in {**vectors, **tensors}.items()
    ]
    results_info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    return helper.make_model(
        helper.make_graph(graph_nodes, "reads", inputs, results_info),
        functions=[onnx.parser.parse_function(text) for text in bodies],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("depthwire", 1)],
        ir_version=10,
    )
