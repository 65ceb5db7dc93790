"""Softmax over depth: what a term must be to be the logits of a read, and how exponentials and sums spell it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from depthwire.passes.analysis.depth_axes import DEPTH, Dim, Dims, fused, has_axis
from depthwire.passes.analysis.depth_values import (
    Const,
    Dot,
    Exp,
    ExpSum,
    Factor,
    Logits,
    LogSoft,
    LogSum,
    Moment,
    Soft,
    Term,
)

if TYPE_CHECKING:
    from depthwire.passes.analysis.depth_product import Context


def logits_of(context: Context, term: Term) -> Logits | str:  # noqa: PLR0911 - a reason each
    """Return the logits that a term is, or the reason why it is none."""
    dot, bank = term.find(Dot), term.bank
    if dot is None or bank is None or term.power:
        return "no-dot-product"
    rest = term.factors - {(dot, 1.0)}
    moments = [(factor, exponent) for factor, exponent in rest if isinstance(factor, Moment)]
    if not moments:
        return "no-key-norm"
    ((moment, exponent), *more) = moments
    if more or exponent != -0.5 or moment.axis != dot.axis or (dot, 1.0) not in term.factors:
        return "key-norm"
    query: dict[Const, float] = {}
    for factor, power in [*(rest - {(moment, exponent)}), *dot.consts]:
        if not isinstance(factor, Const):
            return "no-dot-product"
        reduced = per_query(context, factor, dot.axis)
        if reduced is None:
            return "query-per-token"
        query[reduced] = query.get(reduced, 0.0) + power  # the same one twice, if it varied over other tokens' axes
    if any(source.blank for source in bank.sources):
        return "unwritten-slot"
    return Logits(
        bank, dot.axis, frozenset(query.items()), moment.eps, term.scalar, _relative(term.bias), term.shift, term.fixed
    )


def per_query(context: Context, const: Const, axis: int) -> Const | None:
    """Return a constant without the token axes along which its values repeat; ``None`` if they differ."""

    def belongs(dim: Dim) -> bool:
        return all(atom.axis == axis or not (isinstance(atom.axis, int) or atom.axis == DEPTH) for atom in dim)

    features = fused(atom for dim in const.dims for atom in dim if atom.axis == axis)
    if len(features) > 1 or any(atom.inner != 1 for atom in features):
        return None  # features cut into heads, in another order
    if all(belongs(dim) for dim in const.dims):
        return const
    tensor = context.constants.tensor(const.node)
    dims: Dims = ()
    for position, dim in enumerate(const.dims):
        if not belongs(dim):
            first = tensor.narrow(position, 0, 1)
            if not bool((tensor == first).all()):
                return None
            dim = ()  # noqa: PLW2901
        dims += (dim,)
    return Const(const.node, dims)


def _relative(bias: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Return the bias with respect to the first source's: what all logits share, no softmax sees."""
    if bias is None or all(each == bias[0] for each in bias):
        return None
    return tuple(each - bias[0] for each in bias)


def over_depth(term: Term, dim: Dim) -> bool:
    """Tell whether a dimension runs over all the sources of a term: none of its own if there is one source."""
    if term.bank is None:
        return False
    if not dim:
        return len(term.bank) == 1
    return len(dim) == 1 and dim[0].axis == DEPTH and dim[0].size == len(term.bank)


def softmax(context: Context, term: Term, *, log: bool = False) -> Term | str:
    """Return the weights over the sources, or why there are none."""
    logits = logits_of(context, term)
    if isinstance(logits, str):
        return logits
    factor: Factor = LogSoft(logits) if log else Soft(logits)
    return _of(term, factor)


def _of(term: Term, factor: Factor) -> Term:
    return Term(
        term.dims, term.bank, factors=frozenset({(factor, 1.0)}), lanes=tuple(range(len(term.over))), fixed=term.fixed
    )


def exponential(context: Context, term: Term) -> Term | None:
    """Return ``exp`` of logits, or of their logarithmic softmax."""
    log = term.only(LogSoft)
    if log is not None:
        return replace(term, factors=frozenset({(Soft(log.logits), 1.0)}))
    logits = logits_of(context, term)
    return None if isinstance(logits, str) else _of(term, Exp(logits))


def logarithm(term: Term) -> Term | None:
    """Return ``log Σ_i exp(s_i)`` for a sum of exponentials."""
    total = term.only(ExpSum)
    return None if total is None else replace(term, factors=frozenset({(LogSum(total.logits), 1.0)}))


def log_sum(context: Context, term: Term, dims: Dims) -> Term | None:
    """Return ``logsumexp`` over the sources; ``dims`` are those of the result."""
    logits = logits_of(context, term)
    if isinstance(logits, str) or has_axis(dims, DEPTH):
        return None
    return Term(dims, None, factors=frozenset({(LogSum(logits), 1.0)}), fixed=term.fixed)


def minus_log_sum(context: Context, term: Term, total: LogSum) -> Term | None:
    """Return logits minus the logarithm of the sum of their own exponentials."""
    logits = logits_of(context, term)
    if isinstance(logits, str) or replace(logits, shift=None) != replace(total.logits, shift=None):
        return None
    # Both shifted alike, or neither: log Σ exp(s - m) differs from log Σ exp(s) by m.
    return _of(term, LogSoft(logits)) if logits.shift == total.logits.shift else None


def last_bias(logits: Logits) -> float | None:
    """Return the bias of the last logit, ``None`` if another one has a bias of its own."""
    if logits.bias is None:
        return 0.0
    *others, last = logits.bias
    return last if not any(others) and math.isfinite(last) else None
