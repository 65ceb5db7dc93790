"""Products and sums of terms: everything that an ``einsum`` can say, elementwise products and reductions included."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from depthwire.passes._match import aten, is_call, value
from depthwire.passes.analysis.depth_axes import DEPTH, REPEAT, Atom, Dim, Dims, fused, has_axis, whole
from depthwire.passes.analysis.depth_constants import Constants, spread
from depthwire.passes.analysis.depth_merge import added, normalised
from depthwire.passes.analysis.depth_values import (
    Banks,
    Const,
    Difference,
    Dot,
    Exp,
    ExpSum,
    Factor,
    Factors,
    Gauge,
    Level,
    Logits,
    LogSum,
    Mix,
    Moment,
    Soft,
    Tainted,
    Term,
    Value,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    import torch

_PER_TOKEN = (Exp, ExpSum, LogSum, Mix, Gauge, Level, Difference)

Operand = Value | float | Const
"""A constant operand comes with empty ``dims``: the product says what its dimensions run over."""


@dataclass
class Context:
    """What the transfer functions share.

    Attributes:
        node: The node at hand.
        constants: The constant part of the graph.
        banks: The banks met so far.
        failures: Why the weights of some softmax do not end in a read.
    """

    node: torch.fx.Node
    constants: Constants
    banks: Banks
    failures: dict[Logits, tuple[str, torch.fx.Node]]

    def taint(self, dims: Dims, reason: str) -> Tainted | None:
        """Return a value without normal form, if it is one over stacked sources."""
        return Tainted(dims, reason, self.node) if has_axis(dims, DEPTH) else None


def power(term: Term, exponent: float) -> Term | None:
    """Return a term to some power, if that is a term."""
    if term.bias is not None or term.shift or term.power * exponent not in (0.0, 1.0, 2.0):
        return None
    positive = not term.power and all(isinstance(factor, Moment) for factor, _ in term.factors) and term.scalar > 0
    if term.scalar == 0 or (exponent != int(exponent) and not positive):
        return None  # the root of a square is its absolute value
    factors = frozenset((factor, each * exponent) for factor, each in term.factors)
    return replace(term, power=int(term.power * exponent), scalar=float(term.scalar**exponent), factors=factors)


def scaled(term: Term, number: float) -> Term | None:
    """Return a term times a number."""
    if number == 1.0:
        return term
    if not math.isfinite(number):
        return None
    bias = None if term.bias is None else tuple(each * number for each in term.bias)
    shift = added(frozenset(), term.shift, number)
    return replace(term, scalar=term.scalar * number, bias=bias, shift=shift)


def contract(
    context: Context, operands: Sequence[Operand], labels: Sequence[Sequence[Hashable]], out: Sequence[Hashable]
) -> Value | None:
    """Multiply operands whose dimensions are labelled, and sum over the labels that are not in ``out``."""
    values = [operand for operand in operands if isinstance(operand, (Term, Tainted))]
    axes = _axes(operands, labels)
    if axes is None:
        return None
    tainted = next((value for value in values if isinstance(value, Tainted)), None)
    terms = [value for value in values if isinstance(value, Term)]
    reason = None if tainted is None else tainted.reason
    if reason is None and not _one_bank(terms):
        reason = _clash(context, terms)
    elif reason is None and not _agree(terms, operands, labels, axes):
        reason = "unsupported"
    factors = _constants(context, operands, labels, axes, new=any(_is_stack(context, each) for each in values))
    if factors is None:
        return None
    dims = tuple(axes[label] for label in out)
    if reason is None and any(has_axis(const.dims, DEPTH) for const, _ in factors.constants):
        reason = "per-source-scale"
    if reason is not None:
        where = tainted.node if tainted is not None else context.node
        return Tainted(dims, reason, where) if has_axis(dims, DEPTH) else None
    product = multiply(context, terms, factors.number, factors.constants)
    summed = None if product is None else _sum_labels(context, product, axes, out)
    if isinstance(summed, Term):
        return replace(summed, dims=dims)
    return context.taint(dims, summed or "unsupported")


def _is_stack(context: Context, term: Value) -> bool:
    """Tell whether a value runs over sources, or over one that may be a stack of one: normalised, before no layer."""
    if term.deep or is_call(context.node, aten.linear.default):
        return term.deep
    return isinstance(term, Term) and () in term.dims and term.find(Moment) is not None


def _sum_labels(
    context: Context, product: Term, axes: dict[Hashable, Dim], out: Sequence[Hashable]
) -> Term | str | None:
    """Sum over the labels that are not in the result."""
    for label, dim in axes.items():
        if label in out:
            continue
        summed = _sum(context, product, dim) if dim else _sum_of_one(product)
        if not isinstance(summed, Term):
            return summed
        product = summed
    return product


class _Factors(NamedTuple):
    number: float
    constants: list[tuple[Const, float]]


def _constants(
    context: Context,
    operands: Sequence[Operand],
    labels: Sequence[Sequence[Hashable]],
    axes: dict[Hashable, Dim],
    *,
    new: bool,
) -> _Factors | None:
    """Collect numbers and constants; a constant of one number is a number."""
    number, constants = 1.0, []
    for operand, names in zip(operands, labels, strict=True):
        if isinstance(operand, float):
            number *= operand
        elif isinstance(operand, Const):
            aligned = _aligned(context, operand, names, axes, new=new)
            if aligned is None:
                return None
            single = not any(aligned.dims) or has_axis(aligned.dims, DEPTH) or context.constants.is_fill(operand.node)
            exact = context.constants.number(operand.node) if single else None
            if exact is not None:
                number *= exact
            else:
                constants.append((aligned, 1.0))
    return _Factors(number, constants)


def _agree(
    terms: Sequence[Term],
    operands: Sequence[Operand],
    labels: Sequence[Sequence[Hashable]],
    axes: dict[Hashable, Dim],
) -> bool:
    """Tell whether terms run over the same axes wherever they are multiplied."""
    for operand, names in zip(operands, labels, strict=True):
        if isinstance(operand, Term):
            for label, dim in zip(names, operand.dims, strict=True):
                if dim and dim != axes[label] and dim[0].axis != REPEAT:
                    return False
    return bool(terms)


def _axes(operands: Sequence[Operand], labels: Sequence[Sequence[Hashable]]) -> dict[Hashable, Dim] | None:
    """Return what each label runs over. The first operand over stacked sources decides where two do not agree."""
    axes: dict[Hashable, Dim] = {}
    order = sorted(range(len(operands)), key=lambda i: not (isinstance(operands[i], Value) and operands[i].deep))  # type: ignore[union-attr]
    for index in order:
        operand = operands[index]
        if isinstance(operand, (Term, Tainted)):
            if len(operand.dims) != len(labels[index]):
                return None
            for label, dim in zip(labels[index], operand.dims, strict=True):
                known = axes.get(label, ())
                if not known or (dim and known[0].axis == REPEAT):
                    axes[label] = dim
        elif isinstance(operand, Const):
            for label in labels[index]:
                axes.setdefault(label, ())
    return axes


def _one_bank(terms: Sequence[Term]) -> bool:
    banks = {id(term.bank) for term in terms if term.bank is not None}
    frames = {_frame(term) for term in terms} - {None}
    return len(banks) <= 1 and len(frames) <= 1


def _frame(term: Term) -> tuple[int, ...] | None:
    """Return the shape that a term's axes are those of; ``None`` for named values, which fit wherever axes agree."""
    if term.bank is not None:
        return term.bank.shape
    for factor, _ in term.factors:
        if isinstance(factor, (ExpSum, LogSum, Mix)):
            return factor.logits.bank.shape
    return None


def _clash(context: Context, terms: Sequence[Term]) -> str:
    """Say what it means that values over different sources are multiplied."""
    for term in terms:
        weights = term.find(Soft)
        if weights is not None:
            context.failures.setdefault(weights.logits, ("values-differ", context.node))
            return "values-differ"
    if any(term.find(Dot) for term in terms if term.deep):
        return "temperature-depends-on-input"
    return "query-depends-on-input"


def _aligned(
    context: Context, const: Const, names: Sequence[Hashable], axes: dict[Hashable, Dim], *, new: bool
) -> Const | None:
    """Say what the dimensions of a constant run over; one that no term runs over counts queries."""
    dims: list[Dim] = []
    shape = value(const.node).shape
    for position, (label, varies) in enumerate(zip(names, spread(const.node), strict=True)):
        if not varies:
            if int(shape[position]) > 1 and not axes[label]:
                axes[label] = whole(REPEAT, int(shape[position]))
            dims.append(())
            continue
        if not axes[label] or axes[label][0].axis == REPEAT:
            if not new:
                return None
            axes[label] = whole(("query", const.node.name, position), int(shape[position]))
        dims.append(axes[label])
    return Const(context.constants.first(const.node), tuple(dims))


def multiply(
    context: Context, terms: Sequence[Term], number: float, constants: Iterable[tuple[Const, float]] = ()
) -> Term | None:
    """Return the product of terms over the same sources, a number and constants; the caller sets its ``dims``."""
    exponents: dict[Factor, float] = {}
    constants = list(constants)
    for factor, exponent in [*(each for term in terms for each in term.factors), *constants]:
        exponents[factor] = exponents.get(factor, 0.0) + exponent
    if any(term.bias is not None or term.shift for term in terms):
        if len(terms) > 1 or constants:
            return None
        return scaled(terms[0], number)
    scalar, exponent = number, 0
    lanes, bank = None, None
    fixed: frozenset[tuple[Hashable, int]] = frozenset()
    for term in terms:
        scalar *= term.scalar
        exponent += term.power
        lanes = term.lanes if lanes is None else lanes
        bank = bank or term.bank
        fixed |= term.fixed
    if exponent not in (0, 1, 2) or len(dict(fixed)) != len(fixed):
        return None
    factors = normalised(context, frozenset((each, e) for each, e in exponents.items() if e), fixed)
    product = Term((), bank, exponent, scalar, factors, lanes, fixed=fixed)
    weights = product.find(Soft) or product.find(Exp)
    if weights is not None and bank is not None and len(bank) == 1 and exponent == 1:
        # One source of several, with its weight: a part of the mix already.
        mixed = _mixed(product, weights.logits, raw=isinstance(weights, Exp))
        return product if isinstance(mixed, str) else mixed
    return product


def _sum_of_one(term: Term) -> Term:
    """Sum over a dimension of size 1: over depth, if there is one source."""
    exp = term.find(Exp)
    if exp is None or len(exp.logits.bank) > 1 or (exp, 1.0) not in term.factors or term.power:
        return term
    return replace(term, bank=None, lanes=None, factors=(term.factors - {(exp, 1.0)}) | {(ExpSum(exp.logits), 1.0)})


def _sum(context: Context, term: Term, dim: Dim) -> Term | str | None:
    """Sum over a whole axis; ``dims`` of the result are left to the caller. A string says why that is no term."""
    dim = fused(dim)
    if len(dim) != 1 or term.bias is not None or term.shift:
        return (
            "key-norm" if term.power == 1 and term.find(Moment) is not None else None
        )  # a dot product over several norms
    atom = dim[0]
    if atom.inner != 1:
        return "key-norm" if term.power == 2 else None
    if atom.axis == REPEAT:
        # What is shifted by something that is not constant may differ along a broadcast axis.
        loose = any(isinstance(factor, _PER_TOKEN) for factor, _ in term.factors)
        return None if loose else scaled(term, float(atom.size))
    if atom.axis == DEPTH:
        return _sum_depth(context, term)
    if isinstance(atom.axis, int):
        return _sum_features(term, atom)
    return None


def _sum_features(term: Term, atom: Atom) -> Term | str | None:
    if term.bank is None or not isinstance(atom.axis, int):
        return None
    if term.bank.shape[atom.axis] != atom.size:
        return "key-norm" if term.power == 2 else None
    axis = atom.axis
    inner = {(f, e) for f, e in term.factors if isinstance(f, Const) and has_axis(f.dims, axis)}
    if term.power == 2 and not term.factors:
        return replace(term, power=0, scalar=term.scalar * atom.size, factors=frozenset({(Moment(axis, 0.0), 1.0)}))
    if term.power == 2:
        return "key-norm"  # of keys that are normalised or multiplied by a gain already
    if term.power == 1 and not any(isinstance(f, (Soft, Exp, Mix)) for f, _ in term.factors):
        dot = Dot(axis, frozenset((f, e) for f, e in inner if isinstance(f, Const)))
        return replace(term, power=0, factors=(term.factors - inner) | {(dot, 1.0)})
    return None


def _sum_depth(context: Context, term: Term) -> Term | str | None:
    soft, exp = term.find(Soft), term.find(Exp)
    if term.power == 1:
        weights = soft or exp
        if weights is None:
            return None
        mixed = _mixed(term, weights.logits, raw=soft is None)
        if isinstance(mixed, str):
            context.failures.setdefault(weights.logits, (mixed, context.node))
        return mixed
    if exp is None or term.power or (exp, 1.0) not in term.factors or term.bank is not exp.logits.bank:
        return None
    rest = term.factors - {(exp, 1.0)}
    if not all(isinstance(factor, (Gauge, ExpSum)) for factor, _ in rest):
        return None
    return replace(term, bank=None, lanes=None, factors=rest | {(ExpSum(exp.logits), 1.0)})


def _mixed(term: Term, logits: Logits, *, raw: bool) -> Term | str:
    weights = (Exp(logits) if raw else Soft(logits), 1.0)
    rest = [(factor, exponent) for factor, exponent in term.factors if (factor, exponent) != weights]
    outer = frozenset(each for each in rest if isinstance(each[0], (Const, Gauge, ExpSum)))
    lane = [each for each in rest if each not in outer]
    unit = False
    if lane:
        ((factor, exponent), *more) = lane
        if more or exponent != -0.5 or not isinstance(factor, Moment):
            return "values-differ"
        if factor != Moment(logits.axis, logits.eps):
            return "value-norm"
        unit = True
    mix = Mix(logits, unit, sum(1 << lane for lane in term.lanes or ()), raw)
    factors: Factors = outer | {(mix, 1.0)}
    return replace(term, bank=None, power=0, lanes=None, factors=factors)
