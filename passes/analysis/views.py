"""Views of a residual stream: what passes its tokens on, each multiplied by one and the same number.

::

    to(x, fp32)   dropout(x) in eval   reshape(x, [B·T, d])   x[:, -1:]   transpose(x, 0, 1)   x · 0.5

A norm that reads the stream through views reads the stream: norm_eps(c·x/n) = norm_{n²·eps}(c·x), token by token. And
the skip path may lead through views, which then apply to each source alike.
"""

from __future__ import annotations

from typing import Any

import torch

from depthwire.passes._match import TRANSPARENT, VIEWS, argument, aten, is_call, is_float, scalar, uses_values, value

_RESHAPES = (
    *VIEWS,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
_SELECTIONS = (aten.slice.Tensor, aten.select.int, aten.index_select.default)
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
_QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)


def viewed(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return the value that a node is a view of, or ``None`` if it is no view."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, torch.fx.Node) or not is_float(node) or not value(node).dim():
        return None
    if is_call(node, *_PRODUCTS, *_QUOTIENTS):
        is_view = factor(node) != 0.0
    elif is_call(node, *_RESHAPES):
        is_view = value(source).shape[-1:] == value(node).shape[-1:]
    else:
        is_view = is_call(node, *TRANSPARENT) or _moves_tokens(node, value(source).dim())
    return source if is_view else None


def factor(node: torch.fx.Node) -> float:
    """Return the number by which a view multiplies; 0.0 where a product or quotient is with no number but zero."""
    if is_call(node, *_PRODUCTS):
        return scalar(node.args[1]) or 0.0
    if is_call(node, *_QUOTIENTS):
        divisor = scalar(node.args[1])
        return 1.0 / divisor if divisor else 0.0
    return 1.0


def copies(view: torch.fx.Node) -> bool:
    """Tell whether a view leaves dtype, shape and values as they are."""
    source: Any = view.args[0]
    same = bool(value(source).dtype == value(view).dtype)
    return is_call(view, *TRANSPARENT) and same


def leaves(node: torch.fx.Node) -> list[tuple[torch.fx.Node, torch.fx.Node]]:
    """Return who reads a value, directly or through views: pairs of reader and the view that it reads."""
    found = []
    for user in node.users:
        if not uses_values(user, node):
            continue
        if viewed(user) is node:
            found += leaves(user)
        else:
            found.append((user, node))
    return found


def _moves_tokens(node: torch.fx.Node, rank: int) -> bool:
    """Tell whether a node picks or reorders tokens: any axis but the last, which stays the last."""
    arguments: Any = node.args
    if is_call(node, *_SELECTIONS):
        axes = [argument(node, 1, "dim", 0)]
    elif is_call(node, aten.transpose.int):
        axes = list(arguments[1:3])
    elif is_call(node, aten.permute.default):
        return int(arguments[1][-1]) % rank == rank - 1
    else:
        return is_call(node, aten.index.Tensor) and len(arguments[1]) < rank
    return all(int(axis) % rank != rank - 1 for axis in axes)
