"""A pre-norm decoder small enough to export in a second, and the programs that the exporter's tests need."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from depthwire.passes.standard import standard_pipeline
from depthwire.program import Program, Source

WIDTH, HEADS, LENGTH, VOCABULARY = 32, 4, 12, 61


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (WIDTH,), self.weight, 1e-5)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return out


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = _Norm(), _Attention()
        self.mlp_norm = _Norm()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class TinyDecoder(nn.Module):
    """Embedding, layers, final norm, and a head that is tied to the embedding or not."""

    def __init__(self, layers: int = 3, *, tied: bool = False) -> None:
        """Draw random weights."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(_Layer() for _ in range(layers))
        self.norm = _Norm()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map tokens ``[B, T]`` to logits ``[B, T, V]``."""
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.head(self.norm(x))
        return out


def captured(*, layers: int = 3, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Program:
    """Return a captured decoder."""
    torch.manual_seed(seed)
    model = TinyDecoder(layers, tied=tied).to(dtype).eval()
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    with torch.no_grad():
        exported = torch.export.export(model, (ids,))
    return Program(exported, Source("module", "TinyDecoder"), {"input_ids": ids}, ("logits",))


def lifted(program: Program, attn_res: str | None = "block:3", *, seed: int | None = 1) -> Program:
    """Return the program through the standard passes; with a seed its queries are random instead of zero."""
    result = standard_pipeline(attn_res=attn_res).run(program)
    if seed is None:
        return result
    generator = torch.Generator().manual_seed(seed)
    state = dict(result.exported.state_dict)
    for name, tensor in state.items():
        if name.startswith("attn_res.query."):
            state[name] = torch.nn.Parameter(torch.randn(tensor.shape, generator=generator) * 0.5)
    return result.with_state(state)
