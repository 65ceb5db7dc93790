"""Views, slices, stacks and buffer writes of terms."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import argument, aten, is_call, value
from depthwire.passes.analysis.depth_axes import (
    DEPTH,
    REPEAT,
    Atom,
    Dim,
    Dims,
    has_axis,
    is_identity,
    long_dims,
    order_of,
    own_axes,
    reshaped,
    sizes,
    whole,
)
from depthwire.passes.analysis.depth_values import Source, Tainted, Term, Value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from depthwire.passes.analysis.depth_product import Context

RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
)
PERMUTATIONS = (
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.mT.default,
    aten.numpy_T.default,
)
EXPANSIONS = (aten.expand.default, aten.expand_as.default)


def root(context: Context, node: torch.fx.Node) -> Term:
    """Return a node as a source of its own."""
    shape = [int(size) for size in value(node).shape]
    bank = context.banks.get([Source(node)], tuple(size for size in shape if size > 1))
    return Term(own_axes(shape), bank, 1)


def relayout(node: torch.fx.Node, dims: Dims) -> Dims | None:
    """Return what the dimensions of a view run over, given those of its input."""
    shape = [int(size) for size in value(node).shape]
    if is_call(node, *RESHAPES):
        return reshaped(dims, shape)
    if is_call(node, *PERMUTATIONS):
        return tuple(dims[axis] for axis in order_of(node, len(dims)))
    if is_call(node, *EXPANSIONS):
        return expanded(dims, shape)
    return None


def expanded(dims: Dims, shape: Sequence[int]) -> Dims:
    """Return the dimensions of a tensor that is broadcast to a shape."""
    padded: Dims = ((),) * (len(shape) - len(dims)) + dims
    return tuple(dim or (whole(REPEAT, size) if size > 1 else ()) for dim, size in zip(padded, shape, strict=True))


def view(context: Context, node: torch.fx.Node, term: Value) -> list[Value]:
    """Return a view of a term; a view of sources is also a stack of viewed sources."""
    dims = relayout(node, term.dims)
    if dims is None:
        return []
    viewed = replace(term, dims=dims)
    if not isinstance(viewed, Term):
        return [viewed]
    mix = viewed.mix
    if mix is not None and not has_queries(term.dims):
        before, after = (is_identity(each, mix.logits.bank.shape) for each in (term.dims, dims))
        if before and not after:
            return []  # the read stands before this view
    regrouped = _rerooted(context, viewed) if viewed.pure and viewed.deep else None
    return [viewed] if regrouped is None else [viewed, regrouped]


def has_queries(dims: Dims) -> bool:
    """Tell whether dimensions run over something else than the axes of a source."""
    return any(not isinstance(atom.axis, int) for dim in dims for atom in dim)


def _rerooted(context: Context, term: Term) -> Term | None:
    """Return a stack of sources whose tokens are regrouped as a stack of regrouped sources."""
    bank = term.over
    if is_identity(term.dims, bank.shape) or any(len({a.axis == DEPTH for a in dim}) > 1 for dim in term.dims):
        return None
    inner = long_dims(term.dims)
    if any(not isinstance(atom.axis, int) for dim in inner for atom in dim):
        return None
    if any(source.dims is not None for source in bank.sources):
        return None
    shape = tuple(sizes(inner))
    moved = context.banks.get([source._replace(dims=inner) for source in bank.sources], shape)
    return replace(term, bank=moved, dims=_depth_and_own(term.dims, len(bank)))


def _depth_and_own(dims: Dims, count: int) -> Dims:
    """Return the same dimensions, numbered as those of a new source."""
    result: list[Dim] = []
    axis = 0
    for dim in dims:
        if dim and dim[0].axis == DEPTH:
            result.append(whole(DEPTH, count))
        else:
            result.append(whole(axis, sizes([dim])[0]))
            axis += bool(dim)
    return tuple(result)


def take(context: Context, term: Term, indices: Sequence[int]) -> Term:
    """Return some of the sources of a term; ``dims`` are left to the caller."""
    bank = context.banks.take(term.over, indices)
    lanes = None if term.lanes is None else tuple(term.lanes[index] for index in indices)
    bias = None if term.bias is None else tuple(term.bias[index] for index in indices)
    return replace(term, bank=bank, lanes=lanes, bias=bias)


def pick(context: Context, term: Value, axis: int, indices: Sequence[int], *, keep: bool) -> Value | None:
    """Take some indices of one dimension, in any order; without ``keep`` a single one, whose dimension goes."""
    dim, others = term.dims[axis], term.dims[:axis] + term.dims[axis + 1 :]
    new: Dim = ()
    result: Value = term
    if list(indices) == list(range(sizes([dim])[0])):
        new = dim
    elif isinstance(term, Tainted) or len(dim) != 1:
        return context.taint(others, "unsupported")
    elif not isinstance(dim[0].axis, int) and dim[0].axis != REPEAT and has_axis(others, dim[0].axis):
        return context.taint(others, "unsupported")  # a part of an axis that was cut
    elif dim[0].axis == DEPTH:
        if term.lanes is not None and len(set(indices)) != len(indices):
            return context.taint(others, "unsupported")
        result, new = take(context, term, indices), whole(DEPTH, len(indices))
    elif not isinstance(dim[0].axis, int) and dim[0].axis != REPEAT and len(indices) == 1:
        result = replace(term, fixed=term.fixed | {(dim[0].axis, indices[0])})
    elif dim[0].axis == REPEAT:
        new = whole(REPEAT, len(indices))
    else:
        fewer = len(set(indices)) < sizes([dim])[0]
        partial = term.bank is not None and dim[0].axis == len(term.bank.shape) - 1 and fewer
        return context.taint(term.dims, "low-rank-keys" if partial else "unsupported")
    middle: Dims = (new,) if keep else ()
    return replace(result, dims=term.dims[:axis] + middle + term.dims[axis + 1 :])


def select(context: Context, node: torch.fx.Node, term: Value) -> Value | None:
    """``x[i]`` along one dimension."""
    axis, size = _axis(node, len(term.dims))
    index = int(argument(node, 2, "index")) % size
    return pick(context, term, axis, range(index, index + 1), keep=False)


def sliced(context: Context, node: torch.fx.Node, term: Value) -> Value | None:
    """``x[a:b:step]`` along one dimension."""
    axis, _ = _axis(node, len(term.dims))
    return pick(context, term, axis, slice_range(node, 1), keep=True)


def gathered(context: Context, node: torch.fx.Node, term: Value) -> Value | None:
    """``index_select``, indexing with one constant index tensor, and ``flip``."""
    if is_call(node, aten.flip.default):
        found: Value | None = term
        for axis in (int(each) % len(term.dims) for each in argument(node, 1, "dims")):
            backwards = range(sizes([term.dims[axis]])[0] - 1, -1, -1)
            found = None if found is None else pick(context, found, axis, backwards, keep=True)
        return found
    if is_call(node, aten.index_select.default):
        axis, index = int(argument(node, 1, "dim")) % len(term.dims), argument(node, 2, "index")
    else:
        given = [(axis, each) for axis, each in enumerate(argument(node, 1, "indices")) if each is not None]
        axis, index = given[0] if len(given) == 1 else (0, None)
    if index not in context.constants or value(index).dim() > 1 or value(index).numel() == 0:
        return context.taint(term.dims, "unsupported")
    tensor = context.constants.tensor(index)
    if tensor.dtype == torch.bool:
        return context.taint(term.dims, "unsupported")
    size = sizes([term.dims[axis]])[0]
    indices = [int(each) % size for each in tensor.reshape(-1)]
    keep = tensor.dim() == 1 or is_call(node, aten.index_select.default)
    return pick(context, term, axis, indices, keep=keep) if indices else None


def slice_range(node: torch.fx.Node, first: int) -> range:
    """Return the indices that a slice (or slice_scatter) names; ``first`` is the position of its ``dim``."""
    tensor: Any = node.args[0]
    dim = int(argument(node, first, "dim", 0))
    start, end = argument(node, first + 1, "start"), argument(node, first + 2, "end")
    step = argument(node, first + 3, "step", 1)
    return range(*slice(start, end, step).indices(int(value(tensor).shape[dim])))


def _axis(node: torch.fx.Node, rank: int) -> tuple[int, int]:
    axis = int(argument(node, 1, "dim", 0)) % rank
    tensor: Any = node.args[0]
    return axis, int(value(tensor).shape[axis])


def pieces(context: Context, node: torch.fx.Node, term: Value) -> list[Value | None]:
    """``unbind``, ``split`` and ``chunk``: one value per result."""
    unbind = is_call(node, aten.unbind.int)
    axis = int(argument(node, 1 if unbind else 2, "dim", 0)) % len(term.dims)
    results = value(node)
    start, found = 0, []
    for result in results:
        size = 1 if unbind else int(result.shape[axis])
        found.append(pick(context, term, axis, range(start, start + size), keep=not unbind))
        start += size
    return found


Form = tuple[Any, ...]


def form_of(term: Term, axis: int | None) -> Form | None:
    """Return what terms must agree in to be stacked along ``axis``: all but their sources."""
    if term.bank is None or term.lanes is not None:
        return None
    dims = term.dims
    if axis is None:
        if term.deep:
            return None
    else:
        lane = dims[axis]
        if lane != whole(DEPTH, len(term.bank)) or (term.deep and not lane):
            return None
        dims = dims[:axis] + dims[axis + 1 :]
    return (term.power, term.scalar, term.factors, term.shift, term.fixed, dims, term.bank.shape)


def join(context: Context, operands: Sequence[Sequence[Value]], axis: int, *, new: bool) -> list[Value]:
    """``stack`` (``new``) or ``cat`` of terms along one dimension.

    Args:
        context: The node at hand.
        operands: The alternatives of every operand.
        axis: The dimension of the result.
        new: Whether the operands do not have it yet.
    """
    where = None if new else axis
    tables: list[dict[Form, list[Term]]] = []
    for alternatives in operands:
        table: dict[Form, list[Term]] = {}
        for term in alternatives:
            form = form_of(term, where) if isinstance(term, Term) else None
            if form is not None and isinstance(term, Term):
                table.setdefault(form, []).append(term)
        tables.append(table)
    common = [form for form in tables[0] if all(form in table for table in tables[1:])]
    found: list[Value] = []
    for form in common:
        found.append(_joined(context, [table[form][0] for table in tables], form, axis))
        if any(len(table[form]) > 1 for table in tables):  # a norm sees no difference between a source and its double
            found.append(_joined(context, [table[form][-1] for table in tables], form, axis))
    if not found and not new:
        found = _joint(context, operands, axis)
    return found


def _joined(context: Context, terms: Sequence[Term], form: Form, axis: int) -> Term:
    banks = [term.bank for term in terms if term.bank is not None]
    bank = context.banks.get([source for each in banks for source in each.sources], banks[0].shape)
    bias = None
    if any(term.bias is not None for term in terms):
        bias = tuple(b for t, k in zip(terms, banks, strict=True) for b in (t.bias or (0.0,) * len(k)))
    dims: Dims = form[5]
    return replace(terms[0], bank=bank, bias=bias, dims=(*dims[:axis], whole(DEPTH, len(bank)), *dims[axis:]))


def _joint(context: Context, operands: Sequence[Sequence[Value]], axis: int) -> list[Value]:
    """Return what is left of logits over depth that are joined with others: a softmax over both is no read."""
    for alternatives in operands:
        for term in alternatives:
            if term.dims and term.deep and any(atom.axis == DEPTH for atom in term.dims[axis]):
                size = int(value(context.node).shape[axis])
                dim = (*term.dims[axis], Atom("other", 1, max(size - sizes([term.dims[axis]])[0], 1)))
                dims = (*term.dims[:axis], dim, *term.dims[axis + 1 :])
                return [Tainted(dims, "joint-softmax", context.node)]
    return []


def write(
    context: Context, base: Sequence[Value], piece: Sequence[Value], axis: int, indices: range, *, keep: bool
) -> list[Value]:
    """``select_scatter`` (without ``keep``) or ``slice_scatter`` of a term into another along one dimension."""
    found: list[Value] = []
    for part in piece:
        if not isinstance(part, Term):
            continue
        form = form_of(part, axis if keep else None)
        if form is None or part.bank is None or len(part.bank) != len(indices):
            continue
        for whole_term in base:
            if not isinstance(whole_term, Term) or whole_term.bank is None:
                continue
            if form_of(whole_term, axis) != form and not _unwritten(whole_term, axis, form):
                continue
            found.append(_written(context, whole_term, part, axis, indices, form[5]))
    return found


def _unwritten(term: Term, axis: int, form: Form) -> bool:
    """Tell whether a buffer is fresh, so that it takes the form of what is first written into it."""
    return all(source.blank for source in term.over.sources) and form[5:] == (
        term.dims[:axis] + term.dims[axis + 1 :],
        term.over.shape,
    )


def _written(context: Context, base: Term, part: Term, axis: int, indices: range, dims: Dims) -> Term:  # noqa: PLR0917
    sources = list(base.over.sources)
    bias = list(base.bias or (0.0,) * len(sources))
    for index, source, each in zip(indices, part.over.sources, part.bias or (0.0,) * len(indices), strict=True):
        sources[index], bias[index] = source, each
    bank = context.banks.get(sources, part.over.shape)
    return replace(
        part,
        bank=bank,
        bias=tuple(bias) if any(bias) else None,
        dims=(*dims[:axis], whole(DEPTH, len(bank)), *dims[axis:]),
    )


def blank(context: Context, node: torch.fx.Node, axis: int) -> Term:
    """Return a fresh buffer as a bank of unwritten slots along one dimension."""
    shape = [int(size) for size in value(node).shape]
    count = shape.pop(axis)
    bank = context.banks.get([Source(node, blank=True)] * count, tuple(size for size in shape if size > 1))
    dims = own_axes(shape)
    return Term((*dims[:axis], whole(DEPTH, count), *dims[axis:]), bank, 1)
