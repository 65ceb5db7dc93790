"""canonicalize_constants: compute once what depends on no input and no trainable weight.

Before::  arange → unsqueeze → mul(inv_freq) → cos          After::  c_folded_0 : f32[1,512,64]

Positions, rotary tables and causal masks are functions of the static shape alone. Parameters are never folded, so the
program stays trainable; a result larger than ``limit`` bytes is left as it is, so that the file does not grow.
Folded values become constants of the program and initializers of the ONNX graph. What is an output stays computed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.export.graph_signature import InputKind
from torch.fx.node import map_arg

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import reachable_without, value

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from depthwire.program import Program

_RANDOM = (torch.Tag.nondeterministic_seeded,)


@dataclass(frozen=True)
class CanonicalizeConstants(Pass):
    """Fold what depends on constants and buffers only.

    Attributes:
        limit: Largest result to fold, in bytes.
    """

    name: ClassVar[str] = "canonicalize_constants"
    adds_constants: ClassVar[bool] = True
    limit: int = 64 << 20

    def run(self, program: Program) -> PassResult:
        """Fold every maximal constant subgraph."""
        exported = program.exported
        frontier, declines = self._frontier(exported)
        if not frontier:
            return PassResult(program, 0, tuple(declines))
        values = _evaluate(exported, frontier)
        edit = GraphEditor(program, self.name)
        known: dict[object, torch.fx.Node] = {}
        for node in frontier:
            # Every layer unsqueezes the same rotary table: equal results share one constant.
            key = _content(values[node])
            if key not in known:
                known[key] = edit.add_constant(edit.free_constant_name("folded"), values[node])
            edit.replace(edit.copy_of(node), known[key])
        return PassResult(edit.finish(), len(frontier), tuple(declines))

    def _frontier(self, exported: ExportedProgram) -> tuple[list[torch.fx.Node], list[Decline]]:
        """Return the constant nodes that something non-constant reads, and those that are too large."""
        graph = exported.graph
        roots = {
            spec.arg.name
            for spec in exported.graph_signature.input_specs
            if spec.kind not in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        }
        mutated = set(exported.graph_signature.buffers_to_mutate.values())
        roots |= {s.arg.name for s in exported.graph_signature.input_specs if s.target in mutated}
        constant = {node for node in reachable_without(graph, roots) if node.op == "call_function" and _is_pure(node)}
        constant = {node for node in constant if not any(user.op == "output" for user in node.users)}
        constant = _closure(graph, constant)
        frontier, declines = [], []
        for node in graph.nodes:
            if node not in constant or all(user in constant for user in node.users):
                continue
            size = _bytes(node)
            if size is None:
                continue
            if size > self.limit:
                declines.append(
                    Decline("canonicalize-constants.too-large", where(node), f"at most {self.limit} bytes", f"{size}")
                )
            else:
                frontier.append(node)
        return frontier, declines


def _is_pure(node: torch.fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return not any(tag in tags for tag in _RANDOM)


def _closure(graph: torch.fx.Graph, candidates: set[torch.fx.Node]) -> set[torch.fx.Node]:
    """Return the candidates that read only weights, constants and one another."""
    closed: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node in candidates and all(arg.op == "placeholder" or arg in closed for arg in node.all_input_nodes):
            closed.add(node)
    return closed


def _bytes(node: torch.fx.Node) -> int | None:
    val = value(node)
    return val.numel() * val.element_size() if isinstance(val, torch.Tensor) else None


def _content(tensor: torch.Tensor) -> object:
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(data).digest()


def _evaluate(exported: ExportedProgram, wanted: list[torch.fx.Node]) -> dict[torch.fx.Node, torch.Tensor]:
    """Run the constant part of the graph on real tensors, and nothing else."""
    tensors = {**exported.constants, **exported.state_dict}
    inputs = {spec.arg.name: tensors.get(str(spec.target)) for spec in exported.graph_signature.input_specs}
    results: dict[torch.fx.Node, Any] = {}

    def compute(node: torch.fx.Node) -> Any:
        if node not in results:
            if node.op == "placeholder":
                results[node] = inputs[node.name]
            else:
                args, kwargs = map_arg(node.args, compute), map_arg(node.kwargs, compute)
                results[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return results[node]

    with torch.no_grad():
        return {node: compute(node).clone().contiguous() for node in wanted}
