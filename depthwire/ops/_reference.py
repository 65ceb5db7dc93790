"""The mathematics of the depth-attention operators, once: plain torch, fp32 inside, differentiable.

For every token independently, with sources v_1 … v_n and one query u::

    r_i = 1 / sqrt(mean_d(v_i²) + eps)             inverse root mean square of a source
    s_i = scale · (u · v_i) · r_i                  logit; the last one plus ``last_bias``
    p   = softmax_i(s)                             over the n sources
    out = Σ_i p_i v_i                              un-normalised; with ``value_norm`` Σ_i p_i r_i v_i

(arXiv 2603.15031, section 3; the key norm's gain is folded into u.) The two-phase form (its algorithm 1) splits the
softmax: phase 1 keeps the mean ō over some sources and the logsumexp of their logits, and phase 2 goes on as if ō
were one source with that logit. It is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: fp32, and fp64 for fp64 sources."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def mix(
    query: Tensor,
    sources: Sequence[Tensor],
    eps: float,
    scale: float,
    *,
    value_norm: bool = False,
    last_bias: float = 0.0,
    mixed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mix the sources.

    Args:
        query: ``[d]``.
        sources: n tensors ``[..., d]``; n >= 1, or n >= 0 with ``mixed``.
        eps: Added to the mean square.
        scale: Factor on the logits.
        value_norm: Mix the normalised sources.
        last_bias: Added to the logit of the last source.
        mixed: Phase 1's mean ``[..., d]`` and logsumexp ``[...]``.

    Returns:
        ``[..., d]`` in the arithmetic's dtype.
    """
    # Source by source: a stack of all n, and each step over it, would be written to memory and read again.
    values, logits = [], []
    if mixed is not None:
        compute = compute_dtype(mixed[0])
        values.append(mixed[0].to(compute))
        logits.append(mixed[1].to(compute))
    for index, source in enumerate(sources):
        value, rstd, logit = _scored(query, source, eps, scale)
        if last_bias and index == len(sources) - 1:
            logit = logit + last_bias
        logits.append(logit)
        values.append(value * rstd.unsqueeze(-1) if value_norm else value)
    weights = torch.softmax(torch.stack(logits), dim=0).unsqueeze(-1)
    out = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        out = torch.addcmul(out, weight, value)
    return out


def read_weights(query: Tensor, sources: Sequence[Tensor], eps: float, scale: float, last_bias: float = 0.0) -> Tensor:
    """Return the softmax weights ``[n, ...]`` of a read: what each source contributes."""
    logits = [_scored(query, source, eps, scale)[2] for source in sources]
    logits[-1] = logits[-1] + last_bias
    return torch.softmax(torch.stack(logits), dim=0)


def _scored(query: Tensor, source: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return a source in the arithmetic's dtype, its inverse root mean square and its logit."""
    value = source.to(compute_dtype(source))
    rstd = torch.rsqrt(value.square().mean(-1) + eps)
    return value, rstd, (value @ query.to(value.dtype)) * rstd * scale


def phase_1(queries: Tensor, sources: Sequence[Tensor], eps: float, scale: float) -> tuple[Tensor, Tensor]:
    """Return, for each of S queries ``[S, d]``, the mean ``[S, ..., d]`` and the logsumexp ``[S, ...]``."""
    value, rstd = _normalised(sources, eps)
    logit = torch.einsum("n...d,sd->sn...", value, queries.to(value.dtype)) * rstd * scale
    mean = torch.einsum("sn...,n...d->s...d", torch.softmax(logit, dim=1), value)
    return mean, torch.logsumexp(logit, dim=1)


def rms_norm(tensor: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm over the last axis, without rounding in between."""
    return tensor * torch.rsqrt(tensor.square().mean(-1, keepdim=True) + eps) * weight.to(tensor.dtype)


def _normalised(sources: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(sources[0])
    value = torch.stack([source.to(compute) for source in sources])
    return value, torch.rsqrt(value.square().mean(-1) + eps)
