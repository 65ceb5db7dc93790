"""Reductions of terms: sums, means, norms, and softmax over depth in its spellings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import argument, aten, is_call, value
from depthwire.passes.analysis.depth_arith import Chosen, first, lost, operand, result, with_dims
from depthwire.passes.analysis.depth_axes import DEPTH, has_axis
from depthwire.passes.analysis.depth_merge import total as joined_total
from depthwire.passes.analysis.depth_product import contract, power
from depthwire.passes.analysis.depth_softmax import exponential, log_sum, logarithm, over_depth, proportion, softmax
from depthwire.passes.analysis.depth_sums import plus_number
from depthwire.passes.analysis.depth_values import Dot, Moment, Tainted, Term, Value

if TYPE_CHECKING:
    from depthwire.passes.analysis.depth_axes import Dims
    from depthwire.passes.analysis.depth_product import Context


def total(context: Context, chosen: Chosen) -> list[Value]:
    """``sum`` and ``mean`` over some dimensions."""
    node, term = context.node, first(context, chosen)
    if term is None:
        return []
    rank = len(term.dims)
    given = argument(node, 1, "dim")
    axes = set(range(rank)) if given in (None, []) else {int(axis) % rank for axis in _listed(given)}
    keep = bool(argument(node, 2, "keepdim", default=False))
    source: Any = node.args[0]
    count = math.prod(int(value(source).shape[axis]) for axis in axes)
    number = 1.0 / count if is_call(node, aten.mean.dim) else 1.0
    left = [axis for axis in range(rank) if axis not in axes]
    summed = contract(context, [term, number], [range(rank), []], left)
    if summed is None or not keep:
        return result(summed)
    rest = iter(summed.dims)
    return [with_dims(summed, tuple(() if axis in axes else next(rest) for axis in range(rank)))]


def _listed(given: object) -> list[int]:
    return list(given) if isinstance(given, (list, tuple)) else [given]  # type: ignore[list-item]


def rms_norm(context: Context, chosen: Chosen) -> list[Value]:
    """``rms_norm(x, [d], weight, eps)``."""
    node, term = context.node, first(context, chosen)
    if not isinstance(term, Term) or len(argument(node, 1, "normalized_shape")) != 1 or not term.dims[-1]:
        return result(lost(context, [term]))
    rank = len(term.dims)
    square = power(term, 2.0)
    width = int(value(node).shape[-1])
    mean = None if square is None else contract(context, [square, 1.0 / width], [range(rank), []], range(rank - 1))
    eps = argument(node, 3, "eps")
    if eps is None:  # torch then takes the machine epsilon of the dtype it computes in
        eps = torch.finfo(torch.float64 if value(node).dtype == torch.float64 else torch.float32).eps
    shifted = plus_number(mean, float(eps)) if isinstance(mean, Term) else None
    rstd = None if shifted is None or not shifted.find(Moment) else power(shifted, -0.5)
    if rstd is None:
        return result(lost(context, [term], mean.reason if isinstance(mean, Tainted) else "unsupported"))
    weight = argument(node, 2, "weight")
    gain = 1.0 if weight is None else operand(context, chosen, weight)
    if gain is None:
        return result(lost(context, [term]))
    names = [] if weight is None else [rank - 1]
    return result(contract(context, [term, rstd, gain], [range(rank), range(rank - 1), names], range(rank)))


def layer_norm(context: Context, chosen: Chosen) -> list[Value]:
    """``layer_norm`` of sources: no key norm of a read."""
    term = first(context, chosen)
    if term is None or not term.deep:
        return []
    return result(context.taint(term.dims, term.reason if isinstance(term, Tainted) else "layer-norm-keys"))


def vector_norm(context: Context, chosen: Chosen) -> list[Value]:
    """``sqrt(Σ x²)`` over one dimension."""
    node, term = context.node, first(context, chosen)
    linalg = is_call(node, aten.linalg_norm.default)
    order, given = argument(node, 1, "ord", None if linalg else 2), argument(node, 2, "dim")
    if not isinstance(term, Term) or given is None or (order is not None and float(order) != 2.0):
        return []
    rank = len(term.dims)
    axes = [int(axis) % rank for axis in _listed(given)]
    square = power(term, 2.0)
    if square is None or len(axes) != 1:
        return result(lost(context, [term]))
    left = [axis for axis in range(rank) if axis not in axes]
    total = contract(context, [square], [range(rank)], left)
    length = power(total, 0.5) if isinstance(total, Term) else None
    if length is None:
        return []
    dims = length.dims
    if argument(node, 3, "keepdim", default=False):
        rest = iter(length.dims)
        dims = tuple(() if axis in axes else next(rest) for axis in range(rank))
    return [with_dims(length, dims)]


def weights(context: Context, chosen: Chosen) -> list[Value]:
    """``softmax`` and ``log_softmax``."""
    node, term = context.node, first(context, chosen)
    if term is None:
        return []
    dim = term.dims[int(argument(node, 1, "dim")) % len(term.dims)]
    if isinstance(term, Tainted):
        return [Tainted(term.dims, term.reason, term.node)] if has_axis([dim], DEPTH) else []
    if not over_depth(term, dim):
        return result(context.taint(term.dims, "joint-softmax")) if has_axis([dim], DEPTH) else []
    found = softmax(context, term, log=is_call(node, aten.log_softmax.int))
    return result(context.taint(term.dims, found) if isinstance(found, str) else found)


def exponentials(context: Context, chosen: Chosen) -> list[Value]:
    """``exp`` of logits."""
    term = first(context, chosen)
    found = exponential(context, term) if isinstance(term, Term) else None
    return result(found if found is not None else lost(context, [term]))


def logarithms(context: Context, chosen: Chosen) -> list[Value]:
    """``log`` of a sum of exponentials."""
    term = first(context, chosen)
    return result(logarithm(term) if isinstance(term, Term) else None)


def log_sums(context: Context, chosen: Chosen) -> list[Value]:
    """``logsumexp`` over the sources."""
    node, term = context.node, first(context, chosen)
    axes = _listed(argument(node, 1, "dim"))
    if not isinstance(term, Term) or len(axes) != 1:
        return []
    axis = int(axes[0]) % len(term.dims)
    if not over_depth(term, term.dims[axis]):
        return []
    kept: Dims = ((),) if argument(node, 2, "keepdim", default=False) else ()
    return result(log_sum(context, term, term.dims[:axis] + kept + term.dims[axis + 1 :]))


def joint_logs(context: Context, chosen: Chosen) -> list[Value]:
    """``logaddexp`` of two parts of a softmax."""
    left, right = (operand(context, chosen, each) for each in context.node.args[:2])
    if not isinstance(left, Term) or not isinstance(right, Term):
        return []
    a, b = exponential(context, left), exponential(context, right)
    sums = joined_total(context, a, b) if a is not None and b is not None else None
    return result(logarithm(sums) if sums is not None else None)


def gates(context: Context, chosen: Chosen) -> list[Value]:
    """``sigmoid`` of logits: no read; of the distance of two parts of a softmax: the share of one."""
    term = first(context, chosen)
    found = proportion(context, term) if isinstance(term, Term) else None
    if found is not None:
        return [found]
    if isinstance(term, Term) and term.deep and term.find(Dot) is not None and term.find(Moment) is not None:
        return result(context.taint(term.dims, "sigmoid"))
    return result(lost(context, [term]))
