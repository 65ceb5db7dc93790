"""What a value is made of, and what is made of it."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch


def ancestors(nodes: Iterable[torch.fx.Node]) -> set[torch.fx.Node]:
    """Return the nodes themselves and all that they are made of."""
    return _reached(nodes, attrgetter("all_input_nodes"))


def descendants(nodes: Iterable[torch.fx.Node]) -> set[torch.fx.Node]:
    """Return the nodes themselves and all that depend on them."""
    return _reached(nodes, attrgetter("users"))


def _reached(
    nodes: Iterable[torch.fx.Node], following: Callable[[torch.fx.Node], Iterable[torch.fx.Node]]
) -> set[torch.fx.Node]:
    found: set[torch.fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(following(node))
    return found
