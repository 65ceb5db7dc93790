"""remove_noops: drop operations that pass their input on unchanged.

Before::  to = to.dtype(x, float32)   # x is float32 already        After::  users read x
          mul = mul.Tensor(x, 1.0)
          _assert_tensor_metadata(x, …)

Removed: metadata assertions (shapes and dtypes are static and checked between passes), casts to the dtype at hand,
dropout that is switched off, aliases and detached views, multiplication or division by 1, addition of 0, expansion
and reshape to the same shape, full slices. A copy (``clone``, ``contiguous``) goes too where it changes no layout.
Something is removed only where dtype, shape and strides stay exactly the same, and a copy that makes an output a value
of its own (apart from an input, a weight or another output) stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from depthwire.passes._base import Pass, PassResult
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import CASTS, VIEWS, argument, aten, is_call, scalar, value

if TYPE_CHECKING:
    from depthwire.program import Program

_COPIES = (aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default)
_RESHAPES = (*VIEWS, aten.expand.default, aten.reshape.default)
_ASSERTS = (aten._assert_tensor_metadata.default,)


@dataclass(frozen=True)
class RemoveNoops(Pass):
    """Remove operations without effect."""

    name: ClassVar[str] = "remove_noops"

    def run(self, program: Program) -> PassResult:
        """Remove every node that passes its input on unchanged."""
        if not any(_match(node) is not None for node in program.exported.graph.nodes):
            return PassResult(program, 0)
        edit = GraphEditor(program, self.name)
        rewrites = 0
        for node in list(edit.graph.nodes):
            source = _match(node)
            if source is None:
                continue
            rewrites += 1
            if source is not node:
                edit.replace(node, source)
            edit.graph.erase_node(node)
        return PassResult(edit.finish(), rewrites)

    def ensures(self, program: Program) -> list[str]:
        """Nothing removable is left."""
        return [f"{node.name} is still there" for node in program.exported.graph.nodes if _match(node) is not None]


def _match(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return the node that stands for this one, itself if it has no value, ``None`` if it must stay."""
    if is_call(node, *_ASSERTS):
        return node
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], torch.fx.Node):
        return None
    source = node.args[0]
    before, after = value(source), value(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    if before.dtype != after.dtype or before.shape != after.shape or before.device != after.device:
        return None
    if before.stride() != after.stride():
        return None
    return source if _is_identity(node) and not _separates_output(node, source) else None


def _separates_output(node: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Tell whether an output would coincide with an input, a weight or another output if this node went."""
    if not any(user.op == "output" for user in node.users):
        return False
    return source.op == "placeholder" or any(user.op == "output" for user in source.users)


def _is_identity(node: torch.fx.Node) -> bool:
    if is_call(node, *CASTS, *_COPIES, *_RESHAPES):
        return True
    if is_call(node, aten.dropout.default):
        return argument(node, 2, "train") is False or scalar(argument(node, 1, "p")) == 0.0
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return scalar(node.args[1]) == 1.0
    if is_call(node, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar):
        return scalar(node.args[1]) == 0.0
    if is_call(node, aten.slice.Tensor):
        return scalar(argument(node, 4, "step", 1)) == 1.0
    return False
