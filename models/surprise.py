"""Bayesian surprise of a residual update, its two criteria and its gate (arXiv 2511.21408, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from depthwire.models.routers import wide

if TYPE_CHECKING:
    from depthwire.models.routing_config import RoutingConfig

BETA_START, BETA_END, BETA_WARMUP = 0.1, 100.0, 100
"""The schedule of the steepness: constant for the warm-up, then a straight line."""
SMALLEST = 1e-4
"""Least value of o_ce and m_cu."""


@dataclass(frozen=True)
class Surprise:
    """Surprise of every token, each field ``[batch, tokens]`` in at least fp32.

    Attributes:
        rank: What tokens are ranked by.
        gate: g in [0, 1].
        expected: S_CE, how far the update was foreseen.
        unexpected: S_CU, how far it is out of the ordinary.
    """

    rank: Tensor
    gate: Tensor
    expected: Tensor
    unexpected: Tensor


class SurpriseGate(nn.Module):
    """Scores updates: ``CE = D_st - (D_ch - log(o_ce + 1e-10))`` and ``CU = D_st - m_cu · MA(D_st)``.

    ``D_st`` is the mean square of the update, ``D_ch`` that of its difference from the prediction, ``MA`` the mean over
    the last ``window`` tokens, in which the tokens before the first count as the first.
    """

    beta_ce: Tensor
    beta_cu: Tensor

    def __init__(self, routing: RoutingConfig) -> None:
        super().__init__()
        self.window, self.average, self.ranked, self.beta = (
            routing.window,
            routing.average,
            routing.rank,
            routing.beta,
        )
        self.o_ce, self.m_cu = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))
        if self.beta == "learned":
            self.raw_beta_ce, self.raw_beta_cu = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))
        else:
            self.register_buffer("beta_ce", torch.empty(()))
            self.register_buffer("beta_cu", torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the published starting values."""
        nn.init.constant_(self.o_ce, 1.025)
        nn.init.constant_(self.m_cu, 1.1)
        if self.beta == "learned":
            nn.init.constant_(self.raw_beta_ce, -0.3)
            nn.init.constant_(self.raw_beta_cu, -0.6)
        else:
            self.set_step(0, BETA_WARMUP + 1)

    def set_step(self, step: int, steps: int) -> None:
        """Prepare a training step: move a scheduled steepness, and keep o_ce and m_cu from falling to zero or below.

        o_ce stands under a logarithm, and training pulls it down. The schedule's buffers are saved, so that inference
        has the value that training ended with.
        """
        with torch.no_grad():
            self.o_ce.clamp_(min=SMALLEST)
            self.m_cu.clamp_(min=SMALLEST)
        if self.beta == "schedule":
            done = min(1.0, max(0, step - BETA_WARMUP) / max(1, steps - BETA_WARMUP))
            for beta in (self.beta_ce, self.beta_cu):
                nn.init.constant_(beta, BETA_START + (BETA_END - BETA_START) * done)

    def steepness(self) -> tuple[Tensor, Tensor]:
        """Return beta_ce and beta_cu, each ``[]``."""
        if self.beta == "learned":
            return F.softplus(wide(self.raw_beta_ce)), F.softplus(wide(self.raw_beta_cu))
        return wide(self.beta_ce), wide(self.beta_cu)

    def criteria(self) -> Tensor:
        """Return ``[4]``: log(o_ce + 1e-10), m_cu, beta_ce, beta_cu; the form of ``depthwire::surprise_score``."""
        return torch.stack((torch.log(wide(self.o_ce) + 1e-10), wide(self.m_cu), *self.steepness())).detach()

    def forward(
        self, update: Tensor, predicted: Tensor, valid: Tensor | None = None, recent: RecentSurprise | None = None
    ) -> Surprise:
        """Score updates.

        Args:
            update: ``[batch, tokens, width]``.
            predicted: The same shape.
            valid: ``[batch, tokens]`` bool, one run of valid tokens per row; ``None`` for all.
            recent: The surprise of earlier chunks, which this call brings up to date.
        """
        update, predicted = wide(update), wide(predicted)
        static = update.square().mean(-1)
        change = (update - predicted).square().mean(-1)
        past = static.detach()
        if recent is not None:
            average = self.mean_of_last(recent.extended(past, valid), replicate=False)
        else:
            average = self.mean_of_last(past if valid is None else before_first(past, valid), replicate=True)
        beta_ce, beta_cu = self.steepness()
        a = beta_ce * (static - (change - torch.log(wide(self.o_ce) + 1e-10)))
        b = beta_cu * (static - wide(self.m_cu) * average)
        expected, unexpected = a.sigmoid(), b.sigmoid()
        gate = expected + unexpected - expected * unexpected
        rank = gate if self.ranked == "gate" else F.softplus(a) + F.softplus(b)
        return Surprise(rank, gate, expected, unexpected)

    def mean_of_last(self, x: Tensor, *, replicate: bool) -> Tensor:
        """Return the mean over the last ``window`` tokens.

        Args:
            x: ``[batch, n]``.
            replicate: Whether the first token stands for those before it; if not, the first ``window - 1`` of ``x`` are
                history and have no mean of their own.
        """
        if replicate:
            x = F.pad(x.unsqueeze(1), (self.window - 1, 0), mode="replicate").squeeze(1)
        if self.average == "avg_pool1d":
            return F.avg_pool1d(x.unsqueeze(1), self.window, stride=1).squeeze(1)
        if self.average == "conv1d":
            kernel = torch.full((1, 1, self.window), 1 / self.window, dtype=x.dtype, device=x.device)
            return F.conv1d(x.unsqueeze(1), kernel).squeeze(1)
        total = F.pad(x, (1, 0)).cumsum(1)
        return (total[:, self.window :] - total[:, : -self.window]) / self.window


def before_first(x: Tensor, valid: Tensor) -> Tensor:
    """Let padding on the left count as the first valid token: ``[batch, tokens]`` to the same."""
    first = valid.to(torch.int64).argmax(1, keepdim=True)
    places = torch.arange(x.shape[1], device=x.device)
    return torch.where(places < first, x.gather(1, first), x)


class RecentSurprise:
    """D_st of the last ``window`` tokens, for chunks and decode steps.

    Attributes:
        values: ``[batch, window]``, newest last.
        empty: ``[batch]`` bool, the sequences that have had no valid token.
    """

    def __init__(self, batch: int, window: int) -> None:
        self.values = torch.zeros(batch, window)
        self.empty = torch.ones(batch, dtype=torch.bool)

    def extended(self, static: Tensor, valid: Tensor | None) -> Tensor:
        """Append a chunk.

        Args:
            static: D_st ``[batch, n]``.
            valid: ``[batch, n]`` bool.

        Returns:
            ``[batch, window - 1 + n]``: the history that the chunk's first mean needs, and the chunk.
        """
        tokens, window = static.shape[1], self.values.shape[1]
        if valid is None:
            valid = torch.ones_like(static, dtype=torch.bool)
        static = before_first(static, valid)
        history = torch.where(self.empty.unsqueeze(1), static[:, :1], self.values.to(static.dtype))
        joined = torch.cat((history, static), dim=1)
        end = torch.where(valid, torch.arange(1, tokens + 1), 0).amax(1)
        self.values = joined.gather(1, end.unsqueeze(1) + torch.arange(window))
        self.empty = self.empty & (end == 0)
        return joined[:, 1:]
