"""Parts of the reference decoder: attention with rotary positions, MLP, mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

if TYPE_CHECKING:
    from depthwire.models.attn_res_config import AttnResConfig, MoeConfig


def rotary_tables(length: int, config: AttnResConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary positions, each ``[length, head_dim]``.

    Angles are fp32 and only the tables are rounded to the dtype of ``like``: position times frequency needs more
    digits than bf16 has. The two halves of a head turn together (the layout of Llama).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=like.device) / config.head_dim
    positions = torch.arange(length, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, config.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x [..., length, head_dim]`` by the angles of ``rotary_tables``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Give every query head its key head: ``[batch, heads, length, dim]`` to ``[batch, heads * groups, …]``."""
    batch, heads, length, dim = x.shape
    return x.unsqueeze(2).expand(batch, heads, groups, length, dim).reshape(batch, heads * groups, length, dim)


class Attention(nn.Module):
    """Causal attention with grouped key and value heads."""

    def __init__(self, config: AttnResConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend.

        Args:
            x: ``[batch, length, width]``.
            cos: ``[length, head_dim]``.
            sin: ``[length, head_dim]``.
        """
        batch, length, _ = x.shape
        query = self._split(self.q_proj(x), self.heads)
        key = self._split(self.k_proj(x), self.kv_heads)
        value = self._split(self.v_proj(x), self.kv_heads)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        groups = self.heads // self.kv_heads
        if groups > 1:
            key, value = repeat_heads(key, groups), repeat_heads(value, groups)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast("Tensor", self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1)))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.reshape(*x.shape[:2], heads, self.head_dim).transpose(1, 2)


class Mlp(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to ``[..., width]``."""
        return cast("Tensor", self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Router(nn.Module):
    """Weights of the experts: ``[..., experts]``, zero but for the chosen ``top_k``, whose weights sum to ``scale``."""

    def __init__(self, width: int, moe: MoeConfig) -> None:
        super().__init__()
        self.top_k, self.scale, self.kind = moe.top_k, moe.scale, moe.router
        self.weight = nn.Parameter(torch.empty(moe.experts, width))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(moe.experts)) if moe.selection_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Score the experts in fp32: which of two close scores is greater must not hang on a rounding to 8 bits."""
        compute = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(compute), self.weight.to(compute))
        scores = logits.softmax(-1) if self.kind == "softmax" else logits.sigmoid()
        ranked = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        chosen = ranked.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        weights = self.scale * (weights / weights.sum(-1, keepdim=True))
        return torch.zeros_like(scores).scatter(-1, chosen, weights).to(x.dtype)


class MixtureOfExperts(nn.Module):
    """Top-k experts, every one of them computed for every token and weighted.

    No shape depends on how the tokens split over the experts, so the graph is static and right for any split, that of
    an expert with no token among them. The price is ``experts / top_k`` times the arithmetic of a sorted dispatch.
    """

    def __init__(self, width: int, moe: MoeConfig) -> None:
        super().__init__()
        self.gate = Router(width, moe)
        self.experts = nn.ModuleList(Mlp(width, moe.width) for _ in range(moe.experts))
        self.shared_experts = Mlp(width, moe.shared_width) if moe.shared_width else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to ``[..., width]``."""
        weights = self.gate(x)
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mixed = mixed + weights[..., index : index + 1] * expert(x)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x)
