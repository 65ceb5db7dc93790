"""canonicalize_views: ``view`` becomes ``reshape``, and ``x.T`` and ``x.mT`` become ``permute``.

Before::  view(x, [1, 512, -1])         After::  reshape(x, [1, 512, 576])
          numpy_T(w)                             permute(w, [1, 0])

A view is legal only for the strides its input happens to have; a rewrite that changes how the input is computed
(attention spelled out in matrix products, say) changes its strides. ``reshape`` means the same and always works.
Sizes are written out, so that no later stage has to infer a -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from depthwire.passes._base import Pass, PassResult
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import VIEWS, aten, is_call, value

if TYPE_CHECKING:
    import torch

    from depthwire.program import Program

_TRANSPOSITIONS = (aten.numpy_T.default, aten.mT.default)


@dataclass(frozen=True)
class CanonicalizeViews(Pass):
    """Turn views into reshapes with explicit sizes."""

    name: ClassVar[str] = "canonicalize_views"

    def run(self, program: Program) -> PassResult:
        """Rewrite every view, and every reshape with an inferred size."""
        if not any(_match(node) for node in program.exported.graph.nodes):
            return PassResult(program, 0)
        edit = GraphEditor(program, self.name)
        matches = [node for node in edit.graph.nodes if _match(node)]
        for node in matches:
            target, arguments = _canonical(node)
            new = edit.call(target, (node.args[0], arguments), before=node, like=node)
            edit.replace(node, new, keep_name=True)
        return PassResult(edit.finish(), len(matches))

    def ensures(self, program: Program) -> list[str]:
        """No view, no inferred size and no transposition without axes is left."""
        return [f"{node.name} is still a view" for node in program.exported.graph.nodes if _match(node)]


def _canonical(node: torch.fx.Node) -> tuple[torch._ops.OpOverload, list[int]]:
    """Return the operator that says the same with explicit sizes or axes, and these."""
    rank = value(node).dim()
    if is_call(node, aten.numpy_T.default):
        return aten.permute.default, list(reversed(range(rank)))
    if is_call(node, aten.mT.default):
        return aten.permute.default, [*range(rank - 2), rank - 1, rank - 2]
    return aten.reshape.default, [int(dim) for dim in value(node).shape]


def _match(node: torch.fx.Node) -> bool:
    if is_call(node, *VIEWS, *_TRANSPOSITIONS):
        return True
    return is_call(node, aten.reshape.default) and -1 in node.args[1]  # type: ignore[operator]
