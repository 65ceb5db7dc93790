"""Safetensors files of a checkpoint, single or sharded. Nothing else is opened: a pickle can run code."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthwire.errors import CaptureError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATING = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint.

    Attributes:
        file: The safetensors file that holds it.
        shape: Its shape.
        dtype: As safetensors spells it: ``F32``, ``BF16``.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def list_tensors(directory: Path) -> dict[str, Stored]:
    """Return every tensor of a checkpoint by name, from the headers of its files.

    Raises:
        CaptureError: ``checkpoint.no-weights`` or ``checkpoint.corrupt``.
    """
    tensors: dict[str, Stored] = {}
    for file in _files(directory):
        for name, stored in _header(file).items():
            if name in tensors:
                raise _corrupt(file, "every tensor once", f"{name}, which {tensors[name].file.name} holds too")
            tensors[name] = stored
    if not tensors:
        raise _no_weights(directory, "no tensor at all")
    return tensors


def read_tensor(name: str, stored: Stored) -> Tensor:
    """Return the values of a tensor in its stored dtype."""
    from safetensors import safe_open

    with safe_open(str(stored.file), framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def common_dtype(tensors: dict[str, Stored], *, at: str) -> str:
    """Return the floating dtype of most elements.

    Raises:
        CaptureError: ``checkpoint.quantized``: a tensor is not floating.
    """
    sizes: Counter[str] = Counter()
    for name, stored in tensors.items():
        if stored.dtype not in _FLOATING:
            raise CaptureError(
                "checkpoint.quantized",
                "a weight is not stored in a floating dtype",
                at=f"{at}: {name}",
                want=", ".join(_FLOATING),
                got=stored.dtype,
                todo="Use the unquantised checkpoint.",
            )
        sizes[stored.dtype] += prod(stored.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])


def read_config(directory: Path) -> dict[str, Any] | None:
    """Return ``config.json``, or ``None`` where there is none.

    Raises:
        CaptureError: ``checkpoint.corrupt``.
    """
    path = directory / "config.json"
    return _json(path) if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, "a JSON object", str(error)) from error
    if not isinstance(value, dict):
        raise _corrupt(path, "a JSON object", f"a JSON {type(value).__name__}")
    return value


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise _no_weights(directory, "no such directory")
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.is_file():
        raise _no_weights(directory, ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing")
    weight_map = _json(index).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise _corrupt(index, "a weight_map to files beside it", str(names[:1] or "no weight_map"))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise _no_weights(directory, f"no {', '.join(missing[:4])}")
    return [directory / name for name in names]


def _header(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a safe_open is not iterable)
                part = opened.get_slice(name)
                found[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError) as error:
        raise _corrupt(file, "a whole safetensors file", str(error)) from error
    return found


def _corrupt(path: Path, want: str, got: str) -> CaptureError:
    return CaptureError(
        "checkpoint.corrupt",
        f"{path.name} cannot be read",
        at=str(path),
        want=want,
        got=got,
        todo="Copy the file again from where the checkpoint came from.",
    )


def _no_weights(directory: Path, got: str) -> CaptureError:
    return CaptureError(
        "checkpoint.no-weights",
        "the checkpoint has no safetensors weights",
        at=str(directory),
        want=f"{SINGLE}, or {INDEX} with its shards",
        got=got,
        todo="Name the directory that holds them. Pickles are never opened: save them as safetensors first.",
    )
