"""Additions: eps onto a mean square, a bias onto logits, a shift of all logits, and partial sums of a mix."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from depthwire.passes._match import value
from depthwire.passes.analysis.depth_axes import DEPTH, Dims, has_axis
from depthwire.passes.analysis.depth_constants import spread
from depthwire.passes.analysis.depth_softmax import minus_log_sum, over_depth
from depthwire.passes.analysis.depth_values import Dot, LogSum, Mix, Moment, Term, Value

if TYPE_CHECKING:
    import torch

    from depthwire.passes.analysis.depth_product import Context


_NEGLIGIBLE = 1e-24 * (1.0 + 1e-9)  # mean square; the norm's default is 1e-12


def plus_number(term: Term, number: float) -> Term | None:
    """Return a term plus a number."""
    if number == 0.0:
        return term
    if len(term.factors) == 1 and not term.power and term.bias is None:
        ((factor, exponent),) = term.factors
        if isinstance(factor, Moment) and exponent == 1.0 and term.scalar > 0:
            eps = factor.eps + number / term.scalar
            return replace(term, factors=frozenset({(Moment(factor.axis, eps), 1.0)}))
    if term.find(Dot) is None or term.bank is None or term.power:
        return None
    bias = term.bias or (0.0,) * len(term.bank)
    return replace(term, bias=tuple(each + number for each in bias))


def at_least(term: Term, number: float) -> Term | None:
    """Return ``max(term, number)`` for a root mean square or one of its powers.

    ``1 / max(|v|, δ)`` (``functional.normalize``) is written as ``1 / sqrt(|v|² + δ²)``. Both are 1/δ at zero;
    elsewhere they differ by a factor of at most ``sqrt(1 + δ²/|v|²)``, which no fp32 number shows once |v| > 3000 δ.
    So δ has to be so small that no activations come near it: δ² at most 1e-24 in the mean square.
    """
    if len(term.factors) != 1 or term.power or term.bias is not None or term.scalar <= 0:
        return None
    ((factor, exponent),) = term.factors
    if not isinstance(factor, Moment) or exponent <= 0:
        return None
    floor = (max(number, 0.0) / term.scalar) ** (1.0 / exponent)
    if floor <= factor.eps:
        return term  # it never acts
    if factor.eps or floor > _NEGLIGIBLE:
        return None
    return replace(term, factors=frozenset({(Moment(factor.axis, floor), exponent)}))


def plus_constant(context: Context, term: Value, node: torch.fx.Node, sign: float, dims: Dims) -> Value | None:
    """Return a term plus a constant that is no single number: a bias per source, or a shift of all logits."""
    if not isinstance(term, Term) or term.find(Dot) is None or term.power or term.bank is None or not term.deep:
        return context.taint(dims, "unsupported")
    offset = len(dims) - value(node).dim()
    varying = [dims[position + offset] for position, varies in enumerate(spread(node)) if varies]
    if not any(has_axis([dim], DEPTH) for dim in varying):
        return replace(term, dims=dims, shift=(context.node.name, term.shift))
    if len(varying) != 1 or not over_depth(term, varying[0]):
        return context.taint(dims, "bias-per-token")
    tensor = context.constants.tensor(node)
    for position, varies in enumerate(spread(node)):
        if not varies:
            tensor = tensor.narrow(position, 0, 1)
    numbers = [sign * float(each) for each in tensor.reshape(-1)]
    old = term.bias or (0.0,) * len(term.bank)
    return replace(term, dims=dims, bias=tuple(a + b for a, b in zip(old, numbers, strict=True)))


def plus(context: Context, left: Value, right: Value, sign: float, dims: Dims) -> Value | None:
    """Return ``left + sign · right``."""
    if not isinstance(left, Term) or not isinstance(right, Term):
        return next(
            (
                replace(each, dims=dims)
                for each in (left, right)
                if not isinstance(each, Term) and has_axis(dims, DEPTH)
            ),
            None,
        )
    mixed = _mixes(left, right) if sign == 1.0 else None
    if mixed is not None:
        return replace(mixed, dims=dims)
    total = right.only(LogSum)
    if total is not None and sign == -1.0 and left.bank is not None:
        log = minus_log_sum(context, left, total) if _fits(right.dims, dims) else None
        return None if log is None else replace(log, dims=dims)
    if left.find(Dot) is None and right.find(Dot) is not None and sign == 1.0:
        left, right = right, left
    if left.find(Dot) is not None and left.deep and not left.power:
        axis = next(index for index, dim in enumerate(reversed(dims)) if has_axis([dim], DEPTH))
        if len(right.dims) <= axis or not right.dims[-1 - axis]:
            return replace(left, dims=dims, shift=(context.node.name, left.shift))
        return context.taint(dims, "bias-depends-on-input")
    centred = left.power == 1 and right.find(Dot) is not None and sign == -1.0
    return context.taint(dims, "layer-norm-keys" if centred else "unsupported")


def _fits(dims: Dims, wide: Dims) -> bool:
    """Tell whether a term that is broadcast runs over the same axes as the other."""
    return all(not dim or dim == other for dim, other in zip(reversed(dims), reversed(wide), strict=False))


def _mixes(left: Term, right: Term) -> Term | None:
    """Join two parts of one mix."""
    a, b = left.find(Mix), right.find(Mix)
    if a is None or b is None or a.mask & b.mask or left.dims != right.dims or left.scalar != right.scalar:
        return None
    if replace(a, mask=0) != replace(b, mask=0) or left.fixed != right.fixed:
        return None
    if left.factors - {(a, 1.0)} != right.factors - {(b, 1.0)} or (a, 1.0) not in left.factors:
        return None
    both = replace(a, mask=a.mask | b.mask)
    return replace(left, factors=(left.factors - {(a, 1.0)}) | {(both, 1.0)})
