"""ONNX models of one routing node, for testing the bodies and kernels of the operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import torch
from onnx import TensorProto, helper

from depthwire.export.ops._token_body import budget_body, steps, top_k_body
from depthwire.export.ops.move_tokens import gather_body, scatter_body
from depthwire.export.ops.surprise_score import surprise_body

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tests.routing_cases import MoveOperands, SelectOperands, SurpriseOperands

OPSET = 23
_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


def top_k_model(operands: SelectOperands, window: int = 0, *, body: bool = True, dynamic: bool = False) -> Any:
    """A model of ``SelectTokens``; ``dynamic`` leaves K to the call."""
    count = steps(operands.score.shape[1])
    return model(
        f"SelectTokens_{count}",
        {"score": operands.score, "valid": operands.valid, "slots": operands.slots},
        {"index": torch.int64, "taken": torch.bool},
        top_k_body(count, opset=OPSET, double=operands.score.dtype == torch.float64) if body else None,
        dynamic=("slots",) if dynamic else (),
        window=window,
    )


def budget_model(operands: SelectOperands, *, body: bool = True, dynamic: bool = False) -> Any:
    """A model of ``SelectTokensBudget``; ``dynamic`` leaves K to the call."""
    count = steps(operands.score.shape[1])
    return model(
        f"SelectTokensBudget_{count}",
        {name: getattr(operands, name) for name in ("score", "valid", "threshold", "budget", "state", "slots")},
        {"index": torch.int64, "taken": torch.bool, "state_out": torch.int64},
        budget_body(count, opset=OPSET, double=operands.score.dtype == torch.float64) if body else None,
        dynamic=("slots",) if dynamic else (),
    )


def gather_model(operands: MoveOperands, *, body: bool = True) -> Any:
    """A model of ``GatherTokens``."""
    text = gather_body(opset=OPSET) if body else None
    inputs = {"x": operands.base, "index": operands.index}
    return model("GatherTokens", inputs, {"out": operands.base.dtype}, text)


def scatter_model(operands: MoveOperands, *, body: bool = True) -> Any:
    """A model of ``ScatterTokens``."""
    widen = operands.base.dtype in (torch.bfloat16, torch.bool)
    inputs = {name: getattr(operands, name) for name in ("base", "index", "taken", "rows")}
    text = scatter_body(opset=OPSET, widen=widen) if body else None
    return model("ScatterTokens", inputs, {"out": operands.base.dtype}, text)


def surprise_model(operands: SurpriseOperands, window: int, *, body: bool = True) -> Any:
    """A model of ``SurpriseScore``."""
    double = operands.delta.dtype == torch.float64
    inputs = {name: getattr(operands, name) for name in ("delta", "prior", "criteria", "valid")}
    text = surprise_body(opset=OPSET, double=double) if body else None
    rank = torch.float64 if double else torch.float32
    return model("SurpriseScore", inputs, {"rank": rank}, text, window=window)


def model(
    op_type: str,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, torch.dtype],
    body: str | None,
    *,
    dynamic: tuple[str, ...] = (),
    **attributes: int,
) -> onnx.ModelProto:
    """A model of one node. Its interface is fp32 where numpy lacks the dtype, with casts around the node."""
    node = helper.make_node(
        op_type,
        [f"{name}_T" if t.dtype == torch.bfloat16 else name for name, t in inputs.items()],
        [f"{name}_T" if kind == torch.bfloat16 else name for name, kind in outputs.items()],
        name=op_type,
        domain="depthwire",
    )
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    before = [
        helper.make_node("Cast", [name], [f"{name}_T"], to=TensorProto.BFLOAT16)
        for name, tensor in inputs.items()
        if tensor.dtype == torch.bfloat16
    ]
    behind = [
        helper.make_node("Cast", [f"{name}_T"], [name], to=TensorProto.FLOAT)
        for name, kind in outputs.items()
        if kind == torch.bfloat16
    ]
    interface = [
        helper.make_tensor_value_info(name, _interface(t.dtype), ["K"] if name in dynamic else list(t.shape))
        for name, t in inputs.items()
    ]
    results = [helper.make_tensor_value_info(name, _interface(kind), None) for name, kind in outputs.items()]
    return helper.make_model(
        helper.make_graph([*before, node, *behind], "routing", interface, results),
        functions=[onnx.parser.parse_function(body)] if body else [],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("depthwire", 1)],
        ir_version=10,
    )


def _interface(dtype: torch.dtype) -> int:
    return int(_TYPES[torch.float32 if dtype == torch.bfloat16 else dtype])


def feeds(operands: Any) -> dict[str, Any]:
    """The arrays of a case's operands by name (``x`` is the base)."""
    arrays = {}
    for name, tensor in vars(operands).items():
        wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        arrays[name] = np.ascontiguousarray(wide.numpy())
    if "base" in arrays:
        arrays["x"] = arrays["base"]
    return arrays
