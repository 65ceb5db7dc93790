"""What a string in the JSON of a ``.pt2`` file may be, by the use that torch makes of it."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import torch

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A part that is no identifier stands between double quotes in generated source; none of these can end it.
QUALIFIED = re.compile(r"[A-Za-z0-9_.\-:/ ]+")
PLAIN = re.compile(r"[A-Za-z0-9_.\-+]*")
_OPERATOR = re.compile(r"torch\.ops\.(aten|depthwire)\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")
_REGIONS = {
    "torch.ops.higher_order.wrap_with_autocast",
    "torch.ops.higher_order.wrap_with_set_grad_enabled",
}
_METADATA = {"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node"}


class Refused(Exception):  # noqa: N818 (a verdict, turned into a CaptureError by the caller)
    """A string or structure stands where it may not.

    Attributes:
        where: Path inside the JSON document.
        why: What it could do.
        dynamic: It is no danger but a symbolic size.
    """

    def __init__(self, where: str, why: str, *, dynamic: bool = False) -> None:
        """Keep the parts for the message."""
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why
        self.dynamic = dynamic


def check_context(context: Any, where: str) -> None:
    """Allow no context, or the JSON text of a list of keys: anything else may name modules to import."""
    if context is None:
        return
    try:
        keys = json.loads(context) if isinstance(context, str) else context
    except ValueError as error:
        raise Refused(where, "a tree spec's context is not JSON") from error
    if not isinstance(context, str) or keys is None:
        if keys is not None:
            raise Refused(where, "a tree spec's context is not text")
        return
    if not isinstance(keys, list):
        raise Refused(where, "a tree spec's context is more than a list of keys")
    check_identifiers(keys, where)


def check_identifier(item: Any, where: str) -> None:
    """Allow a Python identifier: the text stands in generated source."""
    if item is not None and (not isinstance(item, str) or (item and not _IDENTIFIER.fullmatch(item))):
        raise Refused(where, f"{str(item)[:60]!r} is not an identifier, and torch generates source code from it")


def check_identifiers(item: Any, where: str) -> None:
    if item is not None and not isinstance(item, list):
        raise Refused(where, "it is not a list of names")
    for name in item or []:
        if not isinstance(name, str):
            raise Refused(where, "a name is not text")
        check_identifier(name, where)


def check_qualified(item: Any, where: str) -> None:
    """Allow a dotted name, whose parts may be numbers; the empty one is the root module."""
    if not isinstance(item, str) or (item and not QUALIFIED.fullmatch(item)):
        raise Refused(where, f"{str(item)[:60]!r} is not a dotted name, and torch generates source code from it")


def check_text(item: Any, where: str) -> None:
    """Allow any text: an operator's string argument, which torch quotes."""
    if not isinstance(item, str):
        raise Refused(where, "it is not text")


def check_texts(item: Any, where: str) -> None:
    if not isinstance(item, list) or not all(isinstance(text, str) for text in item):
        raise Refused(where, "it is not a list of text")


def check_metadata(item: Any, where: str) -> None:
    """Allow provenance, which torch keeps as text."""
    if not isinstance(item, dict) or not _METADATA.issuperset(item):
        raise Refused(where, "unknown metadata")
    for value in item.values():
        check_text(value, where)


def check_operator(item: Any, where: str) -> None:
    if not isinstance(item, str):
        raise Refused(where, "an operator is not text")
    problem = _operator_problem(item)
    if problem:
        raise Refused(where, f"{item[:80]!r} {problem}")


@functools.lru_cache(maxsize=4096)
def _operator_problem(target: str) -> str | None:
    """Return why a target is not a plain tensor operator, or ``None``."""
    if target in _REGIONS:
        return None
    match = _OPERATOR.fullmatch(target)
    if match is None:
        return "is not an operator of aten or depthwire"
    namespace, name, overload = match.groups()
    full = f"{namespace}::{name}" + ("" if overload == "default" else f".{overload}")
    # Operators of the dispatcher compute tensors; those that only TorchScript knows (aten::save) do other things.
    if full not in _dispatcher_operators():
        return "is not a tensor operator that this torch knows"
    schema = getattr(getattr(getattr(torch.ops, namespace), name), overload)._schema
    if any(argument.name == "filename" for argument in schema.arguments):
        return "opens a file"
    return None


@functools.lru_cache(maxsize=1)
def _dispatcher_operators() -> frozenset[str]:
    import depthwire.ops  # noqa: F401 (registers the operators of depthwire)

    return frozenset(torch._C._dispatch_get_all_op_names())  # noqa: SLF001
