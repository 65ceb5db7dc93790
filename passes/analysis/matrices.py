"""Functions of one matrix that a graph spells out in many small operations.

A region is read as a function of the two last axes of its input, the same for every index before them. It can then be
evaluated at a point, with the axes before them of size one, whatever sizes the program has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx.node import map_arg

from depthwire.passes._match import argument, aten, is_call, scalar, value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_COPIES = (aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default)
_ELEMENTWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default, aten.copy.default)
_PRODUCTS = (aten.matmul.default,)
_ALONG = (aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim)
_SCATTERS = (aten.slice_scatter.default, aten.select_scatter.default)


def acts_on_last_two(node: torch.fx.Node, leading: int) -> bool:
    """Tell whether an operation is polynomial and leaves the first ``leading`` axes of every operand apart.

    Args:
        node: An operation on tensors that all have those axes.
        leading: Number of axes that may be of any size.
    """
    tensors = [value(operand) for operand in node.all_input_nodes]
    if not tensors or not all(isinstance(tensor, torch.Tensor) and tensor.dim() >= leading for tensor in tensors):
        return False
    if is_call(node, *_ELEMENTWISE, *_PRODUCTS):
        # Of equal rank, the operands' leading axes meet one another.
        same = len({tensor.dim() for tensor in tensors}) == 1
        return same and all(isinstance(item, torch.fx.Node) or scalar(item) is not None for item in node.args)
    if is_call(node, aten.sum.dim_IntList):
        dims = argument(node, 1, "dim") or [0]
        return all(_axis(dim, tensors[0].dim()) >= leading for dim in dims)
    if is_call(node, *_ALONG):
        rank = tensors[0].dim() + (node.target is aten.unsqueeze.default)
        whole = is_call(node, aten.slice.Tensor) and value(node).shape == tensors[0].shape
        return whole or _axis(argument(node, 1, "dim", 0), rank) >= leading
    if is_call(node, *_SCATTERS):
        return _axis(argument(node, 2, "dim", 0), tensors[0].dim()) >= leading
    return is_call(node, *_COPIES)


def _axis(dim: Any, rank: int) -> int:
    return int(dim) % rank if rank else 0


def evaluate(region: Sequence[torch.fx.Node], known: Mapping[torch.fx.Node, torch.Tensor]) -> dict[torch.fx.Node, Any]:
    """Compute the nodes of a region, which stand in order, from the values of what enters it."""
    values: dict[torch.fx.Node, Any] = dict(known)
    with torch.no_grad():
        for node in region:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values
