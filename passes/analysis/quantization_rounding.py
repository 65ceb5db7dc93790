"""Rounding a weight to integers: scales by search, integers by GPTQ.

With ``H = E[x xᵀ]`` of a layer's inputs and the error ``D`` of its weight, the error of its output is
``E‖D x‖² = tr(D H Dᵀ)``. Rounding every weight to its nearest neighbour ignores that inputs are correlated; GPTQ
(Frantar et al., arXiv 2210.17323) rounds column by column and spreads each column's error over those still to come::

    U = cholesky(inverse(H + λ·mean(diag H)·I))ᵀ, upper triangular
    for k:   e = (w_k - round(w_k)) / U[k, k];   w_j -= e · U[k, j] for j > k

The scale of a block is searched on the weights as they are when its first column is reached. Scales have eight
significant bits: they are the same numbers in fp32, fp16 and bf16, whatever the rest of the graph is computed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DAMPING = 0.01  # GPTQ's own
_BAND = 128  # columns between updates of the rest of the matrix
_STEPS = 20
_SHRINK = 0.7  # of the scale that clips nothing


@dataclass(frozen=True)
class Grid:
    """Which numbers a weight may become.

    Attributes:
        bits: 8, integers -127 … 127 (TensorRT's own range of weights), or 4, integers -8 … 7.
        block: Consecutive weights along the summed axis that share a scale; 0 for all of them.
    """

    bits: int
    block: int

    @property
    def lowest(self) -> int:
        """The smallest integer."""
        return -8 if self.bits == 4 else -127

    @property
    def highest(self) -> int:
        """The largest integer."""
        return 7 if self.bits == 4 else 127


def short(scale: Tensor) -> Tensor:
    """Round scales to eight significant bits."""
    return scale.to(torch.bfloat16).to(scale.dtype)


def search_scale(weight: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    """Return the scale of every row, ``[N, 1]``, with the smallest error ``Σ_k importance_k (w_k - ŵ_k)²``.

    Candidates reach from the scale that clips nothing down to 0.7 of it. They are positive, as TensorRT wants them.

    Args:
        weight: ``[N, B]``.
        importance: ``[B]``, not negative.
        grid: The integers.
    """
    whole = torch.maximum(weight.amax(1, keepdim=True) / grid.highest, weight.amin(1, keepdim=True) / grid.lowest)
    best = torch.ones_like(whole)  # rows of zeros
    least = torch.full_like(whole, float("inf"))
    for share in torch.linspace(_SHRINK, 1.0, _STEPS).tolist():
        scale = torch.where(whole > 0, short(whole * share), 1.0)
        error = (to_integers(weight, scale, grid) * scale - weight).square().matmul(importance).unsqueeze(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def to_integers(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return the nearest integers of the grid, in the dtype of the weight."""
    return (weight / scale).round_().clamp_(grid.lowest, grid.highest)


def round_weight(weight: Tensor, moment: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round a weight by GPTQ.

    Args:
        weight: ``[N, K]`` float; K is a multiple of the block.
        moment: ``H``, ``[K, K]`` fp32 or fp64, second moment of the inputs.
        grid: The integers.

    Returns:
        Integers ``[N, K]`` int8 and scales ``[N, K / block]`` fp32 (``[N, 1]`` without blocks).
    """
    left = weight.detach().to(torch.float32, copy=True)
    rows, columns = left.shape
    importance = moment.diagonal().to(torch.float32)
    block = grid.block or columns
    spread = _spread(moment)
    integers = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // block)
    band = block * max(1, _BAND // block) if grid.block else _BAND
    if not grid.block:
        scales[:] = search_scale(left, importance, grid)
    for start in range(0, columns, band):
        end = min(start + band, columns)
        part, errors = left[:, start:end].clone(), torch.empty(rows, end - start)
        for column in range(start, end):
            here = column - start
            if grid.block and column % block == 0:
                found = search_scale(part[:, here : here + block], importance[column : column + block], grid)
                scales[:, column // block] = found.squeeze(1)
            scale = scales[:, column // block]
            rounded = to_integers(part[:, here], scale, grid)
            integers[:, column] = rounded.to(torch.int8)
            error = (part[:, here] - rounded * scale) / spread[column, column]
            part[:, here + 1 :].addr_(error, spread[column, column + 1 : end], alpha=-1.0)
            errors[:, here] = error
        left[:, end:].addmm_(errors, spread[start:end, end:], alpha=-1.0)
    return integers, scales


def _spread(moment: Tensor) -> Tensor:
    """Return U. Inputs that were never seen other than 0 take part in nothing."""
    wide = moment.to(torch.float64, copy=True)
    diagonal = wide.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += _DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.to(torch.float32)


def output_error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    """Return ``E‖(W - Ŵ)x‖² / E‖Wx‖²``; 0 where the layer gives nothing but zeros."""
    difference = rounded - weight
    whole = float((weight @ moment).mul_(weight).sum())
    return float((difference @ moment).mul_(difference).sum()) / whole if whole > 0 else 0.0
