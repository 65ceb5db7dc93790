"""Softmax in parts (online softmax): exponentials of the logits of some sources, and how parts are joined.

For a part with logits s_i and sources v_i, ``ExpSum`` is ``Σ exp(s_i)`` and a raw ``Mix`` is ``Σ exp(s_i) v_i``. Parts
with one query add up to the part over the sources of both. What a model subtracts from logits before it takes
exponentials (a running maximum, the log-sum-exp of another part) becomes a factor of its own: the exponential of a sum
of named values (``Gauge``), or an ``ExpSum`` to the power -1. So maxima that are subtracted and added again cancel by
name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from depthwire.passes.analysis.depth_axes import REPEAT, Dim, Dims, has_axis, sizes
from depthwire.passes.analysis.depth_values import (
    Difference,
    Exp,
    ExpSum,
    Factor,
    Factors,
    Gauge,
    Level,
    Logits,
    LogSum,
    Mix,
    Shift,
    Soft,
    Term,
)

if TYPE_CHECKING:
    from collections.abc import Hashable

    from depthwire.passes.analysis.depth_constants import Constants
    from depthwire.passes.analysis.depth_product import Context
    from depthwire.passes.analysis.depth_values import Const

    Fixed = frozenset[tuple[Hashable, int]]


class Opaque(NamedTuple):
    """A value per token that a node holds.

    Attributes:
        node: The node.
        axes: Which axes of the logits the node's dimensions run along.
    """

    node: torch.fx.Node
    axes: frozenset[tuple[Dim, Dim]] = frozenset()


def added(left: Shift, right: Shift, factor: float = 1.0) -> Shift:
    """Return ``left + factor · right``."""
    total = dict(left)
    for symbol, number in right:
        total[symbol] = total.get(symbol, 0.0) + factor * number
    return frozenset((symbol, number) for symbol, number in total.items() if number)


def symbols(term: Term, frame: Dims) -> Shift | None:
    """Return a value per token as a sum of named values; ``frame`` says what its dimensions are added to run over."""
    if len(term.factors) == 1 and not term.power and term.bias is None:
        ((factor, exponent),) = term.factors
        if exponent == 1.0 and isinstance(factor, (LogSum, Level)) and _aligned(term.dims, frame):
            if isinstance(factor, Level):
                return added(frozenset(), factor.exponent, term.scalar)
            return frozenset({(LogSum(pinned(factor.logits, term.fixed)), term.scalar)})
    if not term.pure or term.deep or term.shift or term.bank is None or len(term.bank) > 1:
        return None
    source = term.bank.sources[0]
    if source.blank or source.dims is not None or term.fixed:
        return None
    axes: set[tuple[Dim, Dim]] = set()
    for position, dim in enumerate(reversed(term.dims)):
        if not dim or dim[0].axis == REPEAT:
            continue
        if (
            position >= len(frame)
            or sizes([frame[-1 - position]]) != sizes([dim])
            or has_axis(frame[-1 - position :][:1], REPEAT)
        ):
            return None
        axes.add((frame[-1 - position], dim))
    return frozenset({(Opaque(source.node, frozenset(axes)), 1.0)})


def _aligned(dims: Dims, frame: Dims) -> bool:
    """Tell whether a value that is broadcast runs over the same axes as another."""
    return all(not dim or dim == wide for dim, wide in zip(reversed(dims), reversed(frame), strict=False))


def level(dims: Dims, shift: Shift) -> Term | None:
    """Return a sum of named values as a term."""
    if not shift:
        return None
    (symbol, number), *more = shift
    factor: Factor = symbol if isinstance(symbol, LogSum) and number == 1.0 and not more else Level(shift)
    return Term(dims, None, factors=frozenset({(factor, 1.0)}))


def grown(shift: Shift) -> Factors:
    """Return ``exp`` of a sum of named values as factors."""
    sums: set[tuple[Factor, float]] = {(ExpSum(each.logits), c) for each, c in shift if isinstance(each, LogSum)}
    opaque = frozenset((symbol, c) for symbol, c in shift if not isinstance(symbol, LogSum))
    return frozenset(sums | ({(Gauge(opaque), 1.0)} if opaque else set()))


def pinned(logits: Logits, fixed: Fixed) -> Logits:
    """Return logits of one query, if one was taken out of several later."""
    return replace(logits, fixed=logits.fixed | fixed) if fixed else logits


def query_vector(constants: Constants, const: Const, fixed: dict[Hashable, int], width: int) -> torch.Tensor:
    """Return the values of a constant for one query: ``[d]``, in fp64."""
    tensor = constants.tensor(const.node).double()
    for position, dim in reversed(list(enumerate(const.dims))):
        if not dim:
            tensor = tensor.select(position, 0)
    atoms = [atom for dim in const.dims for atom in dim]
    tensor = tensor.reshape([atom.size for atom in atoms])
    for position, atom in reversed(list(enumerate(atoms))):
        if not isinstance(atom.axis, int):
            tensor = tensor.select(position, fixed[atom.axis])
    return tensor.reshape(-1).expand(width)


def folded(constants: Constants, logits: Logits, fixed: dict[Hashable, int]) -> torch.Tensor:
    """Return the query of logits ``[d]``, in fp64."""
    width = logits.bank.shape[logits.axis]
    vector = torch.ones(width, dtype=torch.float64)
    for const, exponent in logits.query:
        vector = vector * query_vector(constants, const, fixed, width) ** exponent
    return vector


def same_query(constants: Constants, left: Logits, right: Logits) -> bool:
    """Tell whether two logits have one query, scale, eps and layout."""
    if (left.axis, left.eps, left.bank.shape) != (right.axis, right.eps, right.bank.shape):
        return False
    if (left.query, left.scale, left.fixed) == (right.query, right.scale, right.fixed):
        return True
    for logits in (left, right):
        axes = {atom.axis for const, _ in logits.query for dim in const.dims for atom in dim}
        if any(not isinstance(axis, int) and axis not in dict(logits.fixed) for axis in axes):
            return False
    a, b = (folded(constants, each, dict(each.fixed)) * each.scale for each in (left, right))
    return torch.allclose(a, b, rtol=1e-12, atol=0.0)  # products of the same numbers, in another order


def alike(constants: Constants, left: Logits, right: Logits) -> bool:
    """Tell whether two logits are the same, however their queries are written."""
    if left == right:
        return True
    return left.bank is right.bank and left.bias == right.bias and same_query(constants, left, right)


def united(context: Context, left: Logits, right: Logits) -> Logits | None:
    """Return the logits over the sources of two parts with one query."""
    if not same_query(context.constants, left, right):
        return None
    lanes = [
        (context.banks.order(source), source, bias)
        for each in (left, right)
        for source, bias in zip(each.bank.sources, each.bias or (0.0,) * len(each.bank), strict=True)
    ]
    lanes.sort(key=lambda lane: lane[0])  # by their place in the graph, so that the order of additions is all one
    first = min((left, right), key=lambda each: context.banks.order(each.bank.sources[0]))
    bias = tuple(lane[2] for lane in lanes)
    bank = context.banks.get([lane[1] for lane in lanes], left.bank.shape)
    return replace(first, bank=bank, bias=bias if any(bias) else None)


def normalised(context: Context, factors: Factors, fixed: Fixed) -> Factors:
    """Join the exponentials of a product: exp(s_i) / Σ exp(s) is a softmax, in a mix as well."""
    shift: Shift = frozenset()
    for factor, exponent in factors:
        if isinstance(factor, Gauge):
            shift = added(shift, factor.exponent, exponent)
    rest = frozenset(each for each in factors if not isinstance(each[0], Gauge))
    for _ in range(len(rest)):
        joined = _joined(context, rest, fixed)
        if joined is None:
            break
        rest = joined
    return rest | grown(shift)


def _joined(context: Context, factors: Factors, fixed: Fixed) -> Factors | None:
    """Join one sum of exponentials with what it belongs to."""
    for total, power in factors:
        if not isinstance(total, ExpSum) or abs(power) != 1.0:
            continue
        logits = pinned(total.logits, fixed)
        for factor, exponent in factors:
            if exponent != 1.0 or not isinstance(factor, (Exp, ExpSum, Soft, Mix)) or factor is total:
                continue
            if not alike(context.constants, pinned(factor.logits, fixed), logits):
                continue
            rest = factors - {(total, power), (factor, exponent)}
            if isinstance(factor, ExpSum) and power < 0:
                return rest
            new = _times(factor, power)
            if new is not None:
                return rest | {(new, 1.0)}
    return None


def _times(factor: Factor, power: float) -> Factor | None:
    """Return a factor times (or by) the sum of its own exponentials."""
    if isinstance(factor, Mix) and factor.raw == (power < 0):
        return replace(factor, raw=not factor.raw)
    if isinstance(factor, Exp) and power < 0:
        return Soft(factor.logits)
    return Exp(factor.logits) if isinstance(factor, Soft) and power > 0 else None


def merged(context: Context, left: Term, right: Term) -> Term | None:
    """Join two parts of one mix: other sources under one softmax, or raw parts over banks of their own."""
    a, b = left.find(Mix), right.find(Mix)
    if a is None or b is None or left.dims != right.dims or left.scalar != right.scalar or a.unit != b.unit:
        return None
    rest = left.factors - {(a, 1.0)}
    if rest != right.factors - {(b, 1.0)} or (a, 1.0) not in left.factors:
        return None
    if a.logits == b.logits and a.raw == b.raw and not a.mask & b.mask and left.fixed == right.fixed:
        both = replace(a, mask=a.mask | b.mask)
        return replace(left, factors=normalised(context, rest | {(both, 1.0)}, left.fixed))
    if not a.raw or not b.raw or not _complete(a) or not _complete(b):
        return None
    logits = united(context, pinned(a.logits, left.fixed), pinned(b.logits, right.fixed))
    if logits is None:
        return None
    both = Mix(logits, a.unit, (1 << len(logits.bank)) - 1, raw=True)
    fixed: Fixed = frozenset()
    return replace(left, factors=normalised(context, rest | {(both, 1.0)}, fixed), fixed=fixed)


def _complete(mix: Mix) -> bool:
    return mix.mask == (1 << len(mix.logits.bank)) - 1


class _Part(NamedTuple):
    """``Σ exp(s_i)`` over the sources of a part, times other factors."""

    logits: Logits
    factor: Factor
    rest: Factors


def _part(term: Term) -> _Part | None:
    if term.deep or term.power or term.scalar != 1.0 or term.bias is not None or term.shift:
        return None
    for factor, exponent in term.factors:
        one = isinstance(factor, Exp) and len(factor.logits.bank) == 1
        if exponent == 1.0 and (one or isinstance(factor, ExpSum)):
            logits = factor.logits  # type: ignore[union-attr]
            return _Part(pinned(logits, term.fixed), factor, term.factors - {(factor, exponent)})
    return None


def total(context: Context, left: Term, right: Term) -> Term | None:
    """Return the sum of two sums of exponentials."""
    a, b = _part(left), _part(right)
    if a is None or b is None or a.rest != b.rest or left.dims != right.dims:
        return None
    logits = united(context, a.logits, b.logits)
    if logits is None:
        return None
    factors = normalised(context, a.rest | {(ExpSum(logits), 1.0)}, frozenset())
    return Term(left.dims, None, factors=factors) if factors else None


def share(context: Context, term: Term, part: Factor, other: Logits) -> Term | None:
    """Return ``part / (part + Σ exp(other))``, for a sum of exponentials (or a single one); ``term`` gives the rest."""
    logits = united(context, part.logits, other)  # type: ignore[union-attr]
    if logits is None:
        return None
    return replace(term, scalar=1.0, shift=frozenset(), factors=frozenset({(part, 1.0), (ExpSum(logits), -1.0)}))


def complement(context: Context, term: Term) -> Term | None:
    """Return 1 minus the share of a part."""
    part = _part(term)
    if part is None or len(part.rest) != 1:
        return None
    ((whole, exponent),) = part.rest
    if not isinstance(whole, ExpSum) or exponent != -1.0:
        return None
    logits = pinned(whole.logits, term.fixed)
    missing = list(part.logits.bank.sources)
    lanes: list[int] = []
    for lane, source in enumerate(logits.bank.sources):
        if source in missing:
            missing.remove(source)
        else:
            lanes.append(lane)
    if missing or not lanes:
        return None
    bias = None if logits.bias is None else tuple(logits.bias[lane] for lane in lanes)
    others = replace(logits, bank=context.banks.take(logits.bank, lanes), bias=bias if bias and any(bias) else None)
    return Term(term.dims, None, factors=frozenset({(ExpSum(others), 1.0), (ExpSum(logits), -1.0)}))


def difference(left: Term, right: Term, dims: Dims) -> Term | None:
    """Return ``left - right`` for a source and a mix, or two mixes: what a share moves a mix by."""
    if left.dims != dims or right.dims != dims or left.deep or (left.mix is None and right.mix is None):
        return None
    if any(each.mix is None and not each.pure for each in (left, right)):
        return None
    return Term(dims, None, factors=frozenset({(Difference(left, right), 1.0)}))
