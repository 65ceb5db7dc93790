"""Forms A and A2: the paper's listing (Fig. 2). Blocks; a list of sources, stacked for every read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, LAYERS, PER_BLOCK = 8, 3, 2
READS = 2 * LAYERS + 1


class RMSNorm(nn.Module):
    """Computes in fp32 (fp64 stays), rounds before the gain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def block_attn_res(blocks: list[Tensor], partial: Tensor | None, proj: nn.Linear, norm: nn.Module) -> Tensor:
    """Softmax attention over completed blocks and the open one."""
    v = torch.stack(blocks if partial is None else [*blocks, partial])
    logits = torch.einsum("d, n b t d -> n b t", proj.weight.squeeze(), norm(v))
    return torch.einsum("n b t, n b t d -> b t d", logits.softmax(0), v)


class Layer(nn.Module):
    """Attention (here any mixing of tokens) and MLP, each behind a read and a norm."""

    def __init__(self, index: int, native: bool) -> None:
        super().__init__()
        norm = (lambda: nn.RMSNorm(WIDTH, eps=1e-6)) if native else RMSNorm
        self.starts = index % PER_BLOCK == 0
        self.attn_res_proj, self.attn_res_norm = nn.Linear(WIDTH, 1, bias=False), norm()
        self.mlp_res_proj, self.mlp_res_norm = nn.Linear(WIDTH, 1, bias=False), norm()
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.attn, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, blocks: list[Tensor], partial: Tensor) -> tuple[list[Tensor], Tensor]:
        h = block_attn_res(blocks, partial, self.attn_res_proj, self.attn_res_norm)
        rest: Tensor | None = partial
        if self.starts:
            blocks, rest = [*blocks, partial], None
        attn = torch.tanh(self.attn(self.attn_norm(h))).cumsum(1)
        rest = attn if rest is None else rest + attn
        h = block_attn_res(blocks, rest, self.mlp_res_proj, self.mlp_res_norm)
        return blocks, rest + torch.tanh(self.mlp(self.mlp_norm(h)))


class Paper(nn.Module):
    """``[B, T, d]`` to the same."""

    def __init__(self, native: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index, native) for index in range(LAYERS))
        self.proj, self.norm = nn.Linear(WIDTH, 1, bias=False), RMSNorm()
        self.final = RMSNorm()

    def forward(self, x: Tensor) -> Tensor:
        blocks: list[Tensor] = []
        for layer in self.layers:
            blocks, x = layer(blocks, x)
        return self.final(block_attn_res(blocks, x, self.proj, self.norm))  # type: ignore[no-any-return]


def build(*, native: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the model; ``native`` norms are ``nn.RMSNorm``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Paper(native)
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.data.normal_()
    return model.to(dtype).eval()


def example(dtype: torch.dtype = torch.float64) -> Tensor:
    """Return hidden states."""
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
