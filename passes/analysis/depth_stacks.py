"""Stacks, buffers and calls with several results: what is not one alternative at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.passes._match import argument, aten, is_call, value
from depthwire.passes.analysis import depth_layout
from depthwire.passes.analysis.depth_arith import with_dims
from depthwire.passes.analysis.depth_axes import sizes
from depthwire.passes.analysis.depth_packages import package_results
from depthwire.passes.analysis.depth_reductions import rms_norm
from depthwire.passes.analysis.depth_values import Term, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from depthwire.passes.analysis.depth_product import Context

Alternatives = list[Value]

BY_DEPTH = (aten.stack.default, aten.cat.default, aten.concat.default, aten.concatenate.default, aten.vstack.default)
WRITES = (aten.select_scatter.default, aten.slice_scatter.default, aten.copy.default)
TUPLES = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def joined(context: Context, alternatives: Callable[[object], Alternatives]) -> Alternatives:
    """``stack`` and ``cat``."""
    node = context.node
    listed: Any = node.args[0]
    new = is_call(node, aten.stack.default)
    rank = value(node).dim()
    axis = 0 if is_call(node, aten.vstack.default) else int(argument(node, 1, "dim", 0)) % rank
    operands: list[Alternatives] = []
    for each in listed:
        if value(each).numel() == 0:
            continue  # a bank that starts empty
        if value(each).dim() != (rank - 1 if new else rank):
            return []
        if each in context.constants:
            operands.append([depth_layout.root(context, each)])
        else:
            operands.append(alternatives(each))
    return depth_layout.join(context, operands, axis, new=new) if operands else []


def buffer(context: Context, alternatives: Callable[[object], Alternatives]) -> Alternatives:
    """``select_scatter``, ``slice_scatter`` and ``copy``: what functionalisation makes of writes into a buffer."""
    node = context.node
    base: Any = node.args[0]
    piece: Any = node.args[1]
    if is_call(node, aten.copy.default):
        same = value(base).shape == value(piece).shape
        return alternatives(piece) if same else _broadcast_write(context, alternatives(piece))
    if value(node).dim() == 0:
        return []
    keep = is_call(node, aten.slice_scatter.default)
    axis = int(argument(node, 2, "dim", 0)) % value(node).dim()
    if keep:
        indices = depth_layout.slice_range(node, 2)
    else:
        index = int(argument(node, 3, "index")) % int(value(node).shape[axis])
        indices = range(index, index + 1)
    known: Sequence[Value] = alternatives(base)
    if base in context.constants:
        known = [depth_layout.blank(context, base, axis)]
    part = [depth_layout.root(context, piece)] if piece in context.constants else alternatives(piece)
    return depth_layout.write(context, known, part, axis, indices, keep=keep)


def _broadcast_write(context: Context, found: Alternatives) -> Alternatives:
    shape = [int(size) for size in value(context.node).shape]
    long = [size for size in shape if size > 1]
    results: Alternatives = []
    for each in found:
        if isinstance(each, Term) and [s for s in sizes(each.dims) if s > 1] == long:
            results.append(with_dims(each, depth_layout.expanded(each.dims, shape)))
    return results


def tuple_of(context: Context, alternatives: Callable[[object], Alternatives]) -> list[Alternatives]:
    """Return the alternatives of every result of a call with several."""
    node = context.node
    count = len(value(node))
    results: list[Alternatives] = [[] for _ in range(count)]
    if is_call(node, *TUPLES):
        for term in alternatives(node.args[0]):
            for index, piece in enumerate(depth_layout.pieces(context, node, term)):
                if piece is not None:
                    results[index].append(piece)
        return results
    if is_call(node, aten._fused_rms_norm.default):
        for term in alternatives(node.args[0]):
            results[0] += rms_norm(context, {node.args[0]: term})  # type: ignore[dict-item]
        return results
    return package_results(context, alternatives) or results
