"""Predictors of a residual update: the prior of a Decision layer and the transition network of a temporal one."""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name


def prior_width(width: int, factor: float) -> int:
    """Return the hidden width of a prior: ``factor * width`` rounded up to an even number, at least 2."""
    hidden = math.ceil(factor * width)
    return max(2, hidden + hidden % 2)


class PriorFfn(nn.Module):
    """A small SwiGLU on a normed input: ``down(silu(gate(u)) * up(u))``, ``u = RMSNorm(x)``, no biases.

    As the prior of a Decision layer it maps a token's state to the update that the layer is expected to make
    (arXiv 2511.21408); as a transition network it maps the previous token's processed state to this token's update.
    """

    def __init__(self, width: int, factor: float, eps: float) -> None:
        super().__init__()
        hidden = prior_width(width, factor)
        self.norm = nn.RMSNorm(width, eps=eps)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices from N(0, 0.02²): at first the prediction is close to no update at all."""
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Predict ``[batch, tokens, width]`` from ``[batch, tokens, width]``."""
        x = self.norm(x)
        return cast("Tensor", self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))
