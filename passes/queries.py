"""Trained AttnRes queries in a safetensors file: ``attn_res.query.{k}`` of shape ``[d]`` for read k.

Read k belongs to sublayer k (0-based); the last one is the final reader's. Read 0 has the embedding as its only
source and therefore no query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from depthwire.errors import PassError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

QUERY_PREFIX = "attn_res.query."


def load_queries(path: Path, indices: Sequence[int], width: int) -> dict[int, torch.Tensor]:
    """Read and check a queries file.

    Args:
        path: The file.
        indices: The reads that need a query.
        width: d.

    Returns:
        Read index -> query ``[d]``, fp32 (fp64 stays fp64).

    Raises:
        UsageError: The file is absent or not in safetensors format.
        PassError: A key is missing or extra, a shape is wrong, or a value is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            "queries.unreadable",
            "The queries file cannot be read",
            at=str(path),
            want="a safetensors file",
            got=str(error).splitlines()[0],
            todo="Give a file with one tensor attn_res.query.K of shape [d] for every read.",
        ) from error
    wanted = {f"{QUERY_PREFIX}{index}": index for index in indices}
    _check_keys(path, set(tensors), set(wanted))
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != (width,) or not tensor.dtype.is_floating_point:
            raise PassError(
                "queries.shape",
                "A query has the wrong shape",
                at=f"{path}: {key}",
                want=f"floating point [{width}]",
                got=f"{tensor.dtype} {list(tensor.shape)}",
                todo="Train the queries on this model's width.",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise PassError(
                "queries.not-finite",
                "A query holds NaN or infinity",
                at=f"{path}: {key}",
                want="finite values",
                got=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are not finite",
                todo="Look for the divergence in training; do not deploy these queries.",
            )
    return {wanted[key]: tensor if tensor.dtype == torch.float64 else tensor.float() for key, tensor in tensors.items()}


def _check_keys(path: Path, found: set[str], wanted: set[str]) -> None:
    missing, extra = sorted(wanted - found, key=_number), sorted(found - wanted, key=_number)
    if missing:
        raise PassError(
            "queries.missing-key",
            "A query is missing",
            at=str(path),
            want=f"{len(wanted)} queries, {min(wanted, key=_number)} … {max(wanted, key=_number)}",
            got=f"no {', '.join(missing[:4])}" + (f" and {len(missing) - 4} more" if len(missing) > 4 else ""),
            todo="Save every query of the lifted program, with the same --attn-res.",
        )
    if extra:
        raise PassError(
            "queries.extra-key",
            "The file holds tensors that no read wants",
            at=str(path),
            want=f"{len(wanted)} queries, {min(wanted, key=_number)} … {max(wanted, key=_number)}",
            got=", ".join(extra[:4]) + (f" and {len(extra) - 4} more" if len(extra) > 4 else ""),
            todo="Use the --attn-res that the queries were trained with.",
        )


def _number(key: str) -> tuple[int, str]:
    tail = key.rsplit(".", 1)[-1]
    return (int(tail) if tail.isdecimal() else -1, key)
