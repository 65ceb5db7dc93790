"""Which axis of which value runs over the batch, and what each operator needs where the batch's size becomes free.

A graph captured at batch B is followed from its inputs. What is claimed of a value with a mark is this: cut at row b of
the batch, it is what the captured graph computes from row b of the inputs. Every rule below keeps that true for one
operator or refuses it, so that a mark that was followed wrongly ends in a refusal further on, never in other numbers.
That is also why a batch of 1 can be followed although other axes have one element: where several axes may be the batch
(only a ``Reshape`` leaves a choice), each of them keeps the claim true for that operator, and the one that stays in its
place is taken.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from depthwire.runtime._batch_call import Call, Mark, Marks
from depthwire.runtime._batch_own import own_rule
from depthwire.runtime._onnx_shapes import DOMAIN, ints_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from depthwire.runtime._batch_call import Rule

_INT32_MAX = 2**31 - 1


def follow(call: Call) -> Marks:
    """Return the marks of a node's results, and fill in what has to change in the node.

    Raises:
        NotFollowedError: The operator mixes rows of the batch, or has no rule.
    """
    if any(attribute.HasField("g") or attribute.graphs for attribute in call.node.attribute):
        raise call.refuse("it holds a graph of its own, which may see any value")
    if all(mark is None for mark in call.marks):
        return (None,) * len(call.out)
    kind = call.node.op_type
    if call.node.domain == DOMAIN:
        rule = own_rule(kind)
    else:
        rule = _RULES.get(kind) if call.node.domain in {"", "ai.onnx"} else None
    if rule is None:
        raise call.refuse("nothing is known of what this operator does with the rows of the batch")
    found = rule(call)
    return found if isinstance(found, tuple) else (found,) * len(call.out)


def _attribute(call: Call, name: str, default: int) -> int:
    return (ints_of(call.node, name) or [default])[0]


def _axis(call: Call, default: int) -> int:
    rank = len(call.shapes[0])
    return _attribute(call, "axis", default) % rank if rank else 0


def _first(call: Call) -> Mark:
    mark = call.marks[0]
    if mark is None or any(other is not None for other in call.marks[1:]):
        raise call.refuse("another operand than the first depends on the batch")
    return mark


def _broadcast(call: Call) -> Mark:
    """Element by element, operands aligned at their last axes."""
    return _aligned(call, range(len(call.shapes)), len(call.out[0]))


def _aligned(call: Call, positions: range, rank: int) -> Mark:
    places: set[tuple[int, int, int]] = set()
    for position in positions:
        each = call.marks[position]
        if each is not None:
            shape = call.shapes[position]
            places.add((each.axis + rank - len(shape), each.inner, shape[each.axis]))
    if len(places) != 1:
        raise call.refuse("operands have the batch in different places")
    mark = Mark(*places.pop()[:2])
    for position in positions:
        axis = mark.axis - rank + len(call.shapes[position])
        if call.marks[position] is not None or axis < 0 or not call.node.input[position]:
            continue
        if mark.inner != 1 and call.shapes[position][axis] != 1:
            raise call.refuse(f"operand {position} is aligned with the batch and the axes merged with it")
        call.single(position, axis)
    return mark


def _along(default: int, *, behind: bool = False) -> Callable[[Call], Mark]:
    """Along one axis, or with ``behind`` from that axis on, which is not the batch."""

    def rule(call: Call) -> Mark:
        mark, axis = _first(call), _axis(call, default)
        if mark.axis == axis or (behind and mark.axis > axis):
            raise call.refuse(f"it works along axis {axis}, which holds the batch")
        return mark

    return rule


def _reduced(call: Call) -> Mark:
    mark, rank = _first(call), len(call.shapes[0])
    given = ints_of(call.node, "axes") or (call.known(1) if len(call.shapes) > 1 and call.node.input[1] else [])
    if not given and _attribute(call, "noop_with_empty_axes", 0):
        return mark
    return _without(call, mark, {axis % rank for axis in given} or set(range(rank)), _attribute(call, "keepdims", 1))


def _argument(call: Call) -> Mark:
    return _without(call, _first(call), {_axis(call, 0)}, _attribute(call, "keepdims", 1))


def _without(call: Call, mark: Mark, axes: set[int], keep: int) -> Mark:
    if mark.axis in axes:
        raise call.refuse("it reduces over the batch")
    return mark if keep else Mark(mark.axis - sum(axis < mark.axis for axis in axes), mark.inner)


def _transposed(call: Call) -> Mark:
    mark = _first(call)
    order = ints_of(call.node, "perm") or list(reversed(range(len(call.shapes[0]))))
    return Mark(order.index(mark.axis), mark.inner)


def _unsqueezed(call: Call) -> Mark:
    mark, rank = _first(call), len(call.out[0])
    new = {axis % rank for axis in call.known(1)}
    return Mark([axis for axis in range(rank) if axis not in new][mark.axis], mark.inner)


def _squeezed(call: Call) -> Mark:
    if len(call.shapes) < 2 or not call.node.input[1]:
        raise call.refuse("it drops every axis of one element, that of the batch among them")
    axes = {axis % len(call.shapes[0]) for axis in call.known(1)}
    return _without(call, _first(call), axes, 0)


def _reshaped(call: Call) -> Mark:
    mark, before, after = _first(call), call.shapes[0], call.out[0]
    if 0 in after:
        raise call.refuse("it makes an empty value")
    stride = mark.inner * math.prod(before[mark.axis + 1 :])
    places = []
    for axis, size in enumerate(after):
        inner, rest = divmod(stride, math.prod(after[axis + 1 :]))
        if not rest and inner and size % (call.batch * inner) == 0:
            alone = inner == 1 and size == call.batch
            stays = axis == mark.axis and before[:axis] == after[:axis]
            places.append((not alone, not stays, inner, Mark(axis, inner)))
    if not places:
        raise call.refuse(f"the batch cannot be found in the shape {list(after)}")
    found = min(places, key=lambda place: place[:3])[3]
    same = found == mark and before[mark.axis] == after[found.axis]
    target = call.known(1)
    for axis, size in enumerate(target):
        if axis == found.axis:
            target[axis] = 0 if same else -1
        elif (size == -1 and not same) or (size == 0 and axis == mark.axis):
            call.frozen |= size == -1
            target[axis] = after[axis]
    call.target = target
    return found


def _flattened(call: Call) -> Mark:
    mark, before, axis = _first(call), call.shapes[0], _attribute(call, "axis", 1) % (len(call.shapes[0]) + 1)
    end = axis if mark.axis < axis else len(before)
    return Mark(int(mark.axis >= axis), mark.inner * math.prod(before[mark.axis + 1 : end]))


def _expanded(call: Call) -> Mark:
    mark, target, rank = _first(call), call.known(1), len(call.out[0])
    found = Mark(mark.axis + rank - len(call.shapes[0]), mark.inner)
    if call.out[0][found.axis] != call.shapes[0][mark.axis]:
        raise call.refuse("it repeats the batch")
    at = found.axis - rank + len(target)
    if at >= 0:
        target[at] = 1  # one element more on the axis leaves the operand's own length
    call.target = target
    return found


def _sliced(call: Call) -> Mark:
    mark, rank = _first(call), len(call.shapes[0])
    starts, ends = call.known(1), call.known(2)
    axes = call.known(3) if len(call.shapes) > 3 and call.node.input[3] else list(range(len(starts)))
    steps = call.known(4) if len(call.shapes) > 4 and call.node.input[4] else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if axis % rank == mark.axis and ((start, step) != (0, 1) or end < _INT32_MAX):
            raise call.refuse("it takes a part of the batch")
    return mark


def _joined(call: Call) -> Mark:
    places = {mark for mark in call.marks if mark is not None}
    if len(places) != 1:
        raise call.refuse("operands have the batch in different places")
    (mark,) = places
    if mark.axis == _axis(call, 0):
        raise call.refuse("it joins along the batch")
    if None in call.marks:
        axis = call.own_axis(next(at for at, each in enumerate(call.marks) if each is not None))
        for position in range(len(call.shapes)):
            call.need(position, axis)
    return mark


def _gathered(call: Call) -> Mark:
    axis, (data, indices) = _axis(call, 0), call.marks
    if data is not None and indices is not None:
        raise call.refuse("it looks up rows of the batch by numbers that depend on the batch")
    if indices is not None:
        return Mark(indices.axis + axis, indices.inner)
    mark = _first(call)
    if mark.axis == axis:
        raise call.refuse("it takes a part of the batch")
    return mark if mark.axis < axis else Mark(mark.axis + len(call.shapes[1]) - 1, mark.inner)


def _by_element(call: Call) -> Mark:
    """``GatherElements`` and ``ScatterElements``: all operands have the batch."""
    axis = call.own_axis(next(at for at, each in enumerate(call.marks) if each is not None))
    if axis == _axis(call, 0):
        raise call.refuse("it moves elements along the batch")
    for position in range(len(call.shapes)):
        call.need(position, axis)
    return Mark(axis)


def _product(call: Call) -> Mark:
    (left, right), ranks = call.marks, [len(shape) for shape in call.shapes]
    if min(ranks) < 2:
        raise call.refuse("an operand is a vector")
    rank = len(call.out[0])
    if (left is not None and left.axis == ranks[0] - 1) or (right is not None and right.axis == ranks[1] - 2):
        raise call.refuse("it sums over the batch")
    if left is not None and right is None and left.axis == ranks[0] - 2:
        return Mark(rank - 2, left.inner)
    if right is not None and left is None and right.axis == ranks[1] - 1:
        return Mark(rank - 1, right.inner)
    mark = _aligned(call, range(2), rank)
    if mark.axis >= rank - 2:
        raise call.refuse("it multiplies rows of the batch with one another")
    return mark


def _gemm(call: Call) -> Mark:
    left, right = call.marks[:2]
    rows = int(bool(_attribute(call, "transA", 0)))
    if left is None or right is not None or left.axis != rows or any(call.marks[2:]):
        raise call.refuse("only the rows of its first operand may be the batch")
    if len(call.shapes) > 2 and len(call.shapes[2]) == 2 and call.shapes[2][0] != 1:
        raise call.refuse("its third operand has several rows")
    return Mark(0, left.inner)


def _leading(call: Call) -> Mark:
    """The batch is axis 0 of the first operand; the others serve every row."""
    if _first(call) and call.own_axis() != 0:
        raise call.refuse("it has the batch at another axis than 0")
    return Mark(0)


def _attention(call: Call) -> Mark:
    for position, name in enumerate(call.node.input):
        if name and position != 3:
            call.need(position, 0)
    if len(call.shapes) > 3 and call.node.input[3]:
        if call.marks[3] is not None and (len(call.shapes[3]) != 4 or call.own_axis(3) != 0):
            raise call.refuse("its mask has the batch at another axis than 0 of 4")
        if call.marks[3] is None and len(call.shapes[3]) == 4:
            call.single(3, 0)
    return Mark(0)


def _rotary(call: Call) -> Mark:
    call.need(0, 0)
    for position in range(1, len(call.shapes)):
        # Tables [tokens, width] serve all rows; those of rank 3, and positions, have a row for each.
        if call.node.input[position] and len(call.shapes[position]) == (2 if position == 3 else 3):
            call.need(position, 0)
    return Mark(0)


def _quantised(call: Call) -> Mark:
    mark = _first(call)
    scale = call.shapes[1]
    if len(scale) > 1 or (scale not in {(), (1,)} and mark.axis == _axis(call, 1)):
        raise call.refuse("its scales run along the batch")
    return mark


def _padded(call: Call) -> Mark:
    mark, rank, pads = _first(call), len(call.shapes[0]), call.known(1)
    axes = call.known(3) if len(call.shapes) > 3 and call.node.input[3] else list(range(rank))
    for at, axis in enumerate(axes):
        if axis % rank == mark.axis and (pads[at] or pads[at + len(axes)]):
            raise call.refuse("it pads the batch")
    return mark


def _triangle(call: Call) -> Mark:
    mark = _first(call)
    if mark.axis >= len(call.shapes[0]) - 2:
        raise call.refuse("it works along the batch")
    return mark


def _summed_along(call: Call) -> Mark:
    mark = _first(call)
    if call.known(1)[0] % len(call.shapes[0]) == mark.axis:
        raise call.refuse("it works along the batch")
    return mark


def _cast_like(call: Call) -> Mark | None:
    return call.marks[0]  # of the second operand only its type matters


def _names(text: str) -> list[str]:
    return text.split()


_ELEMENTWISE = _names(
    "Abs Add And BitShift Cast Ceil Celu Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid "
    "HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Min Mish Mod Mul Neg Not Or PRelu Pow "
    "Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh Where Xor"
)
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")

_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _broadcast),
    **dict.fromkeys((f"Reduce{kind}" for kind in _REDUCTIONS), _reduced),
    **dict.fromkeys(("ArgMax", "ArgMin"), _argument),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "TopK"), _along(-1)),
    **dict.fromkeys(("RMSNormalization", "LayerNormalization"), _along(-1, behind=True)),
    **dict.fromkeys(("Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "GroupNormalization"), _leading),
    **dict.fromkeys(("GatherElements", "ScatterElements"), _by_element),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantised),
    "Attention": _attention,
    "CastLike": _cast_like,
    "Concat": _joined,
    "CumSum": _summed_along,
    "Expand": _expanded,
    "Flatten": _flattened,
    "Gather": _gathered,
    "Gemm": _gemm,
    "MatMul": _product,
    "Pad": _padded,
    "Reshape": _reshaped,
    "RotaryEmbedding": _rotary,
    "Slice": _sliced,
    "Split": _along(0),
    "Squeeze": _squeezed,
    "Transpose": _transposed,
    "Trilu": _triangle,
    "Unsqueeze": _unsqueezed,
}
