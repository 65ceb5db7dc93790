"""What a model returns, as a flat list of named tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from depthwire.errors import CaptureError


def named_tensors(value: Any) -> list[tuple[str, Tensor]]:
    """List the tensors in a model's return value, depth first, each with a name of its own.

    Args:
        value: A tensor, or tuples, lists, mappings and named tuples of them at any depth; ``None`` is dropped.

    Returns:
        Names are keys, field names and positions joined by ``_``; those in a bare tuple are ``output_<i>``.

    Raises:
        CaptureError: ``capture.non-tensor``.
    """
    pairs = _flatten(value, "")
    names = _unique([name for name, _ in pairs])
    return [(name, tensor) for name, (_, tensor) in zip(names, pairs, strict=True)]


def distinct(outputs: list[Tensor], inputs: list[Any]) -> Tensor | tuple[Tensor, ...]:
    """Copy an output that is an input or an earlier output: a graph gives each of its outputs a value of its own.

    Returns:
        The tensor alone where there is one, else a tuple.

    Raises:
        CaptureError: ``capture.non-tensor`` where there is none.
    """
    if not outputs:
        raise CaptureError(
            "capture.non-tensor",
            "the model returns no tensor",
            at="the return value of forward",
            want="at least one tensor",
            got="none",
            todo="Wrap the model in a module whose forward returns the tensors that you need.",
        )
    taken = {id(value) for value in inputs}
    results = []
    for output in outputs:
        results.append(output.clone() if id(output) in taken else output)
        taken.add(id(output))
    return results[0] if len(results) == 1 else tuple(results)


def _flatten(value: Any, name: str) -> list[tuple[str, Tensor]]:
    """List the tensors in an output with their names; ``None`` is dropped."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [(re.sub(r"\W", "_", name) or "output_0", value)]
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = [(str(index) if name else f"output_{index}", item) for index, item in enumerate(value)]
    else:
        raise CaptureError(
            "capture.non-tensor",
            "an output of the model is not a tensor",
            at=name or "the return value of forward",
            want="tensors, or tuples, lists and dictionaries of tensors (None is dropped)",
            got=type(value).__name__,
            todo="Wrap the model in a module whose forward returns the tensors that you need.",
        )
    return [leaf for key, item in items for leaf in _flatten(item, f"{name}_{key}" if name else key)]


def _unique(names: list[str]) -> list[str]:
    seen: list[str] = []
    for name in names:
        free, count = name, 1
        while free in seen:
            free, count = f"{name}_{count}", count + 1
        seen.append(free)
    return seen
