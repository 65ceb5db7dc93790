"""What every depth-attention operator asks of its operands; the same in the real and in the fake kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def check_sources(sources: Sequence[Tensor], like: Tensor | None = None) -> None:
    """Raise ValueError unless all sources are floating point and of one shape and dtype, ``like``'s if given."""
    if not sources and like is None:
        raise ValueError("at least one source is needed")
    first = sources[0] if like is None else like
    other = "source 0" if like is None else "the row of inter_out"
    for index, source in enumerate(sources):
        check_alike(f"source {index}", source, other, first)
    if not first.dtype.is_floating_point:
        raise ValueError(f"sources must be floating point, not {first.dtype}")
    if not first.dim():
        raise ValueError("sources must have a last axis, the width; these are scalars")


def check_alike(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    """Raise ValueError unless two tensors agree in shape and dtype."""
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(
            f"{name} is {tensor.dtype}{list(tensor.shape)}, {other} is {like.dtype}{list(like.shape)}; all must agree"
        )


def check_vector(name: str, vector: Tensor, width: int) -> None:
    """Raise ValueError unless a tensor is a floating-point ``[width]``."""
    if tuple(vector.shape) != (width,):
        raise ValueError(f"{name} must be {[width]}, not {list(vector.shape)}")
    if not vector.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, not {vector.dtype}")


def check_matrix(name: str, matrix: Tensor, width: int) -> None:
    """Raise ValueError unless a tensor is a floating-point ``[S, width]`` with S >= 1."""
    if matrix.dim() != 2 or not matrix.shape[0] or matrix.shape[1] != width:
        raise ValueError(f"{name} must be [S, {width}] with S >= 1, not {list(matrix.shape)}")
    if not matrix.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, not {matrix.dtype}")
