"""Softmax over depth: what a term must be to be the logits of a read, and how exponentials and sums spell it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from depthwire.passes.analysis.depth_axes import DEPTH, Dim, Dims, fused, has_axis
from depthwire.passes.analysis.depth_merge import added, alike, grown, level, normalised, pinned, share, symbols
from depthwire.passes.analysis.depth_values import (
    Const,
    Dot,
    Exp,
    ExpSum,
    Factor,
    Gauge,
    Level,
    Logits,
    LogSoft,
    LogSum,
    Moment,
    Shift,
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
    bias = term.bias if term.bias and any(term.bias) else None
    return Logits(bank, dot.axis, frozenset(query.items()), moment.eps, term.scalar, bias, term.fixed)


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
    exponent = symbols(term, term.dims) if term.find(Level) or term.find(LogSum) else None
    if exponent:
        return Term(term.dims, None, factors=grown(exponent))
    logits = logits_of(context, term)
    if isinstance(logits, str):
        return None
    new = _of(term, Exp(logits))
    shift = grown(added(frozenset(), term.shift, -1.0))
    return replace(new, factors=normalised(context, new.factors | shift, term.fixed))


def proportion(context: Context, term: Term) -> Term | None:
    """Return ``sigmoid(a - b)`` for the logarithms of two sums of exponentials, ``exp(a) / (exp(a) + exp(b))``."""
    if term.deep:
        return None
    if term.find(Dot) is None:
        exponent = dict(symbols(term, term.dims) or ()) if term.find(Level) is not None else {}
        sums = {number: symbol.logits for symbol, number in exponent.items() if isinstance(symbol, LogSum)}
        two = len(exponent) == 2 and sums.keys() == {1.0, -1.0}
        return share(context, term, ExpSum(sums[1.0]), sums[-1.0]) if two else None
    (symbol, number), *more = term.shift or ((None, 0.0),)
    if more or not isinstance(symbol, LogSum) or abs(number) != 1.0:
        return None
    negated = added(frozenset(), term.shift, -1.0)
    bias = None if term.bias is None else tuple(-each for each in term.bias)
    own = term if number > 0 else replace(term, scalar=-term.scalar, bias=bias, shift=negated)
    logits = logits_of(context, own)
    if isinstance(logits, str) or len(logits.bank) > 1:
        return None
    if number > 0:
        return share(context, _of(own, Exp(logits)), Exp(logits), symbol.logits)
    return share(context, Term(own.dims, None), ExpSum(symbol.logits), pinned(logits, own.fixed))


def logarithm(term: Term) -> Term | None:
    """Return ``log Σ_i exp(s_i)`` for a sum of exponentials."""
    if term.power or term.scalar != 1.0 or term.bias is not None or term.deep:
        return None
    shift: Shift = frozenset()
    for factor, exponent in term.factors:
        if isinstance(factor, ExpSum):
            shift = added(shift, frozenset({(LogSum(pinned(factor.logits, term.fixed)), exponent)}))
        elif isinstance(factor, Gauge):
            shift = added(shift, factor.exponent, exponent)
        else:
            return None
    return level(term.dims, shift)


def log_sum(context: Context, term: Term, dims: Dims) -> Term | None:
    """Return ``logsumexp`` over the sources; ``dims`` are those of the result."""
    logits = logits_of(context, term)
    if isinstance(logits, str) or has_axis(dims, DEPTH):
        return None
    own = frozenset({(LogSum(pinned(logits, term.fixed)), 1.0)})
    return level(dims, added(own, term.shift, -1.0))


def log_weights(context: Context, term: Term, shift: Shift) -> Term | None:
    """Return logits minus the logarithm of the sum of their own exponentials; ``shift`` is what is subtracted."""
    if len(shift) != 1:
        return None
    ((total, number),) = shift
    logits = logits_of(context, term)
    if not isinstance(total, LogSum) or number != 1.0 or isinstance(logits, str):
        return None
    if not alike(context.constants, pinned(logits, term.fixed), total.logits):
        return None
    return _of(term, LogSoft(logits))


def last_bias(logits: Logits) -> float | None:
    """Return the bias of the last logit, ``None`` if another one has a bias of its own.

    What all logits share, no softmax sees.
    """
    if logits.bias is None:
        return 0.0
    *others, last = (each - logits.bias[0] for each in logits.bias)
    return last if not any(others) and math.isfinite(last) else None
