"""remove_zero_queries: reads whose queries are zero become a plain residual stream again.

Before::  h = attn_res_read(0, [b, …, p], …)           After::  x = b + … + p, carried on from read to read
          n = norm(h, eps)                                      n = norm(x, n²·eps)

A read over n sources with a zero query is their mean x/n, whatever the eps and scale of its logits, and
norm_eps(x/n) = norm_{n²·eps}(x) for RMSNorm and LayerNorm. A reader that is no norm gets x·(1/n). The sums of
consecutive reads share their addends: a source that is itself a running sum is taken apart, so that each sublayer's
output is added once, and the bank of earlier sources is dropped altogether where no other read needs it.

This is for models whose queries have stayed zero; it is not done unless asked for, since it fixes them at zero.
Declined: a query that is not zero, normalised values, a recency bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import aten, is_call, is_plain_sum
from depthwire.passes.analysis.norm import Norm, find_norms
from depthwire.passes.analysis.reads import READ, read_arguments, weights_by_name
from depthwire.passes.analysis.residual_stream import split_readers

if TYPE_CHECKING:
    import torch

    from depthwire.program import Program


@dataclass(frozen=True)
class RemoveZeroQueries(Pass):
    """Turn zero-query reads back into a plain residual stream."""

    name: ClassVar[str] = "remove_zero_queries"

    def run(self, program: Program) -> PassResult:
        """Rewrite every read whose query is zero."""
        reads = [node for node in program.exported.graph.nodes if is_call(node, READ)]
        weights = weights_by_name(program)
        verdicts = [(node, _match(node, weights)) for node in reads]
        declines = tuple(verdict for _, verdict in verdicts if verdict is not None)
        zero = [node for node, verdict in verdicts if verdict is None]
        if not zero:
            return PassResult(program, 0, declines)
        norms = find_norms(program.exported)
        edit = GraphEditor(program, self.name)
        sums = _Sums(edit)
        for node in zero:
            _rewrite(node, norms, sums, edit)
        return PassResult(edit.finish(), len(zero), declines)


def _match(node: torch.fx.Node, weights: dict[str, torch.Tensor]) -> Decline | None:
    arguments = read_arguments(node)
    query = weights.get(arguments["query"].name)
    if query is None:
        return Decline("remove-zero-queries.query", where(node), "a query that is a parameter", "a computed one")
    if bool(query.any()):
        return Decline(
            "remove-zero-queries.not-zero",
            where(node),
            "a zero query",
            f"max |u| {float(query.detach().abs().max()):g}",
        )
    for option in ("value_norm", "last_bias"):
        if arguments[option]:
            return Decline("remove-zero-queries.option", where(node), f"no {option}", f"{option}={arguments[option]}")
    return None


class _Sums:
    """The running sums of the reads done so far: a read goes on from the longest one that it contains."""

    def __init__(self, edit: GraphEditor) -> None:
        self._edit = edit
        self._order = {node: index for index, node in enumerate(edit.graph.nodes)}
        self._addends: list[torch.fx.Node] = []
        self._sums: list[torch.fx.Node] = []  # of the first i + 1 addends

    def place(self, node: torch.fx.Node, like: torch.fx.Node) -> None:
        """Let a new node count as lying where another one lies."""
        self._order[node] = self._order[like]

    def of(self, sources: list[torch.fx.Node], read: torch.fx.Node) -> torch.fx.Node:
        """Return the sum of the sources, adding before ``read`` what has not been added up yet."""
        addends = sorted((part for source in sources for part in self._parts(source)), key=self._order.__getitem__)
        common = 0
        for known, wanted in zip(self._addends, addends, strict=False):
            if known is not wanted:
                break
            common += 1
        del self._addends[common:], self._sums[common:]
        for addend in addends[common:]:
            total = addend
            if self._sums:
                total = self._edit.call(aten.add.Tensor, (self._sums[-1], addend), before=read, like=read)
            self._addends.append(addend)
            self._sums.append(total)
        return self._sums[-1]

    def _parts(self, source: torch.fx.Node) -> list[torch.fx.Node]:
        """Take a running sum apart into what was added up, without recursion: a block may be long."""
        parts, stack = [], [source]
        while stack:
            node = stack.pop()
            if is_plain_sum(node):
                stack += node.all_input_nodes
            else:
                parts.append(node)
        return parts


def _rewrite(node: torch.fx.Node, norms: list[Norm], sums: _Sums, edit: GraphEditor) -> None:
    read = edit.copy_of(node)
    sources: list[torch.fx.Node] = list(read_arguments(read)["sources"])
    count = len(sources)
    found, others = split_readers(node, norms)
    total = sums.of(sources, read)
    if found and not others:
        edit.replace(read, total)
        for norm in found:
            site, position = norm.eps_site
            edit.set_arg(edit.copy_of(site), position if len(site.args) > position else "eps", norm.eps * count**2)
        return
    mean = edit.call(aten.mul.Tensor, (total, 1.0 / count), before=read, like=read)
    sums.place(mean, read)
    edit.replace(read, mean, keep_name=True)
