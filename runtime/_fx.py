"""What the runners that walk a program's graph ask of its nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.fx import Node

_SELECTIONS = ("depthwire::select_tokens", "depthwire::select_tokens_budget")


def operator_name(node: Node) -> str:
    """Return the qualified name of the operator that a node calls; empty if it calls none."""
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else ""


def module_of(node: Node) -> str:
    """Return the path of the innermost module that a node came from; empty where the graph does not say."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def is_selection(node: Node) -> bool:
    """Tell whether a node selects the tokens of a routed unit."""
    return operator_name(node) in _SELECTIONS
