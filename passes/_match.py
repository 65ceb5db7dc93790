"""Small predicates over FX nodes that several passes share: match structure, not one exporter's spelling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from torch.export import ExportedProgram

    from depthwire.program import Program

aten = torch.ops.aten

VIEWS = (aten.view.default, aten._unsafe_view.default)
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default)
# Values pass through these unchanged; at most dtype or memory layout differs.
TRANSPARENT = (
    *CASTS,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.lift_fresh_copy.default,
)
# These look at the shape and dtype of their first argument, never at its values.
_SHAPES = (
    aten._assert_tensor_metadata.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.new_empty.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones_like.default,
    aten.sym_size.int,
    aten.zeros_like.default,
)


def is_call(node: object, *targets: object) -> bool:
    """Tell whether a value is a call of one of the operators."""
    return isinstance(node, torch.fx.Node) and node.op == "call_function" and node.target in targets


def uses_values(user: torch.fx.Node, node: torch.fx.Node) -> bool:
    """Tell whether a user of a node depends on its values, not just on its shape and dtype."""
    if is_call(user, aten.type_as.default):
        return user.args[0] is node
    return not is_call(user, *_SHAPES)


def readers(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the users that depend on a node's values."""
    return [user for user in node.users if uses_values(user, node)]


def value(node: torch.fx.Node) -> Any:
    """Return the recorded (fake) value of a node."""
    return node.meta.get("val")


def is_float(node: torch.fx.Node) -> bool:
    """Tell whether a node's value is one floating-point tensor."""
    val = value(node)
    return isinstance(val, torch.Tensor) and val.dtype.is_floating_point


def same_shape(a: torch.fx.Node, b: torch.fx.Node) -> bool:
    """Tell whether two nodes hold tensors of one shape."""
    va, vb = value(a), value(b)
    return isinstance(va, torch.Tensor) and isinstance(vb, torch.Tensor) and va.shape == vb.shape


def strip(node: torch.fx.Node) -> torch.fx.Node:
    """Follow casts, copies and disabled dropout back to the value they pass on."""
    while is_call(node, *TRANSPARENT) and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
    return node


def scalar(argument: object) -> float | None:
    """Return a Python number given as an argument, else ``None``."""
    if isinstance(argument, bool) or not isinstance(argument, (int, float)):
        return None
    return float(argument)


def operands(node: torch.fx.Node) -> tuple[Any, Any]:
    """Return the two operands of a binary call."""
    return node.args[0], node.args[1]


def commuted(node: torch.fx.Node) -> Iterable[tuple[Any, Any]]:
    """Yield the operands of a commutative binary call in both orders."""
    a, b = operands(node)
    return ((a, b), (b, a))


def last_axis(node: torch.fx.Node, argument: object) -> bool:
    """Tell whether a reduction's ``dim`` argument names just the last axis of its input."""
    dims = argument if isinstance(argument, (list, tuple)) else [argument]
    source = node.args[0]
    rank = value(source).dim() if isinstance(source, torch.fx.Node) else 0
    return len(dims) == 1 and dims[0] in (-1, rank - 1)


def argument(node: torch.fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument that may be given by position or by keyword."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def independent_of_inputs(exported: ExportedProgram) -> set[torch.fx.Node]:
    """Return the nodes whose values depend on weights and constants only, never on a user input."""
    users = {spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    return reachable_without(exported.graph, users)


def reachable_without(graph: torch.fx.Graph, roots: Container[str]) -> set[torch.fx.Node]:
    """Return the nodes that depend on none of the placeholders named in ``roots``."""
    free: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name not in roots:
                free.add(node)
        elif node.op != "output" and all(argument in free for argument in node.all_input_nodes):
            free.add(node)
    return free


def constants_of(program: Program) -> dict[str, torch.Tensor]:
    """Return the constant tensors of a program by the name of their placeholder."""
    known = program.exported.constants
    specs = program.exported.graph_signature.input_specs
    found = {spec.arg.name: known.get(str(spec.target)) for spec in specs if spec.target is not None}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def is_plain_sum(node: torch.fx.Node) -> bool:
    """Tell whether a node adds two different tensors of its own shape and dtype, both with weight one."""
    if not is_call(node, aten.add.Tensor) or argument(node, 2, "alpha", 1) != 1 or len(node.all_input_nodes) != 2:
        return False
    result = value(node)
    parts = [value(part) for part in node.all_input_nodes]
    return all(part.shape == result.shape and part.dtype == result.dtype for part in parts)
