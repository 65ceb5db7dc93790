"""Lifted programs with random queries, for the tests of what happens to reads afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from depthwire.passes._match import is_call
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.reads import READ, find_reads
from depthwire.passes.lift_attn_res import LiftAttnRes
from depthwire.passes.partition import Partition
from depthwire.passes.queries import QUERY_PREFIX
from depthwire.passes.standard import canonical_pipeline
from tests.passes.parity import named, sabotaged
from tests.zoo import Spec, build, inputs, program_of

if TYPE_CHECKING:
    from depthwire.passes._edit import GraphEditor
    from depthwire.program import Program


def lifted(
    spec: Spec, attn_res: str = "full", *, dtype: torch.dtype = torch.float64, zero: bool = False, length: int = 5
) -> Program:
    """Return a lifted program; unless ``zero``, its queries are far from zero."""
    program = program_of(build(spec, dtype=dtype), inputs(length=length))
    step = LiftAttnRes(Partition.parse(attn_res))
    program = Pipeline((*canonical_pipeline().passes, step)).run(program)
    return program if zero else with_queries(program)


def with_queries(program: Program, *, seed: int = 3) -> Program:
    """Return the program with random queries, which make logits of a few units."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in program.exported.state_dict.items():
        if name.startswith(QUERY_PREFIX):
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 2 / tensor.numel() ** 0.5
            state[name] = torch.nn.Parameter(drawn.to(tensor.dtype))
    return program.with_state({**program.exported.state_dict, **state})


def plain_reads(program: Program) -> list[torch.fx.Node]:
    """Return the reads that nothing is fused into."""
    return [node for node in program.exported.graph.nodes if is_call(node, READ)]


def forms(program: Program) -> list[str]:
    """Return the operators of all reads, in graph order, without namespace."""
    nodes = (node for node, _ in find_reads(program.exported.graph))
    return [str(node.target).removeprefix("depthwire.").removesuffix(".default") for node in nodes]


def with_odd_read(program: Program, oddity: Literal["query", "value-norm", "last-bias"]) -> Program:
    """Make the second read of a program odd: a computed query, normalised values, or a bias on its last source."""

    def change(edit: GraphEditor) -> None:
        read = named(edit, READ)[1]
        if oddity == "query":
            doubled = edit.call(torch.ops.aten.mul.Tensor, (read.args[0], 2.0), before=read, like=read)
            edit.set_arg(read, 0, doubled)
            return
        read.args = (*read.args, *(False, 0.0)[len(read.args) - 4 :])
        changes: dict[str, tuple[int, Any]] = {"value-norm": (4, True), "last-bias": (5, 1.5)}
        edit.set_arg(read, *changes[oddity])

    return sabotaged(program, change)
