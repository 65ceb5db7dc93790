"""remove_trivial_reads: the read of a single source is that source.

Before::  h = attn_res_read(query, [v], eps, scale)        After::  users of h read v

The softmax over one logit is 1, whatever the query. (With ``value_norm`` the result is the normalised source: kept.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from depthwire.passes._base import Pass, PassResult
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import is_call
from depthwire.passes.analysis.reads import READ, read_arguments

if TYPE_CHECKING:
    import torch

    from depthwire.program import Program


@dataclass(frozen=True)
class RemoveTrivialReads(Pass):
    """Remove reads of a single source."""

    name: ClassVar[str] = "remove_trivial_reads"

    def run(self, program: Program) -> PassResult:
        """Let the users of every trivial read use its source."""
        trivial = [node for node in program.exported.graph.nodes if _match(node)]
        if not trivial:
            return PassResult(program, 0)
        edit = GraphEditor(program, self.name)
        for node in trivial:
            read = edit.copy_of(node)
            edit.replace(read, read_arguments(read)["sources"][0])
        return PassResult(edit.finish(), len(trivial))

    def ensures(self, program: Program) -> list[str]:
        """No trivial read is left."""
        return [f"{node.name} is still there" for node in program.exported.graph.nodes if _match(node)]


def _match(node: torch.fx.Node) -> bool:
    if not is_call(node, READ) or any(user.op == "output" for user in node.users):
        return False
    arguments = read_arguments(node)
    return len(arguments["sources"]) == 1 and not arguments["value_norm"]
