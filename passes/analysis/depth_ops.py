"""The operators of ATen as functions on terms: which does what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.passes._match import TRANSPARENT, argument, aten, is_call, value
from depthwire.passes.analysis import depth_arith, depth_layout, depth_reductions
from depthwire.passes.analysis.depth_arith import Chosen, first, operand, result
from depthwire.passes.analysis.depth_contractions import CONTRACTIONS, attention
from depthwire.passes.analysis.depth_values import Term

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from depthwire.passes.analysis.depth_product import Context
    from depthwire.passes.analysis.depth_values import Value

    Transfer = Callable[[Context, Chosen], list[Value]]


def _keep(context: Context, chosen: Chosen) -> list[Value]:
    """Casts, copies and disabled dropout."""
    node, term = context.node, first(context, chosen)
    if is_call(node, aten.dropout.default) and argument(node, 2, "train"):
        return []
    if isinstance(term, Term) and term.mix is not None:
        source: Any = node.args[0]
        if value(node).dtype.itemsize > value(source).dtype.itemsize:
            return []  # the read stands before this cast, in the dtype that the model rounds it to
    return result(term)


def _view(context: Context, chosen: Chosen) -> list[Value]:
    term = first(context, chosen)
    return [] if term is None else depth_layout.view(context, context.node, term)


def _select(context: Context, chosen: Chosen) -> list[Value]:
    term = first(context, chosen)
    return [] if term is None else result(depth_layout.select(context, context.node, term))


def _slice(context: Context, chosen: Chosen) -> list[Value]:
    term = first(context, chosen)
    return [] if term is None else result(depth_layout.sliced(context, context.node, term))


def _gather(context: Context, chosen: Chosen) -> list[Value]:
    term = first(context, chosen)
    return [] if term is None else result(depth_layout.gathered(context, context.node, term))


def _contraction(context: Context, chosen: Chosen) -> list[Value]:
    return CONTRACTIONS[context.node.target](context, lambda given: operand(context, chosen, given))


def _attention(context: Context, chosen: Chosen) -> list[Value]:
    return attention(context, lambda given: operand(context, chosen, given))


TRANSFERS: Mapping[object, Transfer] = {
    **dict.fromkeys(
        (*TRANSPARENT, aten.to.other, aten.float.default) if hasattr(aten, "float") else TRANSPARENT, _keep
    ),
    **dict.fromkeys((*depth_layout.RESHAPES, *depth_layout.PERMUTATIONS, *depth_layout.EXPANSIONS), _view),
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default, aten.flip.default), _gather),
    **dict.fromkeys(
        (aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor, *depth_arith.DIVISIONS), depth_arith.product
    ),
    aten.pow.Tensor_Scalar: depth_arith.raised(None),
    aten.square.default: depth_arith.raised(2.0),
    aten.sqrt.default: depth_arith.raised(0.5),
    aten.rsqrt.default: depth_arith.raised(-0.5),
    aten.reciprocal.default: depth_arith.raised(-1.0),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default), depth_arith.clamped),
    aten.neg.default: depth_arith.negative,
    **dict.fromkeys((aten.sum.dim_IntList, aten.sum.default, aten.mean.dim), depth_reductions.total),
    aten.rms_norm.default: depth_reductions.rms_norm,
    aten.layer_norm.default: depth_reductions.layer_norm,
    **dict.fromkeys((aten.linalg_vector_norm.default, aten.linalg_norm.default), depth_reductions.vector_norm),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar), depth_arith.addition),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default, aten.log_softmax.int), depth_reductions.weights),
    aten.exp.default: depth_reductions.exponentials,
    aten.log.default: depth_reductions.logarithms,
    aten.logsumexp.default: depth_reductions.log_sums,
    aten.logaddexp.default: depth_reductions.joint_logs,
    aten.rsub.Scalar: depth_arith.reversed_subtraction,
    aten.lerp.Tensor: depth_arith.interpolation,
    aten.sigmoid.default: depth_reductions.gates,
    **dict.fromkeys(CONTRACTIONS, _contraction),
    aten.scaled_dot_product_attention.default: _attention,
}
