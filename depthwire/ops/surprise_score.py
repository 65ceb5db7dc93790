"""``depthwire::surprise_score``: how surprising a layer's update is, as a score to rank tokens by.

    surprise_score(delta [B, T, d], prior [B, T, d], criteria [4], valid [B, T], window) -> rank [B, T]

``delta`` is what a layer added to the residual stream, ``prior`` what a predictor expected it to add, ``criteria`` the
four numbers (offset, m_cu, beta_ce, beta_cu) with offset = log(o_ce + 1e-10). For every token, with means over the
width d::

    D_st = mean(delta²)                    static surprise
    D_ch = mean((delta - prior)²)          change surprise
    CE   = D_st - (D_ch - offset)          expected change
    CU   = D_st - m_cu * MA                unexpected change
    rank = softplus(beta_ce * CE) + softplus(beta_cu * CU)

MA is the mean of D_st over the last ``window`` tokens up to this one; tokens before the first valid one count as the
first valid one (replicate padding). It is a constant to the gradient. (Subjective Depth Transformers, arXiv
2511.21408.)

The published gate is the probabilistic OR g = S_CE + S_CU - S_CE S_CU of two sigmoids; 1 - g is the product of 1 -
sigmoid(z) = exp(-softplus(z)), so g = 1 - exp(-rank). The rank orders tokens as the gate does and does not saturate,
where the gate of many tokens is exactly 1 in fp32.

``valid`` is False for padding, which lies before or behind the valid tokens of a row and is given the rank 0 (gate 0)
whatever stands there, NaN included. The arithmetic and the result are fp32 whatever the dtype of ``delta`` (fp64 for
fp64). Differentiable with respect to ``delta``, ``prior`` and ``criteria``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from depthwire.ops._checks import check_alike, check_vector
from depthwire.ops._reference import compute_dtype
from depthwire.ops._register import register
from depthwire.ops._token_checks import check_exact

if TYPE_CHECKING:
    from collections.abc import Mapping


def surprise_score_reference(
    delta: Tensor, prior: Tensor, criteria: Tensor, valid: Tensor, window: int = 100
) -> Tensor:
    """Rank tokens by the surprise of a layer's update."""
    compute = compute_dtype(delta)
    kept = valid.unsqueeze(-1)
    # Padding may hold anything; zeroed here, it reaches neither the sums nor the gradients.
    actual, expected = (torch.where(kept, tensor.to(compute), 0.0) for tensor in (delta, prior))
    offset, m_cu, beta_ce, beta_cu = criteria.to(compute).unbind()
    static = actual.square().mean(-1)
    change = (actual - expected).square().mean(-1)
    average = _moving_average(static.detach(), valid, window)
    expected_change = static - (change - offset)
    unexpected_change = static - m_cu * average
    rank = _softplus(beta_ce * expected_change) + _softplus(beta_cu * unexpected_change)
    return torch.where(valid, rank, 0.0)


def _softplus(value: Tensor) -> Tensor:
    # torch goes over to the identity at 20, where fp64 still sees a difference of 2e-9.
    return functional.softplus(value, threshold=50)


def _moving_average(static: Tensor, valid: Tensor, window: int) -> Tensor:
    """Return the mean over the last tokens; ``[B, T]``."""
    first = static.gather(1, valid.byte().argmax(1, keepdim=True))
    filled = torch.cat([first.expand(-1, window - 1), torch.where(valid, static, first)], dim=1)
    return functional.avg_pool1d(filled.unsqueeze(1), window, stride=1).squeeze(1)


def _shapes(arguments: Mapping[str, Any]) -> Tensor:
    delta: Tensor = arguments["delta"]
    if delta.dim() != 3 or not delta.dtype.is_floating_point:
        raise ValueError(f"delta must be floating point [B, T, d], not {delta.dtype}{list(delta.shape)}")
    check_alike("prior", arguments["prior"], "delta", delta)
    check_vector("criteria", arguments["criteria"], 4)
    check_exact("valid", arguments["valid"], tuple(delta.shape[:2]), torch.bool)
    if arguments["window"] < 1:
        raise ValueError(f"window must be at least 1 token, not {arguments['window']}")
    return delta.new_empty(delta.shape[:2], dtype=compute_dtype(delta))


surprise_score = register("surprise_score", surprise_score_reference, _shapes)
