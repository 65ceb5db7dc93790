"""Writes a model's weights next to it, tensor by tensor.

``onnx_ir.save`` does this too, but asks every tensor for its bytes: a copy of each. Here a tensor's own memory is
handed to the file, so writing adds at most one tensor (a transposed weight) to the process, and the hash of the file
is computed on the way instead of reading it again.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import onnx_ir as ir

from depthwire._mapped import release
from depthwire.export._quantized_weights import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

ALIGNMENT = 4096  # a page, so that runtimes can map a tensor as it lies
INLINE_BYTES = 256  # shapes, axes and scalars stay in the graph, where viewers and parsers expect them
_CHUNK_ROWS_BYTES = 32 << 20
_HASHED_BYTES = 8 << 20


class _HashingFile:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.offset = 0

    def write(self, data: memoryview | bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.offset += len(data)

    def align(self) -> None:
        self.write(bytes(-self.offset % ALIGNMENT))

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def write_external_data(
    model: ir.Model,
    path: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    others: Sequence[ir.Model] = (),
) -> tuple[str, int]:
    """Write every initializer above ``INLINE_BYTES`` to one file and point the model at it.

    Args:
        model: Changed in place: its initializers become external tensors of ``path.name``.
        path: The weights file; the model must be saved into the same directory.
        progress: Called with (bytes written, bytes in all).
        others: More graphs over the same weights, changed likewise: what several of them hold is written once.

    Returns:
        SHA-256 of the file in hex, and its size in bytes.

    Raises:
        OSError: The disk is full, or the directory cannot be written.
    """
    values = [value for each in (model, *others) for value in _large(each)]
    total = sum(tensor.nbytes for value in _large(model) if (tensor := value.const_value) is not None)
    written: dict[object, tuple[int, int]] = {}
    held: list[ir.TensorProtocol | None] = []
    with path.open("wb") as raw:
        file = _HashingFile(raw)
        for value in values:
            tensor = value.const_value
            assert tensor is not None  # noqa: S101 - filtered above
            key = _identity(tensor) if others else value
            held.append(tensor if others else None)  # an address means something only as long as its tensor lives
            if key not in written:
                file.align()
                offset = file.offset
                _write_tensor(tensor, file)
                written[key] = (offset, file.offset - offset)
                if progress is not None:
                    progress(min(file.offset, total), total)
            value.const_value = ir.ExternalTensor(
                path.name,
                *written[key],
                tensor.dtype,
                shape=tensor.shape,  # type: ignore[arg-type]
                name=str(value.name),
                base_dir=path.parent,
            )
        return file.sha256, file.offset


def _large(model: ir.Model) -> list[ir.Value]:
    return [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES
    ]


def _identity(tensor: ir.TensorProtocol) -> object:
    """Return what two tensors of several graphs share if their bytes are the same.

    Large weights share their memory, and are not read for this. What was made anew for every graph (masks, tables,
    routers) shares its content.
    """
    array = _storage_view(tensor)
    raw = getattr(tensor, "raw", None)
    if raw is not None and hasattr(raw, "untyped_storage") and array.nbytes > _HASHED_BYTES:
        return array.__array_interface__["data"][0], array.shape, array.strides, tensor.dtype
    plain = np.ascontiguousarray(array)
    return hashlib.sha256(plain.reshape(-1).view(np.uint8).data).digest(), array.shape, tensor.dtype


def inline_small(model: ir.Model) -> None:
    """Turn the remaining initializers into plain numpy tensors, so that the file holds their bytes."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not isinstance(tensor, (ir.Tensor, ir.ExternalTensor)):
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)


def _write_tensor(tensor: ir.TensorProtocol, file: _HashingFile) -> None:
    array = _storage_view(tensor)
    if tensor.dtype == ir.DataType.INT4:
        # Two elements a byte: an even number of rows fills whole bytes, whatever the width.
        rows = 2 * max(1, _CHUNK_ROWS_BYTES // max(1, 2 * array[0].nbytes))
        for start in range(0, array.shape[0], rows):
            file.write(packed(np.ascontiguousarray(array[start : start + rows])).data)
        _release(tensor)
        return
    if array.flags.c_contiguous:
        file.write(array.reshape(-1).view(np.uint8).data)
        _release(tensor)
        return
    # A transposed weight: copy a band of rows at a time.
    rows = max(1, _CHUNK_ROWS_BYTES // max(1, array[0].nbytes))
    for start in range(0, array.shape[0], rows):
        band = np.ascontiguousarray(array[start : start + rows])
        file.write(band.reshape(-1).view(np.uint8).data)
    _release(tensor)


def _release(tensor: ir.TensorProtocol) -> None:
    raw = getattr(tensor, "raw", None)
    if raw is not None and hasattr(raw, "untyped_storage"):
        release(raw)


def _storage_view(tensor: ir.TensorProtocol) -> np.ndarray:
    """Return the tensor's memory as an array of a dtype that numpy knows (bf16 as uint16)."""
    raw = getattr(tensor, "raw", None)
    if raw is None or not hasattr(raw, "untyped_storage"):
        return np.ascontiguousarray(tensor.numpy())
    import torch

    plain = raw.detach()
    if plain.dtype in (torch.bfloat16, torch.float16):
        plain = plain.view(torch.int16)
    array: np.ndarray = plain.numpy()
    return array
