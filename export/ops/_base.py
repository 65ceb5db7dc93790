"""What the ONNX side of a custom operator provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Type:
    """The type of an operator's inputs and results: one type, or a variable that all parameters of its name share.

    Attributes:
        name: ``tensor(int64)`` and such, or the name of a variable.
        admits: What a variable may stand for; nothing for one type.
        doc: What a variable is the type of.
    """

    name: str
    admits: tuple[str, ...] = ()
    doc: str = ""


FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)")
WIDE_FLOATS = ("tensor(float)", "tensor(double)")
ARITHMETIC = Type("W", WIDE_FLOATS, "The dtype of the arithmetic.")
INT64 = Type("tensor(int64)")
BOOL = Type("tensor(bool)")


def register_schema(
    op_type: str,
    doc: str,
    *,
    inputs: Sequence[tuple[str, Type]],
    outputs: Sequence[tuple[str, Type]],
    floats: Sequence[str] = (),
    ints: Sequence[str] = (),
) -> None:
    """Register an operator's schema with onnx, once; a translation cannot emit a node without one.

    Args:
        op_type: Name with the arity.
        doc: One sentence.
        inputs: Names and types, in order.
        outputs: Names and types, in order.
        floats: Float attributes, all required.
        ints: Integer attributes, all required.
    """
    import onnx.defs

    if onnx.defs.has(op_type, DOMAIN):
        return
    schema = onnx.defs.OpSchema
    variables = {kind.name: kind for _, kind in (*inputs, *outputs) if kind.admits}
    onnx.defs.register_schema(
        schema(
            op_type,
            DOMAIN,
            VERSION,
            doc=doc,
            inputs=[schema.FormalParameter(name, kind.name) for name, kind in inputs],
            outputs=[schema.FormalParameter(name, kind.name) for name, kind in outputs],
            type_constraints=[(kind.name, list(kind.admits), kind.doc) for kind in variables.values()],
            attributes=[
                *(schema.Attribute(name, schema.AttrType.FLOAT, required=True) for name in floats),
                *(schema.Attribute(name, schema.AttrType.INT, required=True) for name in ints),
            ],
        )
    )


def function_text(signature: str, lines: Sequence[str], opset: int) -> str:
    """Return a function body in ONNX's text format: ``Name <attributes>(inputs) => (outputs)`` and its lines."""
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>'
    return "\n".join([header, signature, "{", *(f"  {line}" for line in lines), "}"])


def parse(text: str) -> ir.Function:
    """Return the function of a text."""
    import onnx.parser
    import onnx_ir as ir

    return ir.serde.deserialize_function(onnx.parser.parse_function(text))
