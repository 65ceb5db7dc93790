"""Additions: eps onto a mean square, a bias onto logits, a shift of all logits, and parts of a mix or a softmax."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from depthwire.passes._match import TRANSPARENT, aten, is_call, value
from depthwire.passes.analysis.depth_axes import DEPTH, Dims, has_axis, sizes
from depthwire.passes.analysis.depth_constants import spread
from depthwire.passes.analysis.depth_merge import Opaque, added, complement, difference, level, merged, symbols, total
from depthwire.passes.analysis.depth_product import multiply, scaled
from depthwire.passes.analysis.depth_softmax import log_weights, logits_of, over_depth
from depthwire.passes.analysis.depth_values import Difference, Dot, Level, Logits, LogSum, Moment, Term, Value

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
        return replace(term, dims=dims, shift=added(term.shift, frozenset({(Opaque(context.node), 1.0)})))
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
    joined = _joined(context, left, right, sign, dims)
    if joined is not None:
        return joined
    if left.find(Dot) is None and right.find(Dot) is not None and (sign == 1.0 or _are_logits(context, right, dims)):
        turned = scaled(right, sign)
        if turned is not None and not (sign < 0 and right.deep):
            left, right, sign = turned, left, 1.0
    if _are_logits(context, left, dims):
        return _shifted(context, left, right, sign, dims)
    centred = left.power == 1 and right.find(Dot) is not None and sign == -1.0
    return context.taint(dims, "layer-norm-keys" if centred else "unsupported")


def _joined(context: Context, left: Term, right: Term, sign: float, dims: Dims) -> Term | None:
    """Return the sum of parts of a mix or of a softmax."""
    if sign == -1.0:
        moved = difference(left, right, dims)
        return moved if moved is not None else _levels(context, left, right, sign, dims)
    for found in (merged(context, left, right), total(context, left, right)):
        if found is not None:
            return replace(found, dims=dims)
    for start, step in ((left, right), (right, left)):
        moved = _moved(context, start, step)
        if moved is not None:
            return replace(moved, dims=dims)
    return _levels(context, left, right, sign, dims)


def _moved(context: Context, start: Term, step: Term) -> Term | None:
    """Return ``o + a · (p - o)`` as ``(1 - a) · o + a · p``."""
    change = step.find(Difference)
    if change is None or (change, 1.0) not in step.factors or change.right != start:
        return None
    weight = replace(step, factors=step.factors - {(change, 1.0)})
    return blended(context, start, change.left, weight)


def blended(context: Context, start: Term, end: Term, weight: Term) -> Term | None:
    """Return ``(1 - weight) · start + weight · end`` for the share of a part of a softmax."""
    rest = complement(context, weight)
    kept = None if rest is None else multiply(context, [start, rest], 1.0)
    gained = multiply(context, [end, weight], 1.0)
    if kept is None or gained is None:
        return None
    return merged(context, replace(kept, dims=start.dims), replace(gained, dims=start.dims))


def _levels(context: Context, left: Term, right: Term, sign: float, dims: Dims) -> Term | None:
    """Return a sum of values per token, if it is one of logarithms, or a difference whose exponential is taken."""
    known = [each for each in (left, right) if each.find(LogSum) is not None or each.find(Level) is not None]
    if not known and (sign != -1.0 or not _is_exponent(context.node)):
        return None
    frame = (known or [left])[0].dims
    if len(frame) != len(dims) or sizes(frame) != sizes(dims):
        return None
    a, b = symbols(left, frame), symbols(right, frame)
    return None if a is None or b is None else level(frame, added(a, b, sign))


def _is_exponent(node: torch.fx.Node) -> bool:
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if is_call(user, aten.exp.default, aten.sigmoid.default):
            return True
        if is_call(user, *TRANSPARENT, aten.unsqueeze.default, aten.reshape.default, aten.expand.default):
            pending += user.users
    return False


def _are_logits(context: Context, term: Term, dims: Dims) -> bool:
    """Tell whether a term is logits over the sources, or that of one, that a sum leaves in their shape."""
    if term.find(Dot) is None or term.power:
        return False
    return term.deep or (sizes(term.dims) == sizes(dims) and isinstance(logits_of(context, term), Logits))


def _shifted(context: Context, left: Term, right: Term, sign: float, dims: Dims) -> Value | None:
    """Return logits plus a value per token."""
    if not left.deep:
        dims = ((),) * (len(dims) - len(left.dims)) + left.dims
    else:
        axis = next(index for index, dim in enumerate(reversed(dims)) if has_axis([dim], DEPTH))
        if len(right.dims) > axis and right.dims[-1 - axis]:
            return context.taint(dims, "bias-depends-on-input")
    named = symbols(right, dims) or frozenset({(Opaque(context.node), 1.0)})
    shift = added(left.shift, named, -sign)
    log = log_weights(context, left, shift)
    return replace(left, dims=dims, shift=shift) if log is None else replace(log, dims=dims)
