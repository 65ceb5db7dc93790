"""``SurpriseScore(delta [B, T, d], prior [B, T, d], criteria [4], valid [B, T]) {window} -> rank [B, T]`` for ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.export.ops._base import (
    ARITHMETIC,
    BOOL,
    DOMAIN,
    FLOATS,
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

_DELTA = Type("T", FLOATS, "The dtype of the updates.")
_CRITERIA = Type("C", FLOATS, "The dtype of the criteria.")


class SurpriseOnnx(OnnxOperator):
    """The surprise of a layer's update."""

    @property
    def torch_op(self) -> str:
        """The torch name."""
        return "depthwire::surprise_score"

    def translation(self) -> Callable[..., Any]:
        """Return the callable that emits ``SurpriseScore``."""
        from onnxscript.values import Opset

        def surprise_score(delta: Any, prior: Any, criteria: Any, valid: Any, window: int = 100) -> Any:
            register_schema(
                "SurpriseScore",
                "softplus(beta_ce CE) + softplus(beta_cu CU), by which tokens are ranked.",
                inputs=[("delta", _DELTA), ("prior", _DELTA), ("criteria", _CRITERIA), ("valid", BOOL)],
                outputs=[("rank", ARITHMETIC)],
                ints=("window",),
            )
            return Opset(DOMAIN, VERSION).SurpriseScore(delta, prior, criteria, valid, window=int(window))

        return surprise_score

    def handles(self, op_type: str) -> bool:
        """Tell whether an operator name is this one."""
        return op_type == "SurpriseScore"

    def body(self, node: ir.Node, *, opset: int) -> ir.Function:
        """Return the body; updates narrower than fp32 are widened inside."""
        import onnx_ir as ir

        delta = node.inputs[0]
        return parse(surprise_body(opset=opset, double=delta is not None and delta.dtype == ir.DataType.DOUBLE))


def surprise_body(*, opset: int, double: bool = False) -> str:
    """Return the body of ``SurpriseScore``.

    Args:
        opset: Opset of the operators used; 18 or newer.
        double: The updates are fp64.
    """
    cast = f"Cast<to = {11 if double else 1}>"  # TensorProto.DOUBLE, FLOAT
    lines = [
        "zero = Constant<value_ints = [0]>()",
        "one = Constant<value_ints = [1]>()",
        "two = Constant<value_ints = [2]>()",
        "last = Constant<value_ints = [-1]>()",
        "from_scalar = Constant<value_int = 0>()",
        "step_scalar = Constant<value_int = 1>()",
        "shape = Shape(valid)",
        "batch = Slice(shape, zero, one)",
        "tokens = Slice(shape, one, two)",
        "tokens_scalar = Squeeze(tokens)",
        "iota = Range(from_scalar, tokens_scalar, step_scalar)",
        "window_scalar = Constant<value_int: int = @window>()",
        "window_size = Reshape(window_scalar, one)",
        f"wide_delta = {cast}(delta)",
        f"wide_prior = {cast}(prior)",
        f"wide_criteria = {cast}(criteria)",
        "offset, m_cu, beta_ce, beta_cu = Split<axis = 0, num_outputs = 4>(wide_criteria)",
        "delta_square = Mul(wide_delta, wide_delta)",
        "found_static = ReduceMean<keepdims = 0>(delta_square, last)",
        "miss = Sub(wide_delta, wide_prior)",
        "miss_square = Mul(miss, miss)",
        "change = ReduceMean<keepdims = 0>(miss_square, last)",
        # The first valid token's surprise stands for all that comes before it, and for padding.
        "end = Sub(tokens, one)",
        "valid_places = Where(valid, iota, end)",
        "first_place = ReduceMin<keepdims = 1>(valid_places, one)",
        "first = GatherElements<axis = 1>(found_static, first_place)",
        "static = Where(valid, found_static, first)",
        # A row of n values that is repeated and cut into rows of n + 1 becomes all its shifts: row i, column j holds
        # value i + j. Its columns are the windows, in plain copies; their sums are as good as single sums, where a
        # difference of running sums would lose small values behind a large first one.
        "head_shape = Concat<axis = 0>(batch, window_size)",
        "head = Expand(first, head_shape)",
        "long = Concat<axis = 1>(head, static)",
        "copies = Add(window_size, one)",
        "repeats = Concat<axis = 0>(one, copies)",
        "repeated = Tile(long, repeats)",
        "row_length = Add(copies, tokens)",
        "kept_length = Mul(window_size, row_length)",
        "kept = Slice(repeated, zero, kept_length, one)",
        "rows_shape = Concat<axis = 0>(batch, window_size, row_length)",
        "rows = Reshape(kept, rows_shape)",
        "columns_end = Add(tokens, one)",
        "windows = Slice(rows, one, columns_end, two)",
        "average = ReduceMean<keepdims = 0>(windows, one)",
        "surplus = Sub(change, offset)",
        "expected_change = Sub(static, surplus)",
        "usual = Mul(m_cu, average)",
        "unexpected_change = Sub(static, usual)",
        "unit_value = Constant<value_floats = [1.0]>()",
        f"unit = {cast}(unit_value)",
        "null = Sub(unit, unit)",
        "double_unit = Add(unit, unit)",
        "expected = Mul(beta_ce, expected_change)",
        "unexpected = Mul(beta_cu, unexpected_change)",
        *_softplus("expected", double=double),
        *_softplus("unexpected", double=double),
        "found_rank = Add(expected_softplus, unexpected_softplus)",
        "rank = Where(valid, found_rank, null)",
    ]
    return function_text("SurpriseScore <window>(delta, prior, criteria, valid) => (rank)", lines, opset)


def _softplus(z: str, *, double: bool) -> list[str]:
    """Return the lines for max(z, 0) + log(1 + e), e = exp(-|z|).

    Runtimes' Softplus computes log(1 + e) as it stands, which is 0 for every e below 6e-8: tokens of little
    surprise would tie. log(1 + e) = 2 artanh(e / (2 + e)) keeps them apart. ONNX Runtime has no Atanh
    for fp64, whose own 1e-16 is small enough.
    """
    lines = [
        f"{z}_magnitude = Abs({z})",
        f"{z}_minus = Neg({z}_magnitude)",
        f"{z}_power = Exp({z}_minus)",
        f"{z}_above = Max({z}, null)",
    ]
    if double:
        lines += [f"{z}_sum = Add(unit, {z}_power)", f"{z}_log = Log({z}_sum)"]
    else:
        lines += [
            f"{z}_sum = Add(double_unit, {z}_power)",
            f"{z}_ratio = Div({z}_power, {z}_sum)",
            f"{z}_half = Atanh({z}_ratio)",
            f"{z}_log = Mul(double_unit, {z}_half)",
        ]
    return [*lines, f"{z}_softplus = Add({z}_above, {z}_log)"]
