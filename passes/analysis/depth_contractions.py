"""Matrix products of every kind, and attention, as labelled contractions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from depthwire.passes._match import argument, aten, value
from depthwire.passes.analysis.depth_axes import DEPTH, has_axis
from depthwire.passes.analysis.depth_product import Context, Operand, contract
from depthwire.passes.analysis.depth_softmax import over_depth, softmax
from depthwire.passes.analysis.depth_sums import plus_number
from depthwire.passes.analysis.depth_values import Tainted, Term, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Given = Callable[[object], Operand | None]
    Labels = Sequence[str | int]


def _rank(given: object) -> int:
    return int(value(given).dim())  # type: ignore[arg-type]


def _run(
    context: Context, given: Given, arguments: Sequence[object], labels: Sequence[Labels], out: Labels
) -> list[Value]:
    operands = [given(each) for each in arguments]
    if any(operand is None for operand in operands):
        return []
    found = contract(context, [each for each in operands if each is not None], labels, out)
    return [] if found is None else [found]


def _einsum(context: Context, given: Given) -> list[Value]:
    equation, listed = context.node.args[:2]
    parsed = parse_einsum(str(equation), [_rank(each) for each in listed])  # type: ignore[union-attr]
    return [] if parsed is None else _run(context, given, list(listed), *parsed)  # type: ignore[arg-type]


def parse_einsum(equation: str, ranks: Sequence[int]) -> tuple[list[list[str | int]], list[str | int]] | None:
    """Return the labels of the operands and of the result; an ellipsis becomes numbers, counted from the right.

    ``None`` for a diagonal (one label twice in an operand).
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    labels: list[list[str | int]] = []
    widest = 0
    for text, rank in zip(left.split(","), ranks, strict=True):
        before, dots, after = text.partition("...")
        count = rank - len(before) - len(after) if dots else 0
        widest = max(widest, count)
        names: list[str | int] = [*before, *range(-count, 0), *after]
        if len(set(names)) != len(names) or len(names) != rank:
            return None
        labels.append(names)
    if arrow:
        before, dots, after = right.partition("...")
        return labels, [*before, *(range(-widest, 0) if dots else ()), *after]
    flat = [name for names in labels for name in names]
    once = sorted(name for name in flat if isinstance(name, str) and flat.count(name) == 1)
    return labels, [*range(-widest, 0), *once]


def _matmul(context: Context, given: Given) -> list[Value]:
    """``matmul``, ``mm``, ``bmm``, ``mv`` and ``dot``: one rule for all ranks."""
    left, right = context.node.args[:2]
    a, b = _rank(left), _rank(right)
    batch = max(a, b) - 2
    first: list[str | int] = ["k"] if a == 1 else [*range(-(a - 2), 0), "m", "k"]
    second: list[str | int] = ["k"] if b == 1 else [*range(-(b - 2), 0), "k", "n"]
    out = [*range(-max(batch, 0), 0), *(["m"] if a > 1 else []), *(["n"] if b > 1 else [])]
    return _run(context, given, (left, right), (first, second), out)


def _linear(context: Context, given: Given) -> list[Value]:
    """``linear``, with at most one number as bias."""
    bias = argument(context.node, 2, "bias")
    if bias is not None:
        number = context.constants.number(bias) if bias in context.constants and value(bias).numel() == 1 else None
        product = [] if number is None else _times(context, given)
        shifted = [plus_number(each, number or 0.0) for each in product if isinstance(each, Term)]
        return [each for each in shifted if each is not None]
    return _times(context, given)


def _times(context: Context, given: Given) -> list[Value]:
    tensor, weight = context.node.args[:2]
    rank = _rank(tensor)
    names: list[str | int] = [*range(-(rank - 1), 0), "k"]
    if _rank(weight) == 1:
        return _run(context, given, (tensor, weight), (names, ["k"]), names[:-1])
    return _run(context, given, (tensor, weight), (names, ["o", "k"]), [*names[:-1], "o"])


def _inner(context: Context, given: Given) -> list[Value]:
    left, right = context.node.args[:2]
    first: list[str | int] = [*(f"a{i}" for i in range(_rank(left) - 1)), "k"]
    second: list[str | int] = [*(f"b{i}" for i in range(_rank(right) - 1)), "k"]
    return _run(context, given, (left, right), (first, second), [*first[:-1], *second[:-1]])


def _vecdot(context: Context, given: Given) -> list[Value]:
    left, right = context.node.args[:2]
    axis = int(argument(context.node, 2, "dim", -1))
    rank = max(_rank(left), _rank(right))
    first, second = range(-_rank(left), 0), range(-_rank(right), 0)
    out = [label for label in range(-rank, 0) if label != (axis if axis < 0 else axis - rank)]
    return _run(context, given, (left, right), (first, second), out)


def _tensordot(context: Context, given: Given) -> list[Value]:
    left, right, dims_left, dims_right = context.node.args[:4]
    first: list[str | int] = [f"a{i}" for i in range(_rank(left))]
    second: list[str | int] = [f"b{i}" for i in range(_rank(right))]
    pairs = [(int(i) % len(first), int(j) % len(second)) for i, j in zip(dims_left, dims_right, strict=True)]  # type: ignore[arg-type]
    out = [n for i, n in enumerate(first) if i not in {p[0] for p in pairs}]
    out += [n for j, n in enumerate(second) if j not in {p[1] for p in pairs}]
    for i, j in pairs:
        second[j] = first[i]
    return _run(context, given, (left, right), (first, second), out)


def attention(context: Context, given: Given) -> list[Value]:
    """``scaled_dot_product_attention`` whose keys are stacked sources: logits, softmax and mix in one."""
    node = context.node
    query, key, values = (given(each) for each in node.args[:3])
    if query is None or values is None or not isinstance(key, (Term, Tainted)) or len(key.dims) < 2:
        return []
    one = isinstance(key, Term) and over_depth(key, key.dims[-2])
    if not one and not has_axis([key.dims[-2]], DEPTH):
        return []  # attention over something else
    found = _attended(context, query, key, values)
    if isinstance(found, Term):
        return [found]
    tainted = context.taint(key.dims, found)
    return [] if tainted is None else [tainted]


def _attended(context: Context, query: Operand, key: Value, values: Operand) -> Term | str:  # noqa: PLR0911 - a reason each
    """Return the mix, or why there is none."""
    node = context.node
    if isinstance(key, Tainted):
        return key.reason
    if not over_depth(key, key.dims[-2]):
        return "joint-softmax"
    if argument(node, 3, "attn_mask") is not None or any(argument(node, *each) for each in _RESTRICTIONS):
        return "masked"
    ranks = [_rank(each) for each in node.args[:3]]
    batch: list[str | int] = list(range(-(max(ranks) - 2), 0))
    first, second, third = (
        [*batch[len(batch) - rank + 2 :], *names] for rank, names in zip(ranks, _NAMES, strict=True)
    )
    given = argument(node, 6, "scale")
    scale = 1.0 / math.sqrt(int(value(node.args[1]).shape[-1])) if given is None else float(given)  # type: ignore[arg-type]
    logits = contract(context, [query, key, scale], [first, second, []], [*batch, "l", "s"])
    if not isinstance(logits, Term):
        return "query-depends-on-input" if logits is None else logits.reason
    weights = softmax(context, logits)
    if isinstance(weights, str):
        return weights
    mixed = contract(context, [weights, values], [[*batch, "l", "s"], third], [*batch, "l", "v"])
    if isinstance(mixed, Term):
        return mixed
    return "values-differ" if mixed is None else mixed.reason


_NAMES = ("le", "se", "sv")
_RESTRICTIONS = ((4, "dropout_p"), (5, "is_causal"), (7, "enable_gqa"))
CONTRACTIONS: dict[object, Callable[[Context, Given], list[Value]]] = {
    aten.einsum.default: _einsum,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mv.default: _matmul,
    aten.dot.default: _matmul,
    aten.linear.default: _linear,
    aten.inner.default: _inner,
    aten.linalg_vecdot.default: _vecdot,
    aten.tensordot.default: _tensordot,
}
