"""Form F: SANA-Video-2. Values and keys in buffers written in place, one query shared by all layers of a kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, LAYERS, PER_BLOCK = 8, 3, 2
READS = 2 * LAYERS + 1


class Bank:
    """Preallocated rows ``[N, B, T, d]`` of values and of their normalised keys."""

    def __init__(self, x: Tensor, rows: int) -> None:
        self.values, self.keys, self.count = x.new_empty(rows, *x.shape), x.new_empty(rows, *x.shape), 0

    def append(self, x: Tensor, slot: int | None = None) -> None:
        slot = self.count if slot is None else slot
        self.values[slot].copy_(x)
        self.keys[slot] = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def close(self, x: Tensor) -> None:
        self.append(x)
        self.count += 1

    def read(self, partial: Tensor, query: Tensor) -> Tensor:
        self.append(partial)
        keys, values = self.keys[: self.count + 1], self.values[: self.count + 1]
        weights = torch.einsum("nbtd,d->nbt", keys, query).softmax(0)
        return torch.einsum("nbt,nbtd->btd", weights, values)


class SanaVideo2(nn.Module):
    """``[B, T, d]`` to the same; the block boundary is tested at the end of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_query, self.mlp_query, self.final_query = (nn.Parameter(torch.randn(WIDTH)) for _ in range(3))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2 * LAYERS + 1))
        self.bodies = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2 * LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        bank = Bank(x, LAYERS // PER_BLOCK + 2)
        bank.close(x)
        partial = torch.zeros_like(x) + x * 0.5
        for layer in range(LAYERS):
            h = bank.read(partial, self.attn_query)
            partial = partial + torch.tanh(self.bodies[2 * layer](self.norms[2 * layer](h))).cumsum(1)
            h = bank.read(partial, self.mlp_query)
            partial = partial + torch.tanh(self.bodies[2 * layer + 1](self.norms[2 * layer + 1](h)))
            if (layer + 1) % PER_BLOCK == 0 and layer + 1 < LAYERS:
                bank.close(partial)
                partial = torch.tanh(partial)
        return self.norms[-1](bank.read(partial, self.final_query))  # type: ignore[no-any-return]


def build(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the model with random queries."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SanaVideo2()
    return model.to(dtype).eval()
