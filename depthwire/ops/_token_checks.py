"""What the routing operators ask of their operands; the same in the real and in the fake kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def check_score(score: Tensor) -> tuple[int, int]:
    """Return B and T; raise ValueError unless scores are fp32 or fp64 ``[B, T]``."""
    if score.dim() != 2:
        raise ValueError(f"score must be [B, T], not {list(score.shape)}")
    if score.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"score must be torch.float32 or torch.float64, not {score.dtype}")
    return score.shape[0], score.shape[1]


def check_exact(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless a tensor has this shape and dtype."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}{list(shape)}, not {tensor.dtype}{list(tensor.shape)}")


def check_slots(slots: Tensor, tokens: int) -> int:
    """Return K; raise ValueError unless ``slots`` is int64 ``[K]`` with 1 <= K <= T."""
    if slots.dim() != 1 or slots.dtype != torch.int64:
        raise ValueError(f"slots must be torch.int64[K], not {slots.dtype}{list(slots.shape)}")
    count = slots.shape[0]
    if count < 1:
        raise ValueError("at least one slot is needed")
    if count > tokens:
        raise ValueError(f"{count} slots are more than the {tokens} tokens that could fill them")
    return count


def check_window(window: int, tokens: int, slots: int) -> None:
    """Raise ValueError unless windows of this many tokens divide T and share K evenly; 0 stands for no windows."""
    if window < 0:
        raise ValueError(f"window must be 0 (none) or a number of tokens, not {window}")
    if window and tokens % window:
        raise ValueError(f"windows of {window} tokens do not divide {tokens} tokens")
    if window and slots % (tokens // window):
        raise ValueError(f"{slots} slots cannot be shared evenly by {tokens // window} windows")


def check_index(index: Tensor, batch: int) -> int:
    """Return K; raise ValueError unless an index is int64 ``[B, K]``."""
    if index.dim() != 2 or index.shape[0] != batch or index.dtype != torch.int64:
        raise ValueError(f"index must be torch.int64[{batch}, K], not {index.dtype}{list(index.shape)}")
    return index.shape[1]


def check_tokens(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a tensor is ``[B, T, ...]``."""
    if tensor.dim() < 2:
        raise ValueError(f"{name} must be [B, T, ...], not {list(tensor.shape)}")
