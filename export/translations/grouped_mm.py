"""``grouped_mm(x [S, K], w [E, K, N], ends [E])`` -> ``[S, N]``: rows ``ends[e-1] … ends[e]`` times ``w[e]``.

ONNX has no such operator, and where the runs end is known only at run time. The expert of a row is the number of runs
that end at or before it, which is right for every split, empty runs included. Rows behind the last run give zero, as in
transformers' operator (in aten's they are undefined).

* S > E: every row times every matrix ``[E, S, N]``, then each row's own product is gathered: E times the arithmetic.
* S ≤ E: each row's own matrix is gathered ``[S, K, N]``: the least arithmetic, and S matrices are copied.

Sparse experts as transformers writes them do not come here: the pass ``legalize_experts`` takes the sort away first,
which costs S/T times less.
"""

from __future__ import annotations

from typing import Any


def grouped_mm(rows: Any, weight: Any, offs: Any) -> Any:
    """Emit the product; shapes are static.

    Args:
        rows: ``[S, K]`` float.
        weight: ``[E, K, N]`` of the same dtype.
        offs: ``[E]`` int32 or int64, ascending.
    """
    import onnx_ir as ir
    from onnxscript import opset18 as op

    count, (experts, _, width) = int(rows.shape[0]), (int(size) for size in weight.shape)
    int64 = ir.DataType.INT64
    position = op.Constant(value_ints=list(range(count)))
    last = op.Constant(value_ints=[-1])
    first = op.Constant(value_ints=[0])
    middle = op.Constant(value_ints=[1])
    ended = op.GreaterOrEqual(op.Unsqueeze(position, last), op.Unsqueeze(op.Cast(offs, to=int64), first))
    expert = op.ReduceSum(op.Cast(ended, to=int64), last, keepdims=0)
    own = op.Min(expert, op.Constant(value_ints=[experts - 1]))
    if count <= experts:
        product = op.Squeeze(op.MatMul(op.Unsqueeze(rows, middle), op.Gather(weight, own, axis=0)), middle)
    else:
        every = op.MatMul(op.Unsqueeze(rows, first), weight)
        flat = op.Reshape(every, op.Constant(value_ints=[experts * count, width]))
        place = op.Add(op.Mul(own, op.Constant(value_ints=[count])), position)
        product = op.Gather(flat, place, axis=0)
    behind = op.Unsqueeze(op.Equal(expert, op.Constant(value_ints=[experts])), last)
    return op.Where(behind, op.CastLike(op.Constant(value_float=0.0), product), product)


def aten_grouped_mm(self: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: int | None = None) -> Any:
    """Emit ``aten._grouped_mm`` of rows ``[S, K]`` by matrices ``[E, K, N]``.

    Raises:
        NotImplementedError: Another form of the operator: a grouped second operand, a bias, or another dtype.
    """
    if len(self.shape) != 2 or len(mat2.shape) != 3 or offs is None or bias is not None or out_dtype is not None:
        raise NotImplementedError("aten._grouped_mm other than rows [S, K] by matrices [E, K, N]")
    return grouped_mm(self, mat2, offs)
