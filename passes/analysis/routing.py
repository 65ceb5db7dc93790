"""How a graph routes rows to experts: rows sorted by expert, products over runs of rows, rows put back in place.

::

    sorted, order = sort(ids)            ids[r]: the expert of row r;  row r belongs to token r // k
    offsets = cumsum(histc(sorted))      where each expert's run of rows ends
    x[order // k]   w[order]   b[sorted]                rows in sorted order
    grouped_mm(rows, weights, offsets)                  each run times its expert's weight
    y[inverse]                           inverse[order[i]] = i

Every value that a routing touches has a role: an index (``Index``), or rows of which kind (``Rows``). Kinds say what
the rows are *apart from their order*, so that the order can be taken away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import CASTS, VIEWS, argument, aten, is_call, scalar, value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_GETITEM = "getitem"
_PASS = (*CASTS, *VIEWS, aten.reshape.default, aten.clone.default, aten.flatten.using_ints, aten.contiguous.default)
_QUOTIENTS = (aten.floor_divide.default,)
_SORTS = (aten.sort.default, aten.sort.stable)


class Index(Enum):
    """What an index of a routing selects."""

    ORDER = auto()  # row of position i
    SORTED = auto()  # expert of position i
    TOKEN = auto()  # token of position i
    OFFSETS = auto()  # end of each expert's run
    INVERSE = auto()  # position of row r


class Rows(Enum):
    """What the rows of a value are, apart from their order."""

    TOKEN = auto()  # a row is its token's
    ROW = auto()  # every row is its own
    EXPERT = auto()  # a row is its expert's
    DENSE = auto()  # a row is one entry of a table of experts and tokens
    RESULT = auto()  # rows in their first order again


@dataclass(frozen=True)
class Routing:
    """One sort of rows by expert.

    Attributes:
        ids: ``[S]`` integers, the expert of each row.
        rows: S.
        indices: The indices made from the sort.
        experts: E; 0 where the graph counts no rows.
        top_k: Rows of a token; 0 where no index of tokens is made.
    """

    ids: torch.fx.Node
    rows: int
    indices: Mapping[torch.fx.Node, Index] = field(repr=False)
    experts: int
    top_k: int


def is_grouped_product(node: torch.fx.Node) -> bool:
    """Tell whether a node multiplies runs of rows ``[S, K]`` by one matrix ``[E, K, N]`` each."""
    name = getattr(node.target, "name", None)
    if node.op != "call_function" or not callable(name):
        return False
    if name() == "transformers::grouped_mm_fallback":
        return True
    if name() != "aten::_grouped_mm" or argument(node, 3, "bias") is not None:
        return False
    wanted = argument(node, 4, "out_dtype")
    operands: Any = node.args[:2]
    plain = [value(operand).dim() for operand in operands] == [2, 3] and argument(node, 2, "offs") is not None
    return plain and wanted in (None, value(operands[0]).dtype)


def routings(graph: torch.fx.Graph, constants: Mapping[str, torch.Tensor]) -> Iterator[Routing]:
    """Yield every sort of rows by expert."""
    for node in graph.nodes:
        if not is_call(node, *_SORTS) or not isinstance(node.args[0], torch.fx.Node):
            continue
        ids = node.args[0]
        if value(ids).dim() != 1 or value(ids).dtype.is_floating_point or _descending(node):
            continue
        yield _routing(node, ids, constants)


def _descending(node: torch.fx.Node) -> bool:
    position = 3 if node.target is aten.sort.stable else 2
    return bool(argument(node, position, "descending", default=False))


def _routing(sort: torch.fx.Node, ids: torch.fx.Node, constants: Mapping[str, torch.Tensor]) -> Routing:
    indices: dict[torch.fx.Node, Index] = {}
    experts = top_k = 0
    rows = int(value(ids).shape[0])
    for user in sort.users:
        if getattr(user.target, "__name__", "") == _GETITEM:
            indices[user] = Index.ORDER if user.args[1] == 1 else Index.SORTED
    counts: dict[torch.fx.Node, int] = {}
    for node in sort.graph.nodes:
        known = [indices.get(argument) for argument in node.all_input_nodes]
        if Index.SORTED in known and is_call(node, *_PASS):
            indices[node] = Index.SORTED
        elif Index.SORTED in known and is_call(node, aten.histc.default):
            bins = int(argument(node, 1, "bins", 100))
            if scalar(argument(node, 2, "min", 0)) == 0 and scalar(argument(node, 3, "max", 0)) == bins - 1:
                counts[node] = bins
        elif is_call(node, aten.cumsum.default) and node.args[0] in counts:
            indices[node] = Index.OFFSETS
            experts = counts[node.args[0]]
        elif is_call(node, *_QUOTIENTS) and known[:1] == [Index.ORDER] and isinstance(node.args[1], int):
            indices[node] = Index.TOKEN
            top_k = node.args[1]
        elif is_call(node, aten.index_put.default) and _is_inverse(node, indices, rows, constants):
            indices[node] = Index.INVERSE
    return Routing(ids, rows, indices, experts, top_k)


def _is_inverse(
    node: torch.fx.Node, indices: Mapping[torch.fx.Node, Index], rows: int, constants: Mapping[str, torch.Tensor]
) -> bool:
    """Tell whether ``out[order] = 0, 1, …`` fills every place, so that what was there before does not matter."""
    where: Any = node.args[1]
    positions: Any = node.args[2]
    known = constants.get(getattr(positions, "name", ""))
    whole = len(where) == 1 and indices.get(where[0]) is Index.ORDER and tuple(value(node).shape) == (rows,)
    accumulates = bool(argument(node, 3, "accumulate", default=False))
    return whole and not accumulates and known is not None and torch.equal(known, torch.arange(rows, dtype=known.dtype))


def is_below(ids: torch.fx.Node, experts: int) -> bool:
    """Tell whether expert numbers come from a top-k over at most so many scores, so that all are in range."""
    node = ids
    while is_call(node, *_PASS):
        node = node.args[0]  # type: ignore[assignment]
    if (
        getattr(node.target, "__name__", "") != _GETITEM
        or node.args[1] != 1
        or not is_call(node.args[0], aten.topk.default)
    ):
        return False
    topk: Any = node.args[0]
    scores = value(topk.args[0])
    return int(scores.shape[int(argument(topk, 2, "dim", -1))]) <= experts


_LAST_AXIS = {
    # operator -> position, name and default of its axis
    aten.split.Tensor: (2, "dim", 0),
    aten.split_with_sizes.default: (2, "dim", 0),
    aten.chunk.default: (2, "dim", 0),
    aten.slice.Tensor: (1, "dim", 0),
    aten.select.int: (1, "dim", 0),
    aten.unsqueeze.default: (1, "dim", 0),
}
_NORMS = (aten.rms_norm.default, aten.layer_norm.default)


def axis_of(node: torch.fx.Node) -> tuple[int, str, int] | None:
    """Return where an operation takes its axis, and which it is, counted from the end; ``None`` if it has none."""
    if node.target not in _LAST_AXIS:
        return None
    position, name, default = _LAST_AXIS[node.target]
    source: Any = node.args[0]
    rank = value(source).dim() + (node.target is aten.unsqueeze.default)
    axis = int(argument(node, position, name, default))
    return position, name, axis if axis < 0 else axis - rank


def is_rowwise(node: torch.fx.Node, touched: Mapping[torch.fx.Node, Any]) -> bool:
    """Tell whether an operation makes each row of its result from the same row of its operands.

    Args:
        node: An operation.
        touched: The operands that hold rows; others may be broadcast over the rows, not lie along them.
    """
    if getattr(node.target, "__name__", "") == _GETITEM:
        return True
    source: Any = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, torch.fx.Node):
        return False
    axis = axis_of(node)
    if axis is not None:
        rank = value(source).dim() + (node.target is aten.unsqueeze.default)
        return source in touched and axis[2] != -rank
    if is_call(node, *_NORMS):
        shape: Any = node.args[1]
        return source in touched and len(shape) == 1 < value(source).dim()
    others = [value(operand) for operand in node.all_input_nodes if operand not in touched]
    rank = value(node).dim()
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_call(node, *CASTS, aten.clone.default)
    return pointwise and all(other.dim() < rank or int(other.shape[0]) == 1 for other in others)
