"""Models of one depth-attention node, run in ONNX Runtime with the library of kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

from depthwire.runtime.native import OPS_ENTRY, custom_ops_library, ops_entry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import onnx
    from torch import Tensor

    from tests.attn_res_cases import Case, Operands, TwoPhaseCase

DOMAIN = "depthwire"
ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
}


@dataclass
class Node:
    """One node: its operator, its inputs by name in order, its attributes and the names of its outputs."""

    op_type: str
    inputs: dict[str, Tensor]
    attributes: dict[str, float | int]
    outputs: tuple[str, ...] = ("out",)
    wide_outputs: tuple[str, ...] = field(default=())


def model_of(nodes: Sequence[Node], *, dynamic: bool = False) -> onnx.ModelProto:
    """Chain nodes: an input that an earlier node puts out is taken from there, the others are graph inputs.

    Graph inputs and outputs are fp32, cast inside where the tensor is not (numpy has no bfloat16; the values given are
    exact in it). With ``dynamic``, all axes but the last are symbolic.
    """
    body: list[onnx.NodeProto] = []
    inputs: dict[str, onnx.ValueInfoProto] = {}
    made: list[str] = []
    for node in nodes:
        feeds = []
        for name, tensor in node.inputs.items():
            if name in made:
                feeds.append(name)
                continue
            if name not in inputs:
                shape: list[int | str] = list(tensor.shape)
                if dynamic:
                    shape = [*(f"{name}_{i}" for i in range(len(shape) - 1)), *shape[-1:]]
                inputs[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                body.append(helper.make_node("Cast", [name], [f"{name}_cast"], to=ELEMENTS[tensor.dtype]))
            feeds.append(f"{name}_cast")
        body.append(helper.make_node(node.op_type, feeds, list(node.outputs), domain=DOMAIN))
        body[-1].attribute.extend(helper.make_attribute(key, value) for key, value in node.attributes.items())
        made += node.outputs
    body += [helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT) for name in made]
    outputs = [helper.make_tensor_value_info(f"{name}_wide", TensorProto.FLOAT, None) for name in made]
    graph = helper.make_graph(body, "one_node", list(inputs.values()), outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session_of(
    model: onnx.ModelProto, *, threads: int = 1, library: Path | None = None, profile: str | None = None
) -> onnxruntime.InferenceSession:
    """Open a model with the kernels of its nodes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    names = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
    options.add_session_config_entry(OPS_ENTRY, ops_entry(names))
    options.register_custom_ops_library(str(library or custom_ops_library()))
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(nodes: Sequence[Node], **options: Any) -> dict[str, Tensor]:
    """Run nodes; return every output of theirs in fp32."""
    dynamic = bool(options.pop("dynamic", False))
    session = session_of(model_of(nodes, dynamic=dynamic), **options)
    return run_session(session, nodes)


def run_session(session: onnxruntime.InferenceSession, nodes: Sequence[Node]) -> dict[str, Tensor]:
    """Run a session of ``model_of(nodes)``."""
    feeds = {name: tensor for node in nodes for name, tensor in node.inputs.items()}
    wanted = [item.name for item in session.get_inputs()]
    found = session.run(None, {name: feeds[name].float().contiguous().numpy() for name in wanted})
    names = [name for node in nodes for name in node.outputs]
    return {name: torch.from_numpy(np.asarray(array)) for name, array in zip(names, found, strict=True)}


def read_node(case: Case, tensors: Operands) -> Node:
    """The node of a case of the table."""
    inputs = {"query": tensors.query}
    if case.norm:
        inputs["norm_weight"] = tensors.norm_weight
    # Equal sources are one tensor in the table; here each input has a name of its own.
    inputs |= {f"source_{index}": source for index, source in enumerate(tensors.sources)}
    if case.add:
        inputs["delta"] = tensors.delta
    attributes: dict[str, float | int] = {"eps": case.eps, "scale": case.scale, "last_bias": case.last_bias}
    if case.norm:
        attributes["norm_eps"] = case.eps
    return Node(case.op_type, inputs, attributes, ("out", "sum") if case.add else ("out",))


def two_phase_nodes(case: TwoPhaseCase, queries: Tensor, tensors: Operands) -> tuple[Node, Node]:
    """Both nodes of a two-phase case."""
    bank, own = tensors.sources[: case.bank], tensors.sources[case.bank :]
    inter = Node(
        f"AttnResInter_{case.bank}",
        {"queries": queries} | {f"bank_{index}": source for index, source in enumerate(bank)},
        {"eps": case.eps, "scale": case.scale},
        ("inter_out", "inter_lse"),
    )
    inputs = {"query": tensors.query}
    if case.norm:
        inputs["norm_weight"] = tensors.norm_weight
    # The tensors of the first two stand for what phase 1 puts out.
    inputs |= {"inter_out": tensors.query, "inter_lse": tensors.query}
    inputs |= {f"source_{index}": source for index, source in enumerate(own)}
    if case.add:
        inputs["delta"] = tensors.delta
    attributes: dict[str, float | int] = {"index": case.index, "eps": case.eps, "scale": case.scale, "last_bias": 0.0}
    if case.norm:
        attributes["norm_eps"] = case.eps
    return inter, Node(case.op_type, inputs, attributes, ("out", "sum") if case.add else ("out",))
