"""The depth-attention operators as passes see them: which of the eight a node is, and its arguments by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import depthwire.ops  # noqa: F401 - registers the operators
from depthwire.passes._base import module_path
from depthwire.passes._match import is_call

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from depthwire.program import Program

ops = torch.ops.depthwire

READ = ops.attn_res_read.default
INTER = ops.attn_res_inter.default


@dataclass(frozen=True)
class ReadForm:
    """Which of the reads.

    Attributes:
        merge: Phase 2 of the two-phase form.
        add: The last source is a sum that is made on the way; the operator returns (read, sum).
        norm: The RMSNorm that follows is part of it.
    """

    merge: bool = False
    add: bool = False
    norm: bool = False

    @property
    def target(self) -> torch._ops.OpOverload:
        """The operator."""
        return _TARGETS[self]


_TARGETS = {
    ReadForm(): ops.attn_res_read.default,
    ReadForm(norm=True): ops.attn_res_read_norm.default,
    ReadForm(add=True): ops.attn_res_add_read.default,
    ReadForm(add=True, norm=True): ops.attn_res_add_read_norm.default,
    ReadForm(merge=True): ops.attn_res_merge.default,
    ReadForm(merge=True, norm=True): ops.attn_res_merge_norm.default,
    ReadForm(merge=True, add=True): ops.attn_res_add_merge.default,
    ReadForm(merge=True, add=True, norm=True): ops.attn_res_add_merge_norm.default,
}
_FORMS = {target: form for form, target in _TARGETS.items()}


def read_form(node: object) -> ReadForm | None:
    """Return which read a node is, ``None`` if it is none."""
    return _FORMS.get(node.target) if is_call(node, *_FORMS) else None  # type: ignore[attr-defined]


def find_reads(graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, ReadForm]]:
    """Yield the reads in graph order."""
    for node in graph.nodes:
        form = read_form(node)
        if form is not None:
            yield node, form


def read_arguments(node: torch.fx.Node) -> dict[str, Any]:
    """Return the arguments of a read by the names of its schema, defaults filled in."""
    names = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in names), node.args, strict=False))
    return {argument.name: argument.default_value for argument in names} | given | dict(node.kwargs)


def read_call(form: ReadForm, arguments: Mapping[str, Any]) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """Return operator and positional arguments of a read; trailing arguments at their defaults are left out."""
    schema = form.target._schema.arguments
    args = [arguments[argument.name] for argument in schema]
    while args and schema[len(args) - 1].has_default_value() and args[-1] == schema[len(args) - 1].default_value:
        args.pop()
    return form.target, tuple(args)


def describe_reads(graph: torch.fx.Graph) -> list[dict[str, Any]]:
    """Return the reads as JSON-ready values: node, module, the module that takes it, sources, options."""
    described = []
    for node, _ in find_reads(graph):
        arguments = read_arguments(node)
        reader = next(iter(node.users), None)
        options = {name: arguments[name] for name in ("eps", "scale")}
        options |= {name: arguments[name] for name in ("value_norm", "last_bias") if arguments[name]}
        described.append(
            {
                "node": node.name,
                "module": module_path(node),
                "reader": "" if reader is None else module_path(reader),
                "sources": [{"node": source.name, "module": module_path(source)} for source in arguments["sources"]],
                "options": options,
            }
        )
    return described


def weights_by_name(program: Program) -> dict[str, torch.Tensor]:
    """Return parameters and constants by the names of their placeholders."""
    exported = program.exported
    held = {**exported.constants, **exported.state_dict}
    specs = exported.graph_signature.input_specs
    return {spec.arg.name: held[str(spec.target)] for spec in specs if str(spec.target) in held}
