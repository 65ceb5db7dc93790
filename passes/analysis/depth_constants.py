"""What a graph computes from weights and constants alone, as tensors.

A query, a key norm's gain, a temperature or a bias may be spelled in any way (cast, reshaped, multiplied, expanded over
the tokens): its values are simply computed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx.node import map_arg

from depthwire.passes._match import aten, is_call, value

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# These take shape and dtype from their first argument, and no values.
_FILLS = (
    aten.empty_like.default,
    aten.full_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones_like.default,
    aten.zeros_like.default,
)
# These take values from their first argument, shape or dtype from the second.
_LIKE = (aten.type_as.default, aten.expand_as.default, aten.view_as.default)
_BLANK = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
)
_LARGEST = 1 << 24


class Constants:
    """The constant part of one graph; computes values on demand and keeps them."""

    def __init__(self, exported: ExportedProgram) -> None:
        """Find the constant nodes."""
        specs = exported.graph_signature.input_specs
        users = {spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT}
        stored = {**exported.constants, **exported.state_dict}
        self._known: dict[torch.fx.Node, Any] = {}
        self._nodes: set[torch.fx.Node] = set()
        self._calls: dict[object, torch.fx.Node] = {}
        self._first: dict[torch.fx.Node, torch.fx.Node] = {}
        targets = {spec.arg.name: stored.get(str(spec.target)) for spec in specs}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                weight = targets.get(node.name)
                if node.name not in users and isinstance(weight, torch.Tensor):
                    self._nodes.add(node)
                    self._known[node] = weight.detach()
            elif node.op == "call_function" and self._follows(node):
                self._nodes.add(node)
                args, kwargs = map_arg((node.args, dict(node.kwargs)), self.first)
                known = self._calls.setdefault((node.target, str(args), str(kwargs)), node)
                if known is not node:
                    self._first[node] = known

    def __contains__(self, node: object) -> bool:
        """Tell whether a node is constant."""
        return node in self._nodes

    def first(self, node: torch.fx.Node) -> torch.fx.Node:
        """Return the first node that computes what a constant node does, so that equal constants are one."""
        return self._first.get(node, node)

    def _follows(self, node: torch.fx.Node) -> bool:
        if is_call(node, *_FILLS):
            return True
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return False
        if is_call(node, *_LIKE):
            return node.args[0] in self._nodes
        return all(argument in self._nodes for argument in node.all_input_nodes)

    def tensor(self, node: torch.fx.Node) -> torch.Tensor:
        """Return the values of a constant node; expanded dimensions stay expanded (stride 0)."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self._known:
                pending.pop()
                continue
            missing = [] if is_call(current, *_FILLS) else self._missing(current)
            if missing:
                pending += missing
                continue
            self._known[current] = self._compute(current)
            pending.pop()
        result: torch.Tensor = self._known[node]
        return result

    def _missing(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        inputs = node.all_input_nodes[:1] if is_call(node, *_LIKE) else node.all_input_nodes
        return [argument for argument in inputs if argument not in self._known]

    def _compute(self, node: torch.fx.Node) -> Any:
        with torch.no_grad():
            if is_call(node, *_FILLS):
                args = map_arg(node.args, lambda argument: torch.empty(value(argument).shape, dtype=_dtype(argument)))
                return node.target(*args, **node.kwargs)  # type: ignore[operator]
            if is_call(node, *_LIKE):
                source, wanted = self._known[node.args[0]], value(node)  # type: ignore[index]
                if is_call(node, aten.type_as.default):
                    return source.to(wanted.dtype)
                return (
                    source.expand(wanted.shape) if is_call(node, aten.expand_as.default) else source.view(wanted.shape)
                )
            args, kwargs = map_arg(node.args, self._known.get), map_arg(node.kwargs, self._known.get)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def is_fill(self, node: torch.fx.Node) -> bool:
        """Tell whether a node makes a tensor of one number."""
        return is_call(node, *_FILLS, aten.full.default, aten.ones.default, aten.zeros.default)

    def is_blank(self, node: torch.fx.Node) -> bool:
        """Tell whether a node is a fresh buffer, which something is about to be written into."""
        return is_call(node, *_BLANK)

    def number(self, node: torch.fx.Node) -> float | None:
        """Return the number that a constant holds everywhere, ``None`` if there is more than one."""
        val = value(node)
        if not isinstance(val, torch.Tensor) or not 0 < val.numel() <= _LARGEST or self.is_blank(node):
            return None
        if not val.dtype.is_floating_point and val.dtype not in (torch.int64, torch.int32):
            return None
        tensor = self.tensor(node)
        flat = tensor.reshape(-1)
        first = float(flat[0])
        same = flat.numel() == 1 or bool((flat == first).all())
        return first if same and math.isfinite(first) else None


def _dtype(node: torch.fx.Node) -> torch.dtype:
    dtype: torch.dtype = value(node).dtype
    return dtype


def spread(node: torch.fx.Node) -> list[bool]:
    """Tell for each dimension of a tensor whether its values may differ along it."""
    val = value(node)
    return [size > 1 and stride != 0 for size, stride in zip(val.shape, val.stride(), strict=True)]
