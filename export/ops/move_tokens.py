"""``GatherTokens`` and ``ScatterTokens`` for ONNX: rows by token, any dtype, any number of axes behind the tokens.

GatherTokens(x [B, T, ...], index [B, K])                                      -> [B, K, ...]
ScatterTokens(base [B, T, ...], index [B, K], taken [B, K], rows [B, K, ...])  -> [B, T, ...]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.export.ops._base import (
    BOOL,
    DOMAIN,
    FLOATS,
    INT64,
    VERSION,
    OnnxOperator,
    Type,
    function_text,
    parse,
    register_schema,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

_DATA = Type("T", (*FLOATS, "tensor(int64)", "tensor(int32)", "tensor(bool)"), "The dtype of the tokens.")


class GatherOnnx(OnnxOperator):
    """Rows of the selected tokens."""

    @property
    def torch_op(self) -> str:
        """The torch name."""
        return "depthwire::gather_tokens"

    def translation(self) -> Callable[..., Any]:
        """Return the callable that emits ``GatherTokens``."""
        from onnxscript.values import Opset

        def gather_tokens(x: Any, index: Any) -> Any:
            register_schema(
                "GatherTokens",
                "out[b, j] = x[b, index[b, j]].",
                inputs=[("x", _DATA), ("index", INT64)],
                outputs=[("out", _DATA)],
            )
            return Opset(DOMAIN, VERSION).GatherTokens(x, index)

        return gather_tokens

    def handles(self, op_type: str) -> bool:
        """Tell whether an operator name is this one."""
        return op_type == "GatherTokens"

    def body(self, node: ir.Node, *, opset: int) -> ir.Function:  # noqa: ARG002 - one body for every dtype and rank
        """Return the body."""
        return parse(gather_body(opset=opset))


class ScatterOnnx(OnnxOperator):
    """The computed rows back to their tokens."""

    @property
    def torch_op(self) -> str:
        """The torch name."""
        return "depthwire::scatter_tokens"

    def translation(self) -> Callable[..., Any]:
        """Return the callable that emits ``ScatterTokens``."""
        from onnxscript.values import Opset

        def scatter_tokens(base: Any, index: Any, taken: Any, rows: Any) -> Any:
            register_schema(
                "ScatterTokens",
                "out = base, and out[b, index[b, j]] = rows[b, j] for every taken slot.",
                inputs=[("base", _DATA), ("index", INT64), ("taken", BOOL), ("rows", _DATA)],
                outputs=[("out", _DATA)],
            )
            return Opset(DOMAIN, VERSION).ScatterTokens(base, index, taken, rows)

        return scatter_tokens

    def handles(self, op_type: str) -> bool:
        """Tell whether an operator name is this one."""
        return op_type == "ScatterTokens"

    def body(self, node: ir.Node, *, opset: int) -> ir.Function:
        """Return the body; ONNX Runtime has no Where for bf16 and bool, which go through fp32 unchanged."""
        import onnx_ir as ir

        base = node.inputs[0]
        widen = base is not None and base.dtype in (ir.DataType.BFLOAT16, ir.DataType.BOOL)
        return parse(scatter_body(opset=opset, widen=widen))


def gather_body(*, opset: int) -> str:
    """Return the body of ``GatherTokens``; opset 13 or newer."""
    lines = [
        "two = Constant<value_ints = [2]>()",
        "column = Unsqueeze(index, two)",
        "out = GatherND<batch_dims = 1>(x, column)",
    ]
    return function_text("GatherTokens (x, index) => (out)", lines, opset)


def scatter_body(*, opset: int, widen: bool) -> str:
    """Return the body of ``ScatterTokens``.

    A slot that is not taken writes back what its token holds: the indices are distinct, so no other slot writes there.

    Args:
        opset: Opset of the operators used; 18 or newer.
        widen: Choose between old and new rows in fp32, which is exact for bf16 and bool.
    """
    wide = "Cast<to = 1>" if widen else "Identity"  # TensorProto.FLOAT
    lines = [
        "zero = Constant<value_ints = [0]>()",
        "one = Constant<value_ints = [1]>()",
        "two = Constant<value_ints = [2]>()",
        "column = Unsqueeze(index, two)",
        "held = GatherND<batch_dims = 1>(base, column)",
        # taken as [B, K, 1, ...], with as many axes as the rows.
        "rows_shape = Shape(rows)",
        "rank = Shape(rows_shape)",
        "tail_rank = Sub(rank, two)",
        "tail = Expand(one, tail_rank)",
        "taken_shape = Shape(taken)",
        "mask_shape = Concat<axis = 0>(taken_shape, tail)",
        "mask = Reshape(taken, mask_shape)",
        f"wide_rows = {wide}(rows)",
        f"wide_held = {wide}(held)",
        "wide_update = Where(mask, wide_rows, wide_held)",
        "update = CastLike(wide_update, base)" if widen else "update = Identity(wide_update)",
        # (row, token) of every slot.
        "batch = Slice(taken_shape, zero, one)",
        "from_scalar = Constant<value_int = 0>()",
        "step_scalar = Constant<value_int = 1>()",
        "batch_scalar = Squeeze(batch)",
        "row_numbers = Range(from_scalar, batch_scalar, step_scalar)",
        "axes = Constant<value_ints = [1, 2]>()",
        "row_column = Unsqueeze(row_numbers, axes)",
        "column_shape = Shape(column)",
        "row_grid = Expand(row_column, column_shape)",
        "targets = Concat<axis = 2>(row_grid, column)",
        "out = ScatterND(base, targets, update)",
    ]
    return function_text("ScatterTokens (base, index, taken, rows) => (out)", lines, opset)
