"""What the ONNX side of a custom operator provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

DOMAIN = "depthwire"
VERSION = 1


class OnnxOperator(ABC):
    """Schema, translation and function body of one torch operator."""

    @property
    @abstractmethod
    def torch_op(self) -> str:
        """Qualified torch name, such as ``depthwire::attn_res_read``."""

    @abstractmethod
    def translation(self) -> Callable[..., Any]:
        """Return the onnxscript callable that emits the ONNX node for one torch call."""

    @abstractmethod
    def handles(self, op_type: str) -> bool:
        """Tell whether an ONNX operator of our domain is this one (in any arity)."""

    @abstractmethod
    def body(self, node: ir.Node, *, opset: int) -> ir.Function:
        """Return the function body for the arity and dtype of one node."""


def register_schema(
    op_type: str,
    doc: str,
    *,
    vectors: Sequence[str],
    tensors: Sequence[str],
    wide: Sequence[str] = (),
    outputs: Sequence[str],
    wide_outputs: Sequence[str] = (),
    floats: Sequence[str] = (),
    ints: Sequence[str] = (),
) -> None:
    """Register an operator's schema with onnx, once; a translation cannot emit a node without one.

    Args:
        op_type: Name with the arity.
        doc: One sentence.
        vectors: Inputs of any floating dtype: queries and gains. They come first.
        tensors: Inputs of the sources' dtype T, in order behind them; those in ``wide`` are of the arithmetic's.
        wide: Which of the ``tensors`` are fp32 (fp64 beside fp64 sources).
        outputs: Results of dtype T; those in ``wide_outputs`` are of the arithmetic's.
        wide_outputs: Which of the ``outputs`` are fp32 (fp64).
        floats: Float attributes, all required.
        ints: Integer attributes, all required.
    """
    import onnx.defs

    if onnx.defs.has(op_type, DOMAIN):
        return
    schema = onnx.defs.OpSchema
    types = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]

    def parameter(name: str, of: str) -> Any:
        return schema.FormalParameter(name, of)

    # Vectors may differ among themselves: a gain is of the model's dtype, a query is fp32.
    inputs = [parameter(name, f"Q{index}") for index, name in enumerate(vectors)]
    inputs += [parameter(name, "W" if name in wide else "T") for name in tensors]
    constraints = [(f"Q{index}", types, "A query or a gain.") for index in range(len(vectors))]
    constraints.append(("T", types, "Sources and results."))
    if wide or wide_outputs:
        constraints.append(("W", ["tensor(float)", "tensor(double)"], "The dtype of the arithmetic."))
    onnx.defs.register_schema(
        schema(
            op_type,
            DOMAIN,
            VERSION,
            doc=doc,
            inputs=inputs,
            outputs=[parameter(name, "W" if name in wide_outputs else "T") for name in outputs],
            type_constraints=constraints,
            attributes=[
                *(schema.Attribute(name, onnx.defs.OpSchema.AttrType.FLOAT, required=True) for name in floats),
                *(schema.Attribute(name, onnx.defs.OpSchema.AttrType.INT, required=True) for name in ints),
            ],
        )
    )
