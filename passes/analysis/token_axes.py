"""Where the tokens are: follows the token axis through the operations between a residual stream's states.

An axis is *routed* where a value of the routed graph holds K selected tokens instead of all T. ``Axes`` maps such an
axis to its lead: how many other things the axis runs over before the tokens (``[B, T, d]`` flattened to ``[B·T, d]``
has axis 0 with lead B), so that its size is lead·T before, lead·K after.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import argument, aten, value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Axes = dict[int, int]
Place = tuple[int, int]
"""An axis that runs over the batch, and how many other things it runs over within one batch element."""

RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
_DIM_ARGUMENT = {
    # operator -> position and default of the axis it works along; other axes pass through
    aten.slice.Tensor: (1, 0),
    aten.split.Tensor: (2, 0),
    aten.split_with_sizes.default: (2, 0),
    aten.chunk.default: (2, 0),
    aten.log_softmax.int: (1, -1),
    aten.glu.default: (1, -1),
    aten.narrow.default: (1, 0),
}
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_REDUCTIONS = (
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    aten.var.correction,
    aten.linalg_vector_norm.default,
)
NORMS = (aten.rms_norm.default, aten.layer_norm.default)


def reshaped(before: Sequence[int], after: Sequence[int], axes: Mapping[int, int], tokens: int) -> Axes | None:
    """Return the routed axes behind a reshape, ``None`` if it cuts the tokens up or joins them with a later axis.

    Args:
        before: Shape of the input, with all T tokens.
        after: Shape of the result.
        axes: Routed axes of the input.
        tokens: T.
    """
    found: Axes = {}
    for axis in axes:
        behind = math.prod(before[axis + 1 :])
        place = next(
            (b for b, size in enumerate(after) if size % tokens == 0 and math.prod(after[b + 1 :]) == behind), None
        )
        if place is None:
            return None
        found[place] = after[place] // tokens
    return found


def batch_place(before: Sequence[int], after: Sequence[int], place: Place, batch: int) -> Place | None:
    """Return where the batch is behind a reshape, ``None`` if it has been cut up.

    Args:
        before: Shape of the input.
        after: Shape of the result.
        place: Where the batch was.
        batch: B.
    """
    stride = math.prod(before[place[0] + 1 :]) * place[1]
    for axis, size in enumerate(after):
        behind = math.prod(after[axis + 1 :])
        if stride % behind == 0 and (size * behind) % (stride * batch) == 0:
            return axis, stride // behind
    return None


def routed_shape(shape: Sequence[int], axes: Mapping[int, int], slots: int, *, flexible: bool) -> list[int]:
    """Return a shape with K in place of T; a single plain token axis is left open (-1) if ``flexible``."""
    sizes = [axes[axis] * slots if axis in axes else int(size) for axis, size in enumerate(shape)]
    if flexible and len(axes) == 1 and all(lead == 1 for lead in axes.values()):
        sizes[next(iter(axes))] = -1
    return sizes


def moved(node: torch.fx.Node, axes: Axes) -> Axes | None:
    """Return the routed axes behind an operation that permutes, adds or drops axes; ``None`` for another operation.

    Raises:
        TokenAxisError: The operation drops the tokens' axis.
    """
    source: Any = node.args[0]
    rank = value(source).dim() if isinstance(source, torch.fx.Node) else 0
    if node.target is aten.transpose.int:
        a, b = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
        swap = {a: b, b: a}
        return {swap.get(axis, axis): lead for axis, lead in axes.items()}
    if node.target is aten.t.default:
        return {1 - axis: lead for axis, lead in axes.items()}
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        order = [int(axis) % rank for axis in dims]
        return {order.index(axis): lead for axis, lead in axes.items()}
    if node.target is aten.unsqueeze.default:
        at = int(node.args[1]) % (rank + 1)  # type: ignore[arg-type]
        return {axis + (axis >= at): lead for axis, lead in axes.items()}
    if node.target in (aten.squeeze.dim, aten.squeeze.dims, aten.select.int, aten.unbind.int):
        given: Any = argument(node, 1, "dim", 0)
        gone = sorted({int(dim) % rank for dim in (given if isinstance(given, (list, tuple)) else [given])})
        if node.target not in (aten.select.int, aten.unbind.int):
            gone = [dim for dim in gone if value(source).shape[dim] == 1]
        return _dropped(axes, gone)
    return None


def kept(node: torch.fx.Node, axes: Axes) -> Axes | None:
    """Return the routed axes behind an operation that works along other axes alone; ``None`` for another operation.

    Raises:
        TokenAxisError: It works along the tokens.
    """
    source: Any = node.args[0]
    if node.target in _DIM_ARGUMENT:
        position, default = _DIM_ARGUMENT[node.target]
        along = int(argument(node, position, "dim", default)) % value(source).dim()
        if along in axes:
            raise TokenAxisError("works along the tokens")
        return dict(axes)
    if node.target in NORMS:
        shape: Any = node.args[1]
        if any(axis >= value(source).dim() - len(shape) for axis in axes):
            raise TokenAxisError("normalises over the tokens")
        return dict(axes)
    if node.target in _REDUCTIONS:
        position = 2 if node.target is aten.linalg_vector_norm.default else 1
        keep_position = {aten.var.correction: 3}.get(node.target, position + 1)
        dims: Any = argument(node, position, "dim")
        rank = value(source).dim()
        gone = sorted({int(dim) % rank for dim in (dims or range(rank))})
        if any(dim in axes for dim in gone):
            raise TokenAxisError("reduces over the tokens")
        return dict(axes) if argument(node, keep_position, "keepdim", default=False) else _dropped(axes, gone)
    return None


class TokenAxisError(Exception):
    """An operation does not keep tokens apart; the message says what it does."""


def _dropped(axes: Axes, gone: Sequence[int]) -> Axes:
    if any(axis in axes for axis in gone):
        raise TokenAxisError("takes one token out")
    return {axis - sum(dim < axis for dim in gone): lead for axis, lead in axes.items()}
