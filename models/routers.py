"""Routers: a score per token that costs little, and how a score gates an update."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or in fp64 if it is: which of two close scores is greater must not hang on a rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LinearRouter(nn.Module):
    """The router of Mixture-of-Depths (arXiv 2404.02258): ``r = w · x``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Score ``[batch, tokens, width]``: ``[batch, tokens]`` in at least fp32."""
        return F.linear(wide(x), wide(self.proj.weight)).squeeze(-1)


class CausalPredictor(nn.Module):
    """A small MLP that learns which tokens top-k takes, for inference that cannot look ahead.

    Its input is detached, so that learning to predict does not change what is predicted.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, max(1, width // 4))
        self.out = nn.Linear(max(1, width // 4), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logit of being taken: ``[batch, tokens, width]`` to ``[batch, tokens]`` in at least fp32."""
        hidden = F.gelu(self.hidden(x.detach()))
        return wide(cast("Tensor", self.out(hidden)).squeeze(-1))


class TemporalRouter(nn.Module):
    """The student of a Subjective Timescale layer: ``r = w · [x_t; x_{t-1}]`` of the layer's inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(2 * width, 1, bias=False)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Score tokens.

        Args:
            x: ``[batch, tokens, width]``.
            before: The same shape: each token's predecessor (``previous``).

        Returns:
            ``[batch, tokens]`` in at least fp32.
        """
        both = torch.cat((x, before), dim=-1)
        return F.linear(wide(both), wide(self.proj.weight)).squeeze(-1)


def previous(x: Tensor, valid: Tensor | None = None, last: Tensor | None = None) -> Tensor:
    """Return each token's predecessor: ``x_{t-1}``, zero before the first valid token.

    Args:
        x: ``[batch, tokens, width]``.
        valid: ``[batch, tokens]`` bool; padding is no predecessor.
        last: ``[batch, width]``, the predecessor of token 0, where an earlier chunk has one.
    """
    if valid is not None:
        x = torch.where(valid.unsqueeze(-1), x, torch.zeros_like(x))
    if last is None:
        return F.pad(x[:, :-1], (0, 0, 1, 0))
    return torch.cat((last.unsqueeze(1), x[:, :-1]), dim=1)


def neutral_gate(score: Tensor) -> Tensor:
    """Return a factor that is exactly 1 and has the gradient of ``score``.

    ``1 + (s - stopgrad(s))``: the difference is an exact zero for every finite s, so a router, trained or not, leaves
    the update of a selected token as it is; and d(factor)/ds = 1, so that it learns all the same.

    Args:
        score: ``[batch, slots]``, bounded, such as a sigmoid.
    """
    return 1 + (score - score.detach())


def imitation_loss(logits: Tensor, taken: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean binary cross-entropy of logits against a choice, over valid tokens.

    Args:
        logits: ``[batch, tokens]``.
        taken: The same shape, bool: the choice; no gradient flows into it.
        valid: The same shape, bool.
    """
    loss = F.binary_cross_entropy_with_logits(logits, taken.to(logits.dtype), reduction="none")
    return masked_mean(loss, valid)


def masked_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean of ``[batch, tokens]`` over valid tokens."""
    if valid is None:
        return x.mean()
    return torch.where(valid, x, torch.zeros_like(x)).sum() / valid.sum().clamp_min(1)
