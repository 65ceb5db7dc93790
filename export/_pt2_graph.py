"""The JSON of a ``.pt2`` file: every string in it is checked before torch reads any.

torch turns this text into Python. Names of weights and of ``forward``'s arguments are pasted into generated source;
guards are pasted and executed; symbolic sizes go through ``sympy.sympify``, which evaluates; an operator may be any
attribute path below ``torch``; the enumerations of a tree spec import the module that they name. So the rule is the
other way round: a string is refused unless its place allows it, and each place allows little.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from depthwire.export._pt2_rules import (
    PLAIN,
    QUALIFIED,
    Refused,
    check_context,
    check_identifier,
    check_identifiers,
    check_metadata,
    check_operator,
    check_qualified,
    check_text,
    check_texts,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_MUST_BE_EMPTY = {
    "guards_code": "guards are Python source, which torch would execute",
    "custom_obj_values": "it uses a custom object",
    "treespec_namedtuple_fields": "it uses a named tuple, which torch would import",
}
_DYNAMIC = {"range_constraints", "sym_int_values", "sym_float_values", "sym_bool_values"}
_REFUSED = {
    "as_custom_obj": "it uses a custom object",
    "custom_obj": "it uses a custom object",
    "as_string_to_argument": "it passes a dictionary to an operator",
}


def check_model(document: Any) -> set[str]:
    """Check ``models/<name>.json``.

    Returns:
        The types that its tree specs name, apart from Python's own.

    Raises:
        Refused: Something could run code, or a size is symbolic.
    """
    walk = _Walk()
    if not isinstance(document, dict):
        raise Refused("$", "it is not a JSON object")
    walk.visit(document, "$")
    return walk.types


def check_payloads(document: Any, kind: str, sizes: dict[str, int]) -> None:
    """Check ``<name>_weights_config.json`` or ``<name>_constants_config.json``.

    Args:
        document: The parsed file.
        kind: ``weight`` or ``tensor``: the prefix of the payload members that it may name.
        sizes: Bytes of every such member, by name without folder.

    Raises:
        Refused: A payload is pickled, absent, unlisted or misdescribed.
    """
    config = document.get("config") if isinstance(document, dict) else None
    if not isinstance(config, dict):
        raise Refused("$", "it has no config")
    walk, used = _Walk(), set()
    for name, meta in config.items():
        where = f"$.config[{name!r}]"
        if not QUALIFIED.fullmatch(name):
            raise Refused(where, "the name of a weight is not a dotted name")
        path = meta.get("path_name") if isinstance(meta, dict) else None
        if not isinstance(path, str) or not re.fullmatch(rf"{kind}_\d+", path) or path not in sizes:
            raise Refused(where, f"its payload {path!r} is no raw member of the archive")
        if meta.get("use_pickle") is not False:
            raise Refused(where, "its payload is a pickle, which torch would load without restriction")
        walk.visit(meta, where)
        if not sizes[path] and _elements(meta.get("tensor_meta"), where):
            raise Refused(where, "its payload is empty: the program was saved without its weights")
        used.add(path)
    if used != set(sizes):
        raise Refused("$.config", f"it does not list the member {min(set(sizes) - used)}")


def _elements(meta: Any, where: str) -> int:
    sizes = meta.get("sizes") if isinstance(meta, dict) else None
    if not isinstance(sizes, list):
        raise Refused(where, "it has no sizes")
    count = 1
    for size in sizes:
        value = size.get("as_int") if isinstance(size, dict) else None
        if not isinstance(value, int) or value < 0:
            raise Refused(where, "a size is not a whole number")
        count *= value
    return count


class _Walk:
    """Visits every value of a document; what no rule names must be plain."""

    def __init__(self) -> None:
        self.types: set[str] = set()
        self._rules: dict[str, Callable[[Any, str], None]] = {
            "name": check_identifier,
            "as_name": check_identifier,
            "user_input_name": check_identifier,
            "parameter_name": check_qualified,
            "buffer_name": check_qualified,
            "tensor_constant_name": check_qualified,
            "fqn": check_qualified,
            "forward_arg_names": check_identifiers,
            "target": check_operator,
            "as_operator": check_operator,
            "as_string": check_text,
            "as_strings": check_texts,
            "metadata": check_metadata,
            "in_spec": self._tree_spec,
            "out_spec": self._tree_spec,
            "tensor_values": self._named_values,
        }

    def visit(self, value: Any, where: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                self._entry(key, item, f"{where}.{key}")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self.visit(item, f"{where}[{index}]")
        elif isinstance(value, str) and not PLAIN.fullmatch(value):
            raise Refused(where, f"unexpected text {value[:60]!r}")

    def _entry(self, key: str, item: Any, where: str) -> None:
        if key in _REFUSED:
            raise Refused(where, _REFUSED[key])
        if key == "as_expr":
            raise Refused(where, "a size is an expression", dynamic=True)
        if key in _DYNAMIC and item:
            raise Refused(where, "sizes are symbolic", dynamic=True)
        if key in _MUST_BE_EMPTY:
            if item:
                raise Refused(where, _MUST_BE_EMPTY[key])
        elif key in self._rules:
            self._rules[key](item, where)
        elif PLAIN.fullmatch(key):
            self.visit(item, where)
        else:
            raise Refused(where[:80], "an unexpected key")

    def _named_values(self, item: Any, where: str) -> None:
        if not isinstance(item, dict):
            raise Refused(where, "it is not a mapping")
        for name, value in item.items():
            check_identifier(name, where)
            self.visit(value, f"{where}.{name}")

    def _tree_spec(self, item: Any, where: str) -> None:
        """Check ``[protocol, {type, context, children_spec}]``, which is a string of JSON inside the JSON."""
        if not isinstance(item, str):
            raise Refused(where, "a tree spec is not text")
        try:
            spec = json.loads(item)
        except ValueError as error:
            raise Refused(where, "a tree spec is not JSON") from error
        if not isinstance(spec, list) or len(spec) != 2 or spec[0] != 1:
            raise Refused(where, "a tree spec of an unknown version")
        self._tree(spec[1], where)

    def _tree(self, node: Any, where: str) -> None:
        if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
            raise Refused(where, "a tree spec of an unknown form")
        kind, children = node["type"], node["children_spec"]
        if kind is not None:
            if not isinstance(kind, str) or not QUALIFIED.fullmatch(kind):
                raise Refused(where, f"an unexpected type {str(kind)[:60]!r}")
            if not kind.startswith("builtins."):
                self.types.add(kind)
        check_context(node["context"], where)
        if not isinstance(children, list):
            raise Refused(where, "a tree spec of an unknown form")
        for child in children:
            self._tree(child, where)
