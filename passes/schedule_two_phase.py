"""schedule_two_phase: consecutive reads share one pass over the sources they have in common.

Before::  h_1 = attn_res_read(u_1, [b…], …)            After::  o, lse = attn_res_inter([u_1; u_2; …], [b…], …)
          h_2 = attn_res_read(u_2, [b…, p], …)                  h_1 = attn_res_merge(u_1, o, lse, [], 0, …)
                                                                h_2 = attn_res_merge(u_2, o, lse, [p], 1, …)

Valid because a query is a parameter and does not depend on what is computed in between (arXiv 2603.15031, algorithm
1); exact, because the merge continues the same softmax. Which reads form a group, and whether two phases pay at all,
the cost model decides by bytes moved (``passes/analysis/two_phase_cost.py``): for Full AttnRes and for small blocks.

Declined: a query that is not a parameter or constant, normalised values, a recency bias (which the order of the
sources matters to).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import is_call, value
from depthwire.passes.analysis.reads import INTER, READ, ReadForm, read_arguments, read_call, weights_by_name
from depthwire.passes.analysis.two_phase_cost import START_BYTES, Group, Site, cheapest_groups

if TYPE_CHECKING:
    from depthwire.program import Program

Policy = Literal["auto", "single"]

QUERIES = "attn_res.queries"


@dataclass(frozen=True)
class ScheduleTwoPhase(Pass):
    """Group reads into two phases where that moves fewer bytes.

    Attributes:
        policy: ``auto``: what the cost model finds; ``single``: leave every read as it is.
        start_bytes: What starting an operator counts as, in bytes that could have been moved meanwhile.
    """

    name: ClassVar[str] = "schedule_two_phase"
    adds_constants: ClassVar[bool] = True
    policy: Policy = "auto"
    start_bytes: int = START_BYTES

    def run(self, program: Program) -> PassResult:
        """Rewrite every group that pays."""
        reads = [node for node in program.exported.graph.nodes if is_call(node, READ)]
        if self.policy == "single" or len(reads) < 2:
            return PassResult(program, 0)
        order = {node: index for index, node in enumerate(program.exported.graph.nodes)}
        weights = weights_by_name(program)
        verdicts = [_match(node, order, weights) for node in reads]
        declines = tuple(verdict for verdict in verdicts if isinstance(verdict, Decline))
        matches = [verdict for verdict in verdicts if isinstance(verdict, _Read)]
        groups = cheapest_groups(_sites(matches), self.start_bytes)
        paying = [group for group in groups if group.pays]
        notes = tuple(_note(group, matches) for group in groups)
        if not paying:
            return PassResult(program, 0, declines, notes)
        edit = GraphEditor(program, self.name)
        for group in paying:
            _rewrite(matches[group.first : group.first + group.size], edit)
        return PassResult(edit.finish(), sum(group.size for group in paying), declines, notes)


@dataclass(frozen=True)
class _Read:
    """One read: its node, arguments, sources in graph order, and the query's values."""

    node: torch.fx.Node
    arguments: dict[str, Any]
    sources: list[torch.fx.Node]
    query: torch.Tensor


def _match(node: torch.fx.Node, order: dict[torch.fx.Node, int], weights: dict[str, torch.Tensor]) -> _Read | Decline:
    arguments = read_arguments(node)
    query: torch.fx.Node = arguments["query"]
    if query.name not in weights:
        return Decline("schedule-two-phase.query", where(node), "a query that is a parameter", str(query.target))
    if arguments["value_norm"]:
        return Decline("schedule-two-phase.value-norm", where(node), "un-normalised values", "value_norm=True")
    if arguments["last_bias"]:
        bias = f"last_bias={arguments['last_bias']}"
        return Decline(
            "schedule-two-phase.last-bias", where(node), "logits that the order of sources leaves alone", bias
        )
    sources = sorted(arguments["sources"], key=order.__getitem__)
    return _Read(node, arguments, sources, weights[query.name])


def _sites(reads: list[_Read]) -> list[Site]:
    sites = []
    before: list[torch.fx.Node] = []
    for read in reads:
        arguments, first = read.arguments, value(read.node)
        shared = 0
        for a, b in zip(before, read.sources, strict=False):
            if a is not b:
                break
            shared += 1
        kind = (arguments["eps"], arguments["scale"], tuple(first.shape), first.dtype)
        sites.append(Site(len(read.sources), shared, first.numel() * first.element_size(), kind))
        before = read.sources
    return sites


def _note(group: Group, reads: list[_Read]) -> str:
    members = reads[group.first : group.first + group.size]
    names = " … ".join(dict.fromkeys(where(read.node) for read in (members[0], members[-1])))
    kept = "two-phase" if group.pays else "single pass"
    other = f", two-phase {group.two_phase / 1e6:.2f} MB" if group.size > 1 else ""
    kind = f"{group.size} reads over {group.bank} shared" if group.size > 1 else f"one read over {group.bank}"
    return f"{names}: {kind} sources: single {group.single / 1e6:.2f} MB{other} -> {kept}"


def _rewrite(reads: list[_Read], edit: GraphEditor) -> None:
    head = edit.copy_of(reads[0].node)
    bank = [edit.copy_of(source) for source in reads[0].sources]
    stacked = torch.stack([read.query.detach().float() for read in reads])
    if value(head).dtype == torch.float64:
        stacked = torch.stack([read.query.detach().double() for read in reads])
    queries = edit.add_constant(edit.free_constant_name(QUERIES), stacked)
    eps, scale = reads[0].arguments["eps"], reads[0].arguments["scale"]
    inter = edit.call(INTER, (queries, bank, eps, scale), before=head, like=head)
    out, lse = (edit.call(operator.getitem, (inter, index), before=head, like=head) for index in (0, 1))
    for index, read in enumerate(reads):
        node = edit.copy_of(read.node)
        own = [edit.copy_of(source) for source in read.sources[len(bank) :]]
        arguments = {
            **read.arguments,
            "query": edit.copy_of(read.arguments["query"]),
            "inter_out": out,
            "inter_lse": lse,
            "sources": own,
            "index": index,
        }
        target, args = read_call(ReadForm(merge=True), arguments)
        merge = edit.call(target, args, before=node, like=node)
        edit.replace(node, merge, keep_name=True)
