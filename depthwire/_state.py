"""New weights for an exported program, checked against the old ones."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthwire.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.export import ExportedProgram

_SHOWN = 6


def replace_state(exported: ExportedProgram, state_dict: Mapping[str, Tensor]) -> ExportedProgram:
    """Return a program with the same graph and new weights.

    Weights that share their memory in the program (tied embeddings) form a group. A group stays tied when its new
    tensors share memory or are equal, and when only one of its names is given, as ``safetensors`` saves tied weights.
    A group whose new tensors differ is no longer tied.

    Args:
        exported: Left unchanged; the new program has a graph of its own.
        state_dict: Tensors by the names of ``exported.state_dict``; non-persistent buffers may be there too.

    Returns:
        A program whose parameters are parameters, with the old ``requires_grad``, around the tensors given (no copy).

    Raises:
        CaptureError: ``capture.state-mismatch``, with every name that is missing or unknown and every difference in
            shape or dtype.
    """
    given = {name: tensor.detach() for name, tensor in state_dict.items() if isinstance(tensor, Tensor)}
    old = dict(exported.state_dict)
    computed = {name: value for name, value in exported.constants.items() if isinstance(value, Tensor)}
    groups = _tied_groups(old)
    for group in groups:
        partner = next((name for name in group if name in given), None)
        if partner is not None:
            given.update({name: given[partner] for name in group if name not in given})
    _check(given, old, computed, [name for name in state_dict if name not in given])

    new: dict[str, Any] = {}
    for group in groups:
        first = group[0]
        for name in group:
            shared = name != first and _same(given[name], given[first])
            new[name] = new[first] if shared else _like(old[name], given[name])
    constants = {name: given.get(name, value) for name, value in exported.constants.items()}
    with warnings.catch_warnings():
        # torch 2.13 deep-copies its own deprecated pytree leaves here.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        replaced: ExportedProgram = exported._update(  # noqa: SLF001 (torch has no public way to swap the weights)
            copy.deepcopy(exported.graph_module),  # a graph belongs to one module
            copy.deepcopy(exported.graph_signature),
            state_dict={name: new[name] for name in old},
            constants=constants,
        )
    return replaced


def _tied_groups(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Group the names whose tensors are one view of one storage."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        key = (memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        groups.setdefault(key if memory else (name,), []).append(name)
    return list(groups.values())


def _same(left: Tensor, right: Tensor) -> bool:
    one_memory = left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    if one_memory and left.storage_offset() == right.storage_offset() and left.stride() == right.stride():
        return True
    return torch.equal(left, right)


def _like(old: Tensor, new: Tensor) -> Tensor:
    if isinstance(old, torch.nn.Parameter):
        return torch.nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def _check(
    given: Mapping[str, Tensor], old: Mapping[str, Tensor], computed: Mapping[str, Tensor], odd: list[str]
) -> None:
    known = {**computed, **old}
    missing = [name for name in old if name not in given]
    extra = [name for name in given if name not in known]
    differing = []
    for name in given:
        if name in known:
            want, got = known[name], given[name]
            if want.shape != got.shape or want.dtype != got.dtype:
                differing.append(f"{name} is {got.dtype}{list(got.shape)}, not {want.dtype}{list(want.shape)}")
    problems = [
        ("missing", missing),
        ("unknown", extra),
        ("no tensor", odd),
        ("different", differing),
    ]
    found = "; ".join(f"{label}: {_some(names)}" for label, names in problems if names)
    if found:
        raise CaptureError(
            "capture.state-mismatch",
            "the weights do not fit the program",
            at="state_dict",
            want=f"the {len(old)} names of program.exported.state_dict, with their shapes and dtypes",
            got=found,
            todo="Pass the state_dict() of the module that program.module() returned.",
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
