"""The comparisons that the tests of passes share: one bound, the values of a graph's nodes, golden text."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from depthwire.ir_text import to_text
from depthwire.passes._edit import GraphEditor
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.lift_attn_res import LiftAttnRes

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.passes._base import Pass, PassResult
    from depthwire.program import Program

FP64 = 1e-9  # relative to the largest value; what a rewrite in fp64 may differ by
GOLDEN = Path(__file__).parent / "golden"


def runner(program: Program) -> Callable[..., list[Tensor]]:
    """Return a function from inputs to the program's outputs."""
    module = program.module()

    def call(*examples: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [leaf for leaf in pytree.tree_leaves(module(*examples)) if isinstance(leaf, Tensor)]

    return call


def run(program: Program, *examples: Tensor) -> list[Tensor]:
    """Return the outputs of a program."""
    return runner(program)(*examples)


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest wanted value of its output; NaN counts as infinite."""
    assert len(got) == len(want)
    worst = 0.0
    for left, right in zip(got, want, strict=True):
        assert left.shape == right.shape
        difference = float((left.double() - right.double()).abs().max() / right.double().abs().max())
        worst = max(worst, difference) if difference == difference else float("inf")  # noqa: PLR0124 - NaN
    return worst


def assert_parity(before: Program, after: Program, *, bound: float = FP64, seeds: range = range(3)) -> None:
    """Check that two programs compute the same on fresh inputs of the example's shapes."""
    got, want = runner(after), runner(before)
    for seed in seeds:
        examples = [like(example, seed) for example in before.example_inputs.values()]
        difference = error(got(*examples), want(*examples))
        assert difference <= bound, f"seed {seed}: {difference:.3e} > {bound:.1e}"


def like(example: Tensor, seed: int) -> Tensor:
    """Return a random tensor with the shape, dtype and range of an example."""
    generator = torch.Generator().manual_seed(seed)
    if example.dtype == torch.bool:
        return torch.rand(example.shape, generator=generator) > 0.3
    if example.dtype.is_floating_point:
        return torch.randn(example.shape, dtype=torch.float64, generator=generator).to(example.dtype)
    return torch.randint(0, int(example.max()) + 1, example.shape, generator=generator)


def apply(step: Pass, program: Program, *, parity: float = FP64) -> PassResult:
    """Run one pass between the pipeline's checks; check parity, the promise, and that a second run does nothing."""
    result = step.run(program)
    after = Pipeline((step,)).run(program)
    assert to_text(after.exported) == to_text(result.program.exported)
    assert after.history[-1].rewrites == result.rewrites
    assert step.ensures(after) == []
    if not isinstance(step, LiftAttnRes):
        again = step.run(after)
        assert again.rewrites == 0
        assert to_text(again.program.exported) == to_text(after.exported)
    assert_parity(program, after, bound=parity)
    return dataclasses.replace(result, program=after)


def sabotaged(program: Program, change: Callable[[GraphEditor], None]) -> Program:
    """Return the program with one thing done wrong."""
    edit = GraphEditor(program, "sabotage")
    change(edit)
    return edit.finish()


def named(edit: GraphEditor, *targets: object) -> list[torch.fx.Node]:
    """Return the calls of some operators, in graph order."""
    return [node for node in edit.graph.nodes if node.op == "call_function" and node.target in targets]


def named_nodes(program: Program, *targets: object) -> list[torch.fx.Node]:
    """Return the calls of some operators in a program, in graph order."""
    return [node for node in program.exported.graph.nodes if node.op == "call_function" and node.target in targets]


def sources_of(read: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the sources of an AttnRes read."""
    sources: Any = read.args[1]
    return list(sources)


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)

    def values(self, *arguments: object) -> dict[str, Any]:
        with torch.no_grad():
            self.run(*arguments)
        return {node.name: value for node, value in self.env.items()}


def node_values(program: Program, *examples: Tensor) -> dict[str, Any]:
    """Return the value of every node of a program."""
    exported = program.exported
    weights = {**exported.constants, **exported.state_dict}
    inputs = iter(examples)
    arguments = [
        weights[spec.target] if spec.target is not None else next(inputs)
        for spec in exported.graph_signature.input_specs
    ]
    return _Recorder(exported.graph_module).values(*arguments)


def check_golden(name: str, before: Program, after: Program) -> None:
    """Compare the text of a program before and after with ``golden/<name>.txt``.

    ``DEPTHWIRE_UPDATE_GOLDEN=1 pytest tests/passes`` writes the files instead.
    """
    text = f"# before\n{to_text(before.exported)}\n# after\n{to_text(after.exported)}"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("DEPTHWIRE_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, f"{path} differs; see check_golden"
