"""Elementwise arithmetic on terms."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import argument, aten, is_call, value
from depthwire.passes.analysis.depth_layout import expanded
from depthwire.passes.analysis.depth_merge import complement
from depthwire.passes.analysis.depth_product import Context, Operand, contract, power
from depthwire.passes.analysis.depth_sums import at_least, blended, plus, plus_constant, plus_number
from depthwire.passes.analysis.depth_values import Const, Dot, Moment, Tainted, Term, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from depthwire.passes.analysis.depth_axes import Dims

Chosen = dict[torch.fx.Node, Value | None]
"""One alternative for each input of a node that is not constant."""

DIVISIONS = (aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode)


def first(context: Context, chosen: Chosen) -> Value | None:
    """Return what the first argument is."""
    source: Any = context.node.args[0]
    return chosen.get(source)


def result(found: Value | None) -> list[Value]:
    """Return the one result of a transfer function, or none."""
    return [] if found is None else [found]


def operand(context: Context, chosen: Chosen, given: object) -> Operand | None:
    """Return what an argument stands for in a product."""
    if isinstance(given, torch.fx.Node):
        if given in context.constants:
            return Const(given, ())
        return chosen.get(given)
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return float(given)
    return None


def rank_of(given: object) -> int:
    """Return the number of dimensions of an argument."""
    return value(given).dim() if isinstance(given, torch.fx.Node) else 0


def broadcast(context: Context, *given: object) -> list[list[int]]:
    """Label the dimensions of broadcast operands by their place in the result."""
    rank = value(context.node).dim()
    return [list(range(rank - rank_of(each), rank)) for each in given]


def lost(context: Context, given: Sequence[Operand | None], reason: str = "unsupported") -> Tainted | None:
    """Return the loss of a normal form, for operands of the shape of the result; what was lost before says why."""
    rank = value(context.node).dim()
    deep = [each for each in given if isinstance(each, (Term, Tainted)) and each.deep and len(each.dims) == rank]
    if not deep:
        return None
    before = next((each for each in deep if isinstance(each, Tainted)), None)
    wide = next((each for each in deep if isinstance(each, Term)), deep[0])
    return Tainted(wide.dims, reason, context.node) if before is None else replace(before, dims=wide.dims)


def with_dims(term: Value, dims: Dims) -> Value:
    """Return a value with other dimensions."""
    return replace(term, dims=dims)


def product(context: Context, chosen: Chosen) -> list[Value]:
    """``mul``, and ``div`` by a term, a constant or a number."""
    node = context.node
    left, right = (operand(context, chosen, each) for each in node.args[:2])
    if left is None or right is None:
        return []
    if is_call(node, *DIVISIONS):
        if argument(node, 2, "rounding_mode") is not None:
            return []
        inverted = _inverse(context, right)
        if inverted is None:
            return result(lost(context, [left, right]))
        right = inverted
    if isinstance(right, Const) and is_call(node, *DIVISIONS):
        return []
    return result(contract(context, [left, right], broadcast(context, *node.args[:2]), range(value(node).dim())))


def _inverse(context: Context, given: Operand) -> Operand | None:
    if isinstance(given, float):
        return 1.0 / given if given else None
    if isinstance(given, Const):
        number = context.constants.number(given.node)
        return 1.0 / number if number else None
    return power(given, -1.0) if isinstance(given, Term) else None


def raised(exponent: float | None) -> Callable[[Context, Chosen], list[Value]]:
    """Return ``x ** exponent``; the exponent is the second argument if it is not given."""

    def transfer(context: Context, chosen: Chosen) -> list[Value]:
        term = first(context, chosen)
        number: Any = exponent if exponent is not None else context.node.args[1]
        found = power(term, float(number)) if isinstance(term, Term) and isinstance(number, (int, float)) else None
        return result(found if found is not None else lost(context, [term]))

    return transfer


def clamped(context: Context, chosen: Chosen) -> list[Value]:
    """``clamp`` from below."""
    node, term = context.node, first(context, chosen)
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    norm = isinstance(term, Term) and term.find(Moment) is not None and term.find(Dot) is None
    plain = isinstance(term, Term) and isinstance(low, (int, float)) and high is None
    found = at_least(term, float(low)) if plain else None  # type: ignore[arg-type]
    return result(found if found is not None else lost(context, [term], "norm-eps" if norm else "unsupported"))


def negative(context: Context, chosen: Chosen) -> list[Value]:
    """``-x``."""
    term = first(context, chosen)
    return (
        []
        if term is None
        else result(contract(context, [term, -1.0], broadcast(context, context.node.args[0], 0), range(len(term.dims))))
    )


def addition(context: Context, chosen: Chosen) -> list[Value]:
    """``add`` and ``sub``."""
    node = context.node
    sign = -1.0 if is_call(node, aten.sub.Tensor, aten.sub.Scalar) else 1.0
    left, right = (operand(context, chosen, each) for each in node.args[:2])
    if argument(node, 2, "alpha", 1) != 1 or left is None or right is None:
        return []
    if sign == 1.0 and isinstance(left, (float, Const)):
        left, right = right, left
    if not isinstance(left, (Term, Tainted)):
        return _from_one(context, left, right) if sign == -1.0 else []
    dims = _sum_dims(context, left, right)
    if isinstance(right, (Term, Tainted)):
        return result(plus(context, left, right, sign, dims))
    number = right if isinstance(right, float) else _number(context, left, right.node)
    if isinstance(right, Const) and number is None:
        return result(plus_constant(context, left, right.node, sign, dims))
    shifted = plus_number(left, sign * (number or 0.0)) if isinstance(left, Term) else left
    if shifted is not None:
        return result(with_dims(shifted, dims))
    root = isinstance(left, Term) and left.find(Moment) is not None and not left.power and left.find(Dot) is None
    return result(lost(context, [left], "norm-eps" if root else "unsupported"))


def reversed_subtraction(context: Context, chosen: Chosen) -> list[Value]:
    """``rsub``: the second argument minus the first."""
    node, given = context.node, context.node.args[1]
    if argument(node, 2, "alpha", 1) != 1 or not isinstance(given, (int, float)):
        return []
    return _from_one(context, float(given), first(context, chosen))


def _from_one(context: Context, left: Operand, right: Operand | None) -> list[Value]:
    """``1 - x`` for the share of a part in a softmax."""
    number = left if isinstance(left, float) else None
    if isinstance(left, Const) and value(left.node).numel() == 1:
        number = context.constants.number(left.node)
    found = complement(context, right) if number == 1.0 and isinstance(right, Term) else None
    return result(found if found is not None else lost(context, [right]))


def interpolation(context: Context, chosen: Chosen) -> list[Value]:
    """``lerp`` between parts of a softmax."""
    given = [chosen.get(each) for each in context.node.args[:3] if isinstance(each, torch.fx.Node)]
    if len(given) < 3 or not all(isinstance(each, Term) for each in given):
        return []
    start, end, weight = given
    return result(blended(context, start, end, weight))  # type: ignore[arg-type]


def _number(context: Context, term: Value, node: torch.fx.Node) -> float | None:
    if value(node).numel() > 1 and not term.deep:
        return None
    return context.constants.number(node)


def _sum_dims(context: Context, left: Value, right: Operand) -> Dims:
    """Return the dimensions of a sum: those of the deep operand, or else of the left one, broadcast."""
    shape = [int(size) for size in value(context.node).shape]
    chosen = right if isinstance(right, (Term, Tainted)) and right.deep and not left.deep else left
    return expanded(chosen.dims, shape)
