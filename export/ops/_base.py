"""What the ONNX side of a custom operator provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

DOMAIN = "depthwire"
VERSION = 1


class OnnxOperator(ABC):
    """Schema, translation and function body of one torch operator.

    Attributes:
        torch_op: Qualified torch name, such as ``depthwire::attn_res_read``.
    """

    torch_op: ClassVar[str]

    @abstractmethod
    def translation(self) -> Callable[..., Any]:
        """Return the onnxscript callable that emits the ONNX node for one torch call."""

    @abstractmethod
    def handles(self, op_type: str) -> bool:
        """Tell whether an ONNX operator of our domain is this one (in any arity)."""

    @abstractmethod
    def body(self, node: ir.Node, *, opset: int) -> ir.Function:
        """Return the function body for the arity and dtype of one node."""
