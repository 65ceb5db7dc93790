"""fuse_read_add: the addition that makes a read's last source becomes part of the read.

Before::  p_2 = p_1 + f                                After::  h, p_2 = attn_res_add_read(query, [b, p_1], f, …)
          h = attn_res_read(query, [b, p_2], …)

The running sum is then written once while it is read, instead of being stored and fetched again. The operator returns
it, and later readers take it from there, so the read must come before all of them. Merges of the two-phase form alike.

Declined: no source that is an addition of two tensors of its own shape and dtype, or none whose sum is first needed by
this read. (With ``last_bias`` only the last source counts, otherwise any: the order of sources means nothing.)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import is_plain_sum
from depthwire.passes.analysis.reads import ReadForm, find_reads, read_arguments, read_call

if TYPE_CHECKING:
    import torch

    from depthwire.program import Program


@dataclass(frozen=True)
class FuseReadAdd(Pass):
    """Fuse the sum that a read needs first into the read."""

    name: ClassVar[str] = "fuse_read_add"

    def run(self, program: Program) -> PassResult:
        """Fuse every read whose newest source is an addition that nothing needs earlier."""
        graph = program.exported.graph
        order = {node: index for index, node in enumerate(graph.nodes)}
        verdicts = [(node, form, _match(node, order)) for node, form in find_reads(graph) if not form.add]
        declines = tuple(verdict for _, _, verdict in verdicts if isinstance(verdict, Decline))
        matches = [(node, form, verdict) for node, form, verdict in verdicts if not isinstance(verdict, Decline)]
        if not matches:
            return PassResult(program, 0, declines)
        edit = GraphEditor(program, self.name)
        for node, form, add in matches:
            _rewrite(edit.copy_of(node), form, edit.copy_of(add), edit)
        return PassResult(edit.finish(), len(matches), declines)


def _match(read: torch.fx.Node, order: dict[torch.fx.Node, int]) -> torch.fx.Node | Decline:
    arguments = read_arguments(read)
    sources: list[torch.fx.Node] = list(arguments["sources"])
    candidates = sources[-1:] if arguments["last_bias"] else sources
    adds = [source for source in candidates if is_plain_sum(source)]
    if not adds:
        names = ", ".join(sorted({str(source.target) for source in candidates})) or "no source"
        return Decline("fuse-read-add.no-sum", where(read), "a source that is the sum of two tensors", names)
    newest = max(adds, key=order.__getitem__)
    first = min(newest.users, key=order.__getitem__)
    if first is not read or sources.count(newest) > 1:
        return Decline("fuse-read-add.needed-earlier", where(read), f"the first to need {newest.name}", where(first))
    return newest


def _rewrite(read: torch.fx.Node, form: ReadForm, add: torch.fx.Node, edit: GraphEditor) -> None:
    arguments: dict[str, Any] = read_arguments(read)
    base, delta = add.args[:2]
    others = [source for source in arguments["sources"] if source is not add]
    target, args = read_call(
        ReadForm(merge=form.merge, add=True, norm=form.norm),
        {**arguments, "sources": [*others, base], "delta": delta},
    )
    fused = edit.call(target, args, before=read, like=read)
    out, total = (edit.call(operator.getitem, (fused, index), before=read, like=read) for index in (0, 1))
    edit.replace(read, out, keep_name=True)
    edit.replace(add, total, keep_name=True)
