"""quantize_linear: linear weights become integers with scales; inputs are rounded to int8 where a plan says so.

Before::  y = linear(x, W)
After::   y = linear(dequantize(quantize(x, s)), dequantize(Q, S))     W ≈ Q · S;  x as it is where only W is rounded

Q is int8 (or lies in -8 … 7) in the layout of W, so a transpose behind W stays where it is. Layers that read one value
with one scale share its rounding. The weight leaves the program. What the plan does not name is declined with the
plan's reason: tied embeddings, heads, routers, priors. The values are the plan's (``analysis.quantization``); nothing
is chosen here, so one plan quantises every graph over the same weights alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

import depthwire.ops  # noqa: F401 - registers the operators
from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import value
from depthwire.passes.analysis.quantization_linears import Linear, find_linears

if TYPE_CHECKING:
    from depthwire.passes.analysis.quantization import QuantizationPlan, QuantizedWeight
    from depthwire.program import Program

QUANTIZE = torch.ops.depthwire.quantize.default
DEQUANTIZE = torch.ops.depthwire.dequantize.default


@dataclass(frozen=True)
class QuantizeLinear(Pass):
    """Put a plan's integers in the place of linear weights.

    Attributes:
        plan: What ``calibrate`` decided.
    """

    plan: QuantizationPlan

    name: ClassVar[str] = "quantize_linear"
    adds_constants: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """Quantise every linear weight of the program that the plan names."""
        linears = find_linears(program)
        declines = list(linears.kept.values())
        rewriter = _Rewriter(GraphEditor(program, self.name))
        done = 0
        for name, each in linears.found.items():
            weight = self.plan.weights.get(name)
            decline = self._refusal(name, each[0], weight)
            if weight is None or decline is not None:
                declines += [] if decline is None else [decline]
                continue
            rewriter.rewrite(name, each, weight)
            done += 1
        if not done:
            return PassResult(program, 0, tuple(declines))
        return PassResult(rewriter.edit.finish(), done, tuple(declines), (str(self.plan),))

    def _refusal(self, name: str, linear: Linear, weight: QuantizedWeight | None) -> Decline | None:
        at, shape = where(linear.node), list(value(linear.weight).shape)
        if weight is None:
            absent = Decline("quantize-linear.no-plan", at, "a weight that the plan names", name)
            return self.plan.kept.get(name, absent)  # the plan may know why, such as blocks that do not divide it
        stored = list(weight.values.shape)
        if stored != shape:
            return Decline("quantize-linear.shape", at, f"{name} {stored}, as in the plan", str(shape))
        return None

    def ensures(self, program: Program) -> list[str]:
        """Check that no weight of the plan is left in its old form, neither in the graph nor beside it."""
        left = {str(spec.target) for spec in program.exported.graph_signature.input_specs} & set(self.plan.weights)
        left |= set(program.exported.state_dict) & set(self.plan.weights)
        linears = find_linears(program)
        verdicts = {
            name: self._refusal(name, each[0], self.plan.weights.get(name)) for name, each in linears.found.items()
        }
        declined = linears.kept.keys() | {name for name, decline in verdicts.items() if decline is not None}
        return [f"{name} is in the program as it was" for name in sorted(left - declined)]


class _Rewriter:
    def __init__(self, edit: GraphEditor) -> None:
        self.edit = edit
        self._order = {node: index for index, node in enumerate(edit.graph.nodes)}
        self._inputs: dict[tuple[torch.fx.Node, float], torch.fx.Node] = {}

    def rewrite(self, name: str, linears: list[Linear], weight: QuantizedWeight) -> None:
        """Quantise one weight and the inputs of its layers."""
        edit = self.edit
        old = edit.copy_of(linears[0].weight)
        first = min((edit.copy_of(linear.reader) for linear in linears), key=self._order.__getitem__)
        values = edit.add_constant(f"{name}.int{weight.bits}", weight.values)
        scale = edit.add_constant(f"{name}.scale", weight.scale.to(value(old).dtype))
        args = (values, scale, weight.axis, weight.block, weight.bits)
        edit.replace(old, edit.call(DEQUANTIZE, args, before=first, like=first))
        edit.drop_weight(old)
        if weight.activation is not None:
            for linear in linears:
                if not linear.source:
                    self._round(name, linear, weight.activation)

    def _round(self, name: str, linear: Linear, scale: float) -> None:
        """Let a layer read its input rounded, right behind what makes it: others may read it so as well."""
        edit = self.edit
        node, source = edit.copy_of(linear.node), edit.copy_of(linear.input)
        key = (source, scale)
        if key not in self._inputs:
            stem = f"{name}.input_scale"
            fqn = stem if edit.is_free(stem) else edit.free_constant_name(stem)
            number = edit.add_constant(fqn, torch.tensor(scale, dtype=value(source).dtype))
            behind = source.next
            while behind.op == "placeholder":
                behind = behind.next
            integers = edit.call(QUANTIZE, (source, number), before=behind, like=node)
            self._inputs[key] = edit.call(DEQUANTIZE, (integers, number), before=behind, like=node)
        edit.reroute(node, source, self._inputs[key])
