"""Models of one routing node, run in ONNX Runtime with the library of kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from onnx import TensorProto, helper

from tests.runtime.native.one_node import DOMAIN, ELEMENTS, session_of

if TYPE_CHECKING:
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray
    from torch import Tensor

    from tests.routing_cases import MoveOperands, SelectOperands, SurpriseOperands

TYPES = {**ELEMENTS, torch.bool: TensorProto.BOOL, torch.int32: TensorProto.INT32}
OUTPUTS = {
    "SelectTokens": ("index", "taken"),
    "SelectTokensBudget": ("index", "taken", "state_out"),
    "GatherTokens": ("out",),
    "ScatterTokens": ("out",),
    "SurpriseScore": ("rank",),
}


@dataclass
class RoutingNode:
    """One node: its operator, its inputs by name in order and its attributes."""

    op_type: str
    inputs: dict[str, Tensor]
    attributes: dict[str, int] = field(default_factory=dict)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return OUTPUTS[self.op_type.partition("_")[0]]

    def feeds(self) -> dict[str, NDArray[Any]]:
        """Values of the graph's inputs."""
        return {name: _array(tensor) for name, tensor in self.inputs.items()}


def routing_model(node: RoutingNode, *, dynamic: bool = False, owned: bool = False) -> onnx.ModelProto:
    """Return a model of a node.

    Args:
        node: The node.
        dynamic: All axes of the graph's inputs are symbolic, each for itself.
        owned: A node of the graph makes the first input, so that its memory may be used again.
    """
    inputs, body, feeds = [], [], []
    bfloat = any(tensor.dtype == torch.bfloat16 for tensor in node.inputs.values())
    for position, (name, tensor) in enumerate(node.inputs.items()):
        shape = [f"{name}_{i}" if dynamic else size for i, size in enumerate(tensor.shape)]
        narrow = tensor.dtype == torch.bfloat16  # numpy has none
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT if narrow else TYPES[tensor.dtype], shape))
        feeds.append(name)
        if narrow:
            feeds[-1] = f"{name}_cast"
            body.append(helper.make_node("Cast", [name], [feeds[-1]], to=TensorProto.BFLOAT16))
        elif owned and position == 0:
            feeds[-1] = f"{name}_own"
            body.append(helper.make_node("Concat", [name], [feeds[-1]], axis=0))
    made = helper.make_node(node.op_type, feeds, list(node.outputs), domain=DOMAIN)
    made.attribute.extend(helper.make_attribute(key, value) for key, value in node.attributes.items())
    body.append(made)
    results = list(node.outputs)
    if bfloat and results == ["out"]:
        body.append(helper.make_node("Cast", ["out"], ["wide"], to=TensorProto.FLOAT))
        results = ["wide"]
    types = [TensorProto.UNDEFINED] * len(results)
    if results == ["index", "taken"] or results[-1] == "state_out":
        types = [TensorProto.INT64, TensorProto.BOOL, TensorProto.INT64][: len(results)]
    elif results != ["wide"]:
        first = next(iter(node.inputs.values())).dtype
        moves = results == ["out"]
        types = [TYPES[first] if moves or first == torch.float64 else TensorProto.FLOAT]
    else:
        types = [TensorProto.FLOAT]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(results, types, strict=True)]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(helper.make_graph(body, "one", inputs, outputs), opset_imports=opsets, ir_version=10)


def run_node(node: RoutingNode, *, threads: int = 1, library: Path | None = None, **model: bool) -> dict[str, Tensor]:
    """Run a node with the kernels; return its outputs, bfloat16 as fp32."""
    session = session_of(routing_model(node, **model), threads=threads, library=library)
    return dict(zip(node.outputs, map(torch.from_numpy, session.run(None, node.feeds())), strict=True))


def select_node(operands: SelectOperands, *, window: int = 0) -> RoutingNode:
    """The top-k rule."""
    inputs = {"score": operands.score, "valid": operands.valid, "slots": operands.slots}
    return RoutingNode(f"SelectTokens_{_levels(operands.score)}", inputs, {"window": window})


def budget_node(operands: SelectOperands) -> RoutingNode:
    """The running budget."""
    names = ("score", "valid", "threshold", "budget", "state", "slots")
    inputs = {name: getattr(operands, name) for name in names}
    return RoutingNode(f"SelectTokensBudget_{_levels(operands.score)}", inputs)


def move_nodes(operands: MoveOperands) -> tuple[RoutingNode, RoutingNode]:
    """A gather and a scatter."""
    gather = RoutingNode("GatherTokens", {"x": operands.base, "index": operands.index})
    names = ("base", "index", "taken", "rows")
    return gather, RoutingNode("ScatterTokens", {name: getattr(operands, name) for name in names})


def surprise_node(operands: SurpriseOperands, window: int) -> RoutingNode:
    """The surprise score."""
    names = ("delta", "prior", "criteria", "valid")
    return RoutingNode("SurpriseScore", {name: getattr(operands, name) for name in names}, {"window": window})


def _levels(score: Tensor) -> int:
    return max(1, (score.shape[-1] - 1).bit_length())


def _array(tensor: Tensor) -> NDArray[Any]:
    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: NDArray[Any] = wide.contiguous().numpy()
    return array
