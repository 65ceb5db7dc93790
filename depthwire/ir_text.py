"""Canonical text of a program's graph: stable enough for golden files and for a structural hash.

Values are renumbered in order of first use, so that names do not matter; weights print as dtype, shape and (on
request) a short hash of their content; no paths, versions or line numbers appear; keyword arguments are sorted and
floats printed by ``repr``.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import InputKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.export import ExportedProgram

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
}
_KINDS = {
    InputKind.PARAMETER: "param",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "const",
    InputKind.USER_INPUT: "input",
}


def type_text(value: object) -> str:
    """Return ``f32[1,512,576]`` for a tensor, ``(…)`` for a tuple of values, else the type's name."""
    if isinstance(value, torch.Tensor):
        dims = ",".join(str(int(dim)) for dim in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{dims}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(type_text(item) for item in value) + ")"
    return type(value).__name__


def target_text(target: object) -> str:
    """Return the qualified operator name, such as ``aten.add.Tensor``."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def to_text(exported: ExportedProgram, *, content: bool = False) -> str:
    """Print a program canonically.

    Args:
        exported: The program.
        content: Add eight hex digits of each weight's content hash (reads every weight).

    Returns:
        One line per value: weights that are used, then operations, then the outputs.
    """
    kinds = {spec.arg.name: (_KINDS.get(spec.kind, spec.kind.name), spec.target) for spec in _specs(exported)}
    numbers: dict[str, str] = {}
    lines: list[str] = []

    def number(node: torch.fx.Node) -> str:
        return numbers.setdefault(node.name, f"%{len(numbers)}")

    for node in exported.graph.nodes:
        if node.op == "placeholder":
            kind, fqn = kinds.get(node.name, ("input", None))
            if kind != "input" and not node.users:
                continue
            suffix = f" #{_digest(exported, fqn)}" if content and fqn is not None else ""
            lines.append(f"{number(node)} = {kind} : {type_text(node.meta.get('val'))}{suffix}")
        elif node.op == "output":
            lines.append(f"return {_value(node.args[0], number)}")
        else:
            args = [_value(arg, number) for arg in node.args]
            args += [f"{key}={_value(value, number)}" for key, value in sorted(node.kwargs.items())]
            call = f"{target_text(node.target)}({', '.join(args)})"
            lines.append(f"{number(node)} = {call} : {type_text(node.meta.get('val'))}")
    return "\n".join(lines) + "\n"


def structural_hash(exported: ExportedProgram) -> str:
    """Return a hash of the graph's structure; equal graphs differ at most in names and in weights' content."""
    return hashlib.sha256(to_text(exported).encode()).hexdigest()


def _specs(exported: ExportedProgram) -> list[Any]:
    return [spec for spec in exported.graph_signature.input_specs if hasattr(spec.arg, "name")]


def _value(value: Any, number: Callable[[torch.fx.Node], str]) -> str:
    if isinstance(value, torch.fx.Node):
        return number(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item, number) for item in value) + "]"
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value).removeprefix("torch.")
    return repr(value)


def _digest(exported: ExportedProgram, fqn: str) -> str:
    tensor = exported.state_dict.get(fqn, exported.constants.get(fqn))
    if not isinstance(tensor, torch.Tensor):
        return "none"
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:8]
