"""Tells what a branch of the residual stream is, attention or MLP, from the operations between norm and addition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from depthwire.passes._base import module_path
from depthwire.passes._match import TRANSPARENT, aten, independent_of_inputs, is_call, same_shape
from depthwire.passes.analysis.chain import ancestors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.export import ExportedProgram

_PRODUCTS = (
    aten.matmul.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
)
_LINEARS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.convolution.default,
    aten._grouped_mm.default,  # noqa: SLF001 - an operator's name
    *_PRODUCTS,
)
_SDPA = (
    aten.scaled_dot_product_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001 - an operator's name
)
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


class Branches:
    """Tells for one graph what lies between a sublayer's input and the end of a branch."""

    def __init__(self, exported: ExportedProgram) -> None:
        self._above = ancestors(exported.graph)
        self._free = independent_of_inputs(exported)

    def kinds(self, branch: torch.fx.Node, origins: Iterable[torch.fx.Node]) -> list[str]:
        """Return the kind of every addend of a branch: a parallel block may write attention + MLP in one sum."""
        start = self._mask(origins)
        return [self._kind(self._cone(addend, start)) for addend in self._addends(branch, start)]

    def module(self, branches: Sequence[torch.fx.Node], origins: Iterable[torch.fx.Node]) -> str:
        """Return the longest module path that all heavy operations of a sublayer's branches share."""
        start = self._mask(origins)
        heavy = [n for branch in branches for n in self._cone(branch, start) if _is_heavy(n) and module_path(n)]
        paths = [module_path(node).split(".") for node in heavy or branches]
        common = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common) or module_path(branches[0])

    def _mask(self, origins: Iterable[torch.fx.Node]) -> int:
        """Return the bits of the origins themselves: the highest bit of each ancestor set."""
        bits = 0
        for origin in origins:
            bits |= 1 << (self._above[origin].bit_length() - 1)
        return bits

    def _addends(self, branch: torch.fx.Node, start: int) -> list[torch.fx.Node]:
        """Split a sum of same-shaped values that all depend on the sublayer's input."""
        node = branch
        while is_call(node, *TRANSPARENT, aten.mul.Tensor):
            below = self._one_dependent(node, start)
            if below is None:
                break
            node = below
        if is_call(node, aten.add.Tensor):
            parts = [part for part in node.args[:2] if isinstance(part, torch.fx.Node)]
            if len(parts) == 2 and all(same_shape(part, node) and self._above[part] & start for part in parts):
                return [addend for part in parts for addend in self._addends(part, start)]
        return [branch]

    def _one_dependent(self, node: torch.fx.Node, start: int) -> torch.fx.Node | None:
        """Return the only operand that depends on the sublayer's input: the other is a scale."""
        dependent = [argument for argument in node.all_input_nodes if self._above[argument] & start]
        return dependent[0] if len(dependent) == 1 and same_shape(dependent[0], node) else None

    def _cone(self, branch: torch.fx.Node, start: int) -> set[torch.fx.Node]:
        """Return the nodes between the sublayer's input and the end of the branch."""
        seen: set[torch.fx.Node] = set()
        stack = [branch]
        while stack:
            node = stack.pop()
            own = 1 << (self._above[node].bit_length() - 1)
            if node in seen or own & start or not self._above[node] & start:
                continue
            seen.add(node)
            stack.extend(node.all_input_nodes)
        return seen

    def _kind(self, cone: set[torch.fx.Node]) -> str:
        if any(is_call(node, *_SDPA) for node in cone):
            return "attention"
        if any(is_call(node, *_SOFTMAX) and self._weighs_scores(node, cone) for node in cone):
            return "attention"
        return "mlp" if any(is_call(node, *_LINEARS) for node in cone) else "other"

    def _weighs_scores(self, softmax: torch.fx.Node, cone: set[torch.fx.Node]) -> bool:
        """Attention's scores are a product of two activations; a router's are one of activations and a weight."""
        seen: set[torch.fx.Node] = set()
        stack = list(softmax.all_input_nodes)
        while stack:
            node = stack.pop()
            if node in seen or node not in cone:
                continue
            seen.add(node)
            if is_call(node, *_PRODUCTS):
                if sum(operand not in self._free for operand in node.all_input_nodes) >= 2:
                    return True
            elif not is_call(node, *_LINEARS):
                stack.extend(node.all_input_nodes)
        return False


def _is_heavy(node: torch.fx.Node) -> bool:
    """Tell whether a node belongs to the sublayer proper: weights, attention or a library's operator, no glue."""
    return is_call(node, *_LINEARS, *_SDPA) or getattr(node.target, "namespace", "aten") not in ("aten", "prims")


def kind_of(kinds: list[str]) -> str:
    """Join the kinds of a sublayer's branches into one."""
    found = set(kinds)
    if {"attention", "mlp"} <= found:
        return "parallel"
    for kind in ("attention", "mlp"):
        if kind in found:
            return kind
    return "other"
