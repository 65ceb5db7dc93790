"""``depthwire::AttnResRead_n(query, source_0, …, source_{n-1})`` for ONNX.

The arity is in the operator's name: a function body has a fixed number of inputs, and TensorRT-RTX's parser ignores
overloads. Attributes: ``eps`` (added to the mean square) and ``scale`` (factor on the logits). The body works source by
source and never concatenates them, so each is read where it lies; statistics, softmax and sum are fp32.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, ClassVar

from depthwire.export.ops._base import DOMAIN, VERSION, OnnxOperator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

_NAME = re.compile(r"AttnResRead_(\d+)")


class AttnResReadOnnx(OnnxOperator):
    """The read of Attention Residuals."""

    torch_op: ClassVar[str] = "depthwire::attn_res_read"

    def translation(self) -> Callable[..., Any]:
        """Return the callable that emits ``AttnResRead_n`` with n the number of sources."""
        from onnxscript.values import Opset

        domain = Opset(DOMAIN, VERSION)

        def attn_res_read(query: Any, sources: Sequence[Any], eps: float, scale: float) -> Any:
            register_schema(len(sources))
            return getattr(domain, f"AttnResRead_{len(sources)}")(query, *sources, eps=eps, scale=scale)

        return attn_res_read

    def handles(self, op_type: str) -> bool:
        """Tell whether an operator name is ``AttnResRead_n``."""
        return _NAME.fullmatch(op_type) is not None

    def body(self, node: ir.Node, *, opset: int) -> ir.Function:
        """Return the body for the node's arity; sources narrower than fp32 are widened inside."""
        import onnx.parser
        import onnx_ir as ir

        match = _NAME.fullmatch(node.op_type)
        if match is None:
            raise ValueError(node.op_type)
        source = node.inputs[1]
        widen = source is None or source.dtype != ir.DataType.FLOAT
        text = body_text(int(match[1]), opset=opset, widen=widen)
        return ir.serde.deserialize_function(onnx.parser.parse_function(text))


@functools.cache
def register_schema(arity: int) -> None:
    """Register the operator's schema with onnx; a translation cannot emit a node without one."""
    import onnx.defs

    schema = onnx.defs.OpSchema
    types = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    sources = [schema.FormalParameter(f"source_{i}", "T", description="[..., d]") for i in range(arity)]
    onnx.defs.register_schema(
        schema(
            f"AttnResRead_{arity}",
            DOMAIN,
            VERSION,
            doc="Softmax attention over depth: sum_i softmax_i(scale * (query . s_i) * rstd(s_i)) * s_i.",
            inputs=[schema.FormalParameter("query", "Q", description="[d]"), *sources],
            outputs=[schema.FormalParameter("out", "T", description="[..., d]")],
            type_constraints=[("T", types, "Sources and result."), ("Q", types, "Query.")],
            attributes=[
                schema.Attribute("eps", onnx.defs.OpSchema.AttrType.FLOAT, "Added to the mean square.", required=True),
                schema.Attribute("scale", onnx.defs.OpSchema.AttrType.FLOAT, "Factor on the logits.", required=True),
            ],
        )
    )


def body_text(arity: int, *, opset: int, widen: bool) -> str:
    """Return the function body in ONNX's text format.

    Args:
        arity: Number of sources n.
        opset: Opset of the operators used; 18 or newer.
        widen: Cast query and sources to fp32 first, and the result back.
    """
    names = [f"source_{i}" for i in range(arity)]
    wide = [f"wide_{i}" for i in range(arity)] if widen else names
    query = "wide_query" if widen else "query"
    # Cast's `to` is written as the number of TensorProto.FLOAT.
    casts = [f"{w} = Cast<to = 1>({s})" for w, s in zip([query, *wide], ["query", *names], strict=True)]
    lines = [
        *(casts if widen else []),
        "last = Constant<value_ints = [-1]>()",
        "eps_value = Constant<value_float: float = @eps>()",
        "scale_value = Constant<value_float: float = @scale>()",
        f"column = Unsqueeze({query}, last)",
    ]
    for i, source in enumerate(wide):
        lines += [
            f"square_{i} = Mul({source}, {source})",
            f"mean_square_{i} = ReduceMean<keepdims = 1>(square_{i}, last)",
            f"shifted_{i} = Add(mean_square_{i}, eps_value)",
            f"rms_{i} = Sqrt(shifted_{i})",
            f"dot_{i} = MatMul({source}, column)",
            f"logit_{i} = Div(dot_{i}, rms_{i})",
        ]
    weights = ", ".join(f"weight_{i}" for i in range(arity))
    lines += [
        f"logits = Concat<axis = -1>({', '.join(f'logit_{i}' for i in range(arity))})",
        "scaled = Mul(logits, scale_value)",
        "weights = Softmax<axis = -1>(scaled)",
        f"{weights} = Split<axis = -1, num_outputs = {arity}>(weights)",
        *[f"term_{i} = Mul(weight_{i}, {source})" for i, source in enumerate(wide)],
    ]
    total = "term_0"
    for i in range(1, arity):
        lines.append(f"sum_{i} = Add({total}, term_{i})")
        total = f"sum_{i}"
    lines.append(f"out = CastLike({total}, source_0)" if widen else f"out = Identity({total})")
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>'
    signature = f"AttnResRead_{arity} <eps, scale>(query, {', '.join(names)}) => (out)"
    return "\n".join([header, signature, "{", *(f"  {line}" for line in lines), "}"])
