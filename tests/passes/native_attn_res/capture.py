"""From a module to the canonical program, in which the recognition looks for reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from depthwire.export._torch_export import export_module
from depthwire.passes.standard import canonical_pipeline
from depthwire.program import Program, Source

if TYPE_CHECKING:
    from torch import Tensor, nn

READ = torch.ops.depthwire.attn_res_read.default
# What a bank of sources, or a softmax over it, is made of.
STACKS = ("stack", "cat", "select_scatter", "slice_scatter", "copy", "unbind")


def canonical(module: nn.Module, example: Tensor) -> Program:
    """Capture a module of one input as ``depthwire`` does, and run the canonical passes."""
    exported, names = export_module(module, (example,))
    inputs = {str(exported.graph_signature.user_inputs[0]): example}
    return canonical_pipeline().run(Program(exported, Source("module", type(module).__name__), inputs, tuple(names)))


def reads_of(program: Program) -> list[torch.fx.Node]:
    """Return the reads, in graph order."""
    return [node for node in program.exported.graph.nodes if node.target is READ]


def stacks_of(program: Program) -> list[str]:
    """Return the stacks and buffer writes that are left."""
    calls = [node for node in program.exported.graph.nodes if node.op == "call_function"]
    names = [str(getattr(node.target, "_opname", "")) for node in calls]
    return [name for name in names if name in STACKS]
