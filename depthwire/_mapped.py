"""Lets go of weights that are mapped from a file, so that converting a model takes little more memory than one layer.

Weights loaded from safetensors are pages of the file. Once a stage is done with a tensor, its pages can leave the
process; touching the tensor again brings them back from the page cache. ``MADV_PAGEOUT`` never loses data: pages that
are not backed by a file stay where they are. On systems without it nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_MADV_PAGEOUT = 21  # Linux 5.4; Python's mmap module has no name for it


@functools.cache
def _madvise() -> Callable[[ctypes.c_void_p, ctypes.c_size_t, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return ctypes.CDLL(None).madvise


def release(tensor: torch.Tensor) -> None:
    """Tell the kernel that the pages of a tensor's storage are not needed for now.

    Args:
        tensor: A CPU tensor; its values stay what they are.
    """
    call = _madvise()
    if call is None or tensor.device.type != "cpu":
        return
    storage = tensor.untyped_storage()
    start, page = storage.data_ptr(), mmap.PAGESIZE
    first = -(-start // page) * page
    last = (start + storage.nbytes()) // page * page
    if last > first:
        call(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_PAGEOUT)
