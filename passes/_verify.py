"""The checks around every pass. ``graph.lint()`` alone accepts nodes without a shape, so these do more.

* The structural hash changed if and only if the pass reports rewrites.
* Every node whose operator, arguments or inputs changed is evaluated again on fake tensors; the recorded dtype and
  shape must be what comes out. (Unchanged nodes with unchanged inputs were checked before: induction.)
* User inputs keep their names, shapes and dtypes, outputs their number, shapes and dtypes, weights their shapes;
  parameters and constants appear only where declared.
* Every new node carries the pass's stamp, and provenance from some module.
* The pass's own promise (``ensures``) holds for the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind

from depthwire.errors import InternalError
from depthwire.ir_text import structural_hash, type_text
from depthwire.passes._edit import STAMP, fake_call, fake_mode_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch._subclasses.fake_tensor import FakeTensorMode

    from depthwire.passes._base import Pass, PassResult
    from depthwire.program import Program


@dataclass(frozen=True)
class Fingerprint:
    """A program as it was at one moment, to compare a later one with.

    Attributes:
        structure: Structural hash.
        nodes: Operator, arguments and type of every node, by name.
    """

    structure: str
    nodes: Mapping[str, tuple[Any, ...]]

    @classmethod
    def of(cls, program: Program) -> Fingerprint:
        """Take the fingerprint of a program."""
        nodes = {node.name: _signature_of(node) for node in program.exported.graph.nodes}
        return cls(structural_hash(program.exported), nodes)


def verify_pass(step: Pass, before: Program, result: PassResult, known: Fingerprint | None = None) -> Fingerprint:
    """Check one pass's result.

    Args:
        step: The pass.
        before: The program it was given.
        result: What it returned.
        known: The fingerprint of ``before``, taken before the pass ran.

    Returns:
        The fingerprint of the result, for the next pass.

    Raises:
        InternalError: The pass broke its contract; names the pass and everything that is wrong.
    """
    known = known or Fingerprint.of(before)
    after, same = result.program, known
    if after.exported is before.exported and structural_hash(after.exported) == known.structure:
        wrong = [*_check_report(result, changed=False), *step.ensures(after)]
    else:
        same = Fingerprint.of(after)
        wrong = [
            *_check_report(result, changed=same.structure != known.structure),
            *_check_signature(step, before, after),
            *_check_values(known, same, after),
            *_check_provenance(known, after),
            *step.ensures(after),
        ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise InternalError(
            "pass.contract-broken",
            f"The pass {step.name} produced a graph that breaks its contract",
            at=step.name,
            want="a graph that passes the checks between passes",
            got="; ".join(wrong[:3]) + more,
            todo="Report this with the model's configuration; 'depthwire inspect' still works.",
        )
    return same


def _check_report(result: PassResult, *, changed: bool) -> list[str]:
    if changed == (result.rewrites > 0):
        return []
    return [f"reports {result.rewrites} rewrites, but the graph {'changed' if changed else 'did not change'}"]


def _interface(program: Program, kind: InputKind) -> dict[str, str]:
    values = {node.name: node.meta.get("val") for node in program.exported.graph.nodes}
    specs = program.exported.graph_signature.input_specs
    return {str(s.target or s.arg.name): type_text(values[s.arg.name]) for s in specs if s.kind is kind}


def _outputs(program: Program) -> list[str]:
    values = {node.name: node.meta.get("val") for node in program.exported.graph.nodes}
    return [type_text(values[name]) for name in program.output_nodes]


def _check_signature(step: Pass, before: Program, after: Program) -> list[str]:
    wrong = []
    if _interface(before, InputKind.USER_INPUT) != _interface(after, InputKind.USER_INPUT):
        wrong.append("the user inputs changed")
    if _outputs(before) != _outputs(after):
        wrong.append("the outputs changed")
    added = {
        InputKind.PARAMETER: step.adds_parameters,
        InputKind.BUFFER: False,
        InputKind.CONSTANT_TENSOR: step.adds_constants,
    }
    for kind, allowed in added.items():
        old, new = _interface(before, kind), _interface(after, kind)
        name = kind.name.lower().replace("_", " ")
        if not allowed and set(new) - set(old):
            wrong.append(f"undeclared {name}: {', '.join(sorted(set(new) - set(old)))}")
        if not step.changes_dtypes:
            wrong += [f"the {name} {key} became {new[key]}" for key in old if key in new and new[key] != old[key]]
    return wrong


def _signature_of(node: torch.fx.Node) -> tuple[Any, ...]:
    return (node.op, node.target, str(node.args), str(node.kwargs), type_text(node.meta.get("val")))


def _has_value(node: torch.fx.Node) -> bool:
    """Tell whether a node has a result at all: assertions and the output have none."""
    schema = getattr(node.target, "_schema", None)
    return node.op != "output" and (schema is None or len(schema.returns) > 0)


class _Types:
    """What calls compute, in types. Shapes are static, so equal calls on equal types need be evaluated once."""

    def __init__(self) -> None:
        self._known: dict[object, str] = {}

    def of(self, node: torch.fx.Node, mode: FakeTensorMode) -> str:
        """Return the type of a call's result."""
        key = (node.target, _abstract(node.args), _abstract(node.kwargs))
        if key not in self._known:
            self._known[key] = type_text(fake_call(node, mode))
        return self._known[key]


def _abstract(argument: Any) -> object:
    """Return an argument with types in place of nodes: all that the type of a result depends on."""
    if isinstance(argument, torch.fx.Node):
        value = argument.meta["val"]
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape), tuple(value.stride())
        return type_text(value)
    if isinstance(argument, (list, tuple)):
        return tuple(_abstract(item) for item in argument)
    if isinstance(argument, dict):
        return tuple((key, _abstract(item)) for key, item in argument.items())
    return type(argument), repr(argument)


def _check_values(before: Fingerprint, fingerprint: Fingerprint, after: Program) -> list[str]:
    mode = fake_mode_of(after.exported.graph)
    fresh: set[torch.fx.Node] = set()
    types = _Types()
    wrong = []
    for node in after.exported.graph.nodes:
        changed = before.nodes.get(node.name) != fingerprint.nodes[node.name]
        if "val" not in node.meta and _has_value(node):
            wrong.append(f"{node.name} has no recorded value")
            continue
        if changed:
            fresh.add(node)
        if node.op != "call_function" or not (changed or any(arg in fresh for arg in node.all_input_nodes)):
            continue
        if any("val" not in arg.meta for arg in node.all_input_nodes):
            continue  # reported above
        recorded, computed = type_text(node.meta.get("val")), types.of(node, mode)
        if recorded != computed:
            return [*wrong, f"{node.name} records {recorded}, computes {computed}"]  # what follows builds on it
    return wrong


def _check_provenance(before: Fingerprint, after: Program) -> list[str]:
    wrong = []
    for node in after.exported.graph.nodes:
        if before.nodes.get(node.name, ())[:2] == (node.op, node.target) or node.op == "output":
            continue
        if STAMP not in (node.meta.get("custom") or {}):
            wrong.append(f"{node.name} does not say which pass made it")
        elif node.op == "call_function" and "nn_module_stack" not in node.meta:
            wrong.append(f"{node.name} has no provenance")
    return wrong
