"""legalize_writes: writes into parts of a tensor become one concatenation.

Before::  a = slice_scatter(buffer, x, -1, 0, 16)        After::  b = cat([x, y], -1)
          b = slice_scatter(a, y, -1, 16, 24)

Code that fills a buffer piece by piece (``out[:, i] = …``, ``keys[..., :n].copy_(…)``) is captured as a chain of
scatters, which ONNX can only spell with an index for every element. Each element of the result comes from the last
write that covers it, else from the buffer; along the axis of the writes these are pieces, and the result is their
concatenation. A buffer that is covered whole is not read at all. ``copy(old, new)`` reads nothing of ``old`` and
becomes ``new``.
Left alone: writes with a step (``step``).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import argument, aten, is_call, value

if TYPE_CHECKING:
    import torch

    from depthwire.program import Program

_SLICE, _SELECT, _COPY = aten.slice_scatter.default, aten.select_scatter.default, aten.copy.default


@dataclass(frozen=True)
class LegalizeWrites(Pass):
    """Turn scatters along an axis into concatenations."""

    name: ClassVar[str] = "legalize_writes"

    def run(self, program: Program) -> PassResult:
        """Rewrite every chain of writes, and every copy."""
        if not any(is_call(node, _SLICE, _SELECT, _COPY) for node in program.exported.graph.nodes):
            return PassResult(program, 0)
        edit = GraphEditor(program, self.name)
        copies = [node for node in edit.graph.nodes if is_call(node, _COPY)]
        for node in copies:
            _forward(edit, node)
        rewrites, declines = len(copies), []
        edit.graph.eliminate_dead_code()  # what only a copy's first operand read would count as a reader below
        for node in reversed(list(edit.graph.nodes)):
            if not is_call(node, _SLICE, _SELECT) or not node.users or _continues(node):
                continue
            writes = _chain(node)
            if not writes:
                declines.append(
                    Decline("legalize-writes.step", where(node), "step 1", str(argument(node, 5, "step", 1)))
                )
                continue
            _concatenate(edit, node, writes)
            rewrites += 1
        return (
            PassResult(edit.finish(), rewrites, tuple(declines))
            if rewrites
            else PassResult(program, 0, tuple(declines))
        )


def _forward(edit: GraphEditor, copy: torch.fx.Node) -> None:
    """Let the readers of ``copy(old, new)`` read ``new``, in the shape and dtype of ``old``."""
    old: Any = copy.args[0]
    new: Any = copy.args[1]
    wanted, given = value(old), value(new)
    if given.dtype != wanted.dtype:
        new = edit.call(aten._to_copy.default, (new,), {"dtype": wanted.dtype}, before=copy, like=copy)
    if given.shape != wanted.shape:
        new = edit.call(aten.expand.default, (new, [int(size) for size in wanted.shape]), before=copy, like=copy)
    edit.replace(copy, new)


@dataclass(frozen=True)
class _Write:
    """One write along the chain's axis: ``[start, stop)`` is ``source``; a selected index has no axis of its own."""

    start: int
    stop: int
    source: torch.fx.Node
    select: bool


def _write(node: torch.fx.Node) -> tuple[int, _Write] | None:
    """Return the axis and the write of a scatter; ``None`` with a step."""
    rank = value(node).dim()
    source: Any = node.args[1]
    axis = int(argument(node, 2, "dim", 0)) % rank
    size = int(value(node).shape[axis])
    if is_call(node, _SELECT):
        start = int(argument(node, 3, "index")) % size
        return axis, _Write(start, start + 1, source, select=True)
    if int(argument(node, 5, "step", 1)) != 1:
        return None
    start, stop, _ = slice(argument(node, 3, "start"), argument(node, 4, "end")).indices(size)
    return axis, _Write(start, max(start, stop), source, select=False)


def _continues(node: torch.fx.Node) -> bool:
    """Tell whether a write is read by nothing but a later write of the same chain."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or not is_call(user, _SLICE, _SELECT) or user.args[0] is not node or user.args[1] is node:  # type: ignore[union-attr]
        return False
    own, later = _write(node), _write(user)  # type: ignore[arg-type]
    return own is not None and later is not None and own[0] == later[0]


def _chain(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the writes of a chain from the last to the first."""
    found: list[torch.fx.Node] = []
    while _write(node) is not None and (not found or _continues(node)):
        found.append(node)
        base: Any = node.args[0]
        if not is_call(base, _SLICE, _SELECT):
            break
        node = base
    return found


def _concatenate(edit: GraphEditor, end: torch.fx.Node, chain: list[torch.fx.Node]) -> None:
    writes = [written for written in map(_write, chain) if written is not None]
    axis = writes[0][0]
    pieces = _pieces([write for _, write in writes], chain[-1].args[0], int(value(end).shape[axis]))
    parts = []
    for start, stop, write in pieces:
        node = write.source
        if write.select:
            node = edit.call(aten.unsqueeze.default, (node, axis), before=end, like=end)
        if (start, stop) != (write.start, write.stop):
            span = (axis, start - write.start, stop - write.start)
            node = edit.call(aten.slice.Tensor, (node, *span), before=end, like=end)
        parts.append(node)
    joined = edit.call(aten.cat.default, (parts, axis), before=end, like=end)
    edit.replace(end, joined, keep_name=True)


def _pieces(writes: list[_Write], base: Any, size: int) -> list[tuple[int, int, _Write]]:
    """Return who is seen where, from start to end of the axis; the first write given lies on top."""
    layers = [*writes, _Write(0, size, base, select=False)]
    cuts = sorted({0, size, *(cut for layer in layers for cut in (layer.start, layer.stop))})
    pieces: list[tuple[int, int, _Write]] = []
    for start, stop in pairwise(cuts):
        top = next(layer for layer in layers if layer.start <= start and stop <= layer.stop)
        if pieces and pieces[-1][2] is top:
            start = pieces.pop()[0]  # noqa: PLW2901 - one piece again
        pieces.append((start, stop, top))
    return pieces
