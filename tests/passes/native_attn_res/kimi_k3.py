"""Form B: Kimi K3. Flat tokens, a bank ``[T, n, d]`` that grows by ``cat``, score weights folded in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.passes.native_attn_res.paper import RMSNorm

WIDTH, LAYERS, PER_BLOCK = 8, 3, 2
READS = 2 * LAYERS  # layer 0 has nothing to read before its attention; the output reads too


def apply_attn_res(prefix: Tensor, bank: Tensor | None, proj: nn.Linear, norm: RMSNorm) -> Tensor:
    """Attend over the bank and the running sum ``[T, d]``."""
    if bank is None:
        return prefix
    v = torch.cat((bank, prefix.unsqueeze(1)), dim=1)
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    k = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    weight = norm.weight.to(wide.dtype) * proj.weight.squeeze(0).to(wide.dtype)
    probabilities = (k * weight).sum(-1).softmax(-1).unsqueeze(1)
    return torch.matmul(probabilities, wide).squeeze(1).to(v.dtype)


class Layer(nn.Module):
    """Two sublayers on ``[T, d]``."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.starts = index % PER_BLOCK == 0
        self.self_attention_res_proj, self.self_attention_res_norm = nn.Linear(WIDTH, 1, bias=False), RMSNorm()
        self.mlp_res_proj, self.mlp_res_norm = nn.Linear(WIDTH, 1, bias=False), RMSNorm()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()
        self.attention, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, prefix: Tensor, bank: Tensor | None, batch: int) -> tuple[Tensor, Tensor | None]:
        h = apply_attn_res(prefix, bank, self.self_attention_res_proj, self.self_attention_res_norm)
        if self.starts:
            row = prefix.unsqueeze(1)
            bank = row if bank is None else torch.cat((bank, row), dim=1)
        a = self.attention(self.input_layernorm(h)).view(batch, -1, WIDTH).cumsum(1).view(-1, WIDTH)
        prefix = a if self.starts else prefix + a
        h = apply_attn_res(prefix, bank, self.mlp_res_proj, self.mlp_res_norm)
        return prefix + torch.tanh(self.mlp(self.post_attention_layernorm(h))), bank


class KimiK3(nn.Module):
    """``[B, T, d]`` to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index) for index in range(LAYERS))
        self.output_attn_res_proj, self.output_attn_res_norm = nn.Linear(WIDTH, 1, bias=False), RMSNorm()
        self.norm = RMSNorm()

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        prefix, bank = x.reshape(-1, WIDTH), None
        for layer in self.layers:
            prefix, bank = layer(prefix, bank, batch)
        h = apply_attn_res(prefix, bank, self.output_attn_res_proj, self.output_attn_res_norm)
        return self.norm(h.view(batch, -1, WIDTH))  # type: ignore[no-any-return]


def build(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the model with random queries."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KimiK3()
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.data.normal_()
    return model.to(dtype).eval()
