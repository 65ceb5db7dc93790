"""``AttnResRead_n`` and its fused and merging forms for ONNX.

    AttnResRead_n(query, source_0, …, source_{n-1})                         -> out
    AttnResAddReadNorm_n(query, norm_weight, source_0, …, delta)            -> out, sum
    AttnResMerge_m(query, inter_out, inter_lse, source_0, …, source_{m-1})  -> out

The arity is in the operator's name: a function body has a fixed number of inputs, and TensorRT-RTX's parser ignores
overloads. The other parts of a name (``Add``, ``Unit``, ``Norm``) say what is fused; see ``docs/attn_res_read.md``.
Attributes: ``eps``, ``scale``, ``last_bias``, with ``Norm`` ``norm_eps``, and ``index`` of a merge.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from depthwire.export.ops._base import (
    ARITHMETIC,
    DOMAIN,
    FLOATS,
    VERSION,
    OnnxOperator,
    Type,
    parse,
    register_schema,
)
from depthwire.export.ops._depth_body import ReadForm, inter_body, read_body

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir

_SOURCES = Type("T", FLOATS, "Sources and results.")
_INTER = re.compile(r"AttnResInter_(\d+)")


@dataclass(frozen=True)
class ReadOnnx(OnnxOperator):
    """One of the reads: ``form`` without its arity, and with ``unit`` decided by each call."""

    form: ReadForm

    @property
    def torch_op(self) -> str:
        """Such as ``depthwire::attn_res_add_read_norm``."""
        kind = ("add_" if self.form.add else "") + ("merge" if self.form.merge else "read")
        return f"depthwire::attn_res_{kind}{'_norm' if self.form.norm else ''}"

    def translation(self) -> Callable[..., Any]:
        """Return the callable that emits the operator with its arity."""
        import torch

        import depthwire.ops  # noqa: F401 - registers the operator, whose schema names the arguments

        packet = getattr(torch.ops.depthwire, self.torch_op.removeprefix("depthwire::"))
        schema = packet.default._schema
        defaults = {argument.name: argument.default_value for argument in schema.arguments}
        names = tuple(defaults)

        def translate(*args: Any, **kwargs: Any) -> Any:
            return self._emit({**defaults, **dict(zip(names, args, strict=False)), **kwargs})

        return translate

    def _emit(self, arguments: Mapping[str, Any]) -> Any:
        from onnxscript.values import Opset

        sources = arguments["sources"]
        form = replace(self.form, arity=len(sources), unit=bool(arguments.get("value_norm")))
        register_schema(
            form.name,
            "Softmax attention over depth: out = sum_i softmax_i(scale (query . s_i) rstd(s_i)) s_i.",
            inputs=[
                *_vectors(form.vectors),
                *((name, ARITHMETIC if name == "inter_lse" else _SOURCES) for name in form.tensors),
            ],
            outputs=[(name, _SOURCES) for name in form.outputs],
            floats=form.floats,
            ints=form.ints,
        )
        tensors = {**arguments, **dict(zip(form.sources, sources, strict=True))}
        floats = {name: float(arguments[name]) for name in form.floats}
        ints = {name: int(arguments[name]) for name in form.ints}
        operands = [tensors[name] for name in (*form.vectors, *form.tensors)]
        return getattr(Opset(DOMAIN, VERSION), form.name)(*operands, **floats, **ints)

    def handles(self, op_type: str) -> bool:
        """Tell whether an operator name is this read, of any arity."""
        return self._form(op_type) is not None

    def _form(self, op_type: str) -> ReadForm | None:
        arity = op_type.rpartition("_")[2]
        if not arity.isdecimal():
            return None
        for unit in (False, True):
            form = replace(self.form, arity=int(arity), unit=unit)
            if form.name == op_type and not (unit and form.merge):
                return form
        return None

    def body(self, node: ir.Node, *, opset: int) -> ir.Function:
        """Return the body for the node's arity; sources narrower than fp32 are widened inside."""
        form = self._form(node.op_type)
        if form is None:
            raise ValueError(node.op_type)
        return parse(read_body(form, opset=opset, widen=_narrow(node.inputs[len(form.vectors)])))


class InterOnnx(OnnxOperator):
    """Phase 1 of the two-phase form."""

    @property
    def torch_op(self) -> str:
        """The torch name."""
        return "depthwire::attn_res_inter"

    def translation(self) -> Callable[..., Any]:
        """Return the callable that emits ``AttnResInter_n``."""
        from onnxscript.values import Opset

        def attn_res_inter(queries: Any, sources: Sequence[Any], eps: float, scale: float) -> Any:
            name = f"AttnResInter_{len(sources)}"
            register_schema(
                name,
                "For each of S queries the softmax mean of the sources [S, ..., d], and the logsumexp [S, ...].",
                inputs=[*_vectors(["queries"]), *((f"source_{i}", _SOURCES) for i in range(len(sources)))],
                outputs=[("out", _SOURCES), ("lse", ARITHMETIC)],
                floats=("eps", "scale"),
            )
            return getattr(Opset(DOMAIN, VERSION), name)(queries, *sources, eps=eps, scale=scale)

        return attn_res_inter

    def handles(self, op_type: str) -> bool:
        """Tell whether an operator name is ``AttnResInter_n``."""
        return _INTER.fullmatch(op_type) is not None

    def body(self, node: ir.Node, *, opset: int) -> ir.Function:
        """Return the body for the node's arity."""
        match = _INTER.fullmatch(node.op_type)
        if match is None:
            raise ValueError(node.op_type)
        import onnx_ir as ir

        source = node.inputs[1]
        double = source is not None and source.dtype == ir.DataType.DOUBLE
        return parse(inter_body(int(match[1]), opset=opset, widen=_narrow(source), double=double))


def _narrow(source: ir.Value | None) -> bool:
    import onnx_ir as ir

    return source is None or source.dtype != ir.DataType.FLOAT


def _vectors(names: Sequence[str]) -> list[tuple[str, Type]]:
    # They may differ among themselves: a gain is of the model's dtype, a query is fp32.
    return [(name, Type(f"Q{index}", FLOATS, "A query or a gain.")) for index, name in enumerate(names)]
