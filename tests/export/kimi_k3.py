"""Small stacks of transformers' ``kimi_linear``: as it is, and with the depth reads of Kimi K3.

transformers has the layers of Kimi Linear (delta attention, latent attention, sparse experts) and no AttnRes.
``KimiK3`` runs the attention and MLP modules of such a model between reads spelled as in K3's release: rows
``[T, n, d]``, a bank that grows by ``cat``, norm and softmax in fp32, the boundary after the read before attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor, nn

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS, TOP_K, VOCABULARY, WIDTH, LENGTH = 6, 2, 96, 64, 70  # 70 tokens: one chunk of 64, and a bit of the next
LAYERS = ("linear_attention", "full_attention", "full_attention")
BLOCK_LAYERS = 2


def kimi_linear(layers: tuple[str, ...] = LAYERS) -> Any:
    """Return a small ``KimiLinearForCausalLM`` with random weights; its first MLP is dense, the others sparse."""
    config = transformers.KimiLinearConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_experts_per_tok=TOP_K,
        num_local_experts=EXPERTS,
        linear_head_dim=16,
        linear_num_heads=4,
        layer_types=list(layers),
        mlp_layer_types=["dense"] + ["sparse"] * (len(layers) - 1),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=1024,
        initializer_range=0.1,  # so that logits and gates leave the neighbourhood of zero
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.KimiLinearForCausalLM(config).eval()


def save(directory: Path) -> Path:
    """Write the model as a checkpoint."""
    transformers.utils.logging.disable_progress_bar()
    kimi_linear().save_pretrained(directory)
    transformers.utils.logging.enable_progress_bar()
    return directory


def tokens(seed: int, *, batch: int = 1, length: int = LENGTH) -> Tensor:
    """Return token ids ``[batch, length]``."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


class DepthRead(nn.Module):
    """K3's read: ``Σ softmax_i(w · gain · RMSNorm(v_i)) v_i`` over the rows of ``[T, n, d]``."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.Parameter(0.5 + torch.rand(width))
        self.proj = nn.Parameter(0.5 * torch.randn(1, width))
        self.eps = eps

    def forward(self, bank: Tensor, partial: Tensor) -> Tensor:
        values = torch.cat([bank, partial.unsqueeze(1)], dim=1).to(torch.float32)
        keys = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.eps)
        weight = self.norm.to(torch.float32) * self.proj.squeeze(0).to(torch.float32)
        probabilities = (keys * weight).sum(-1).softmax(-1)
        return torch.matmul(probabilities.unsqueeze(1), values).squeeze(1).to(partial.dtype)


class KimiK3(nn.Module):
    """Kimi Linear's sublayers on a residual of depth reads; batch 1."""

    def __init__(self, layers: tuple[str, ...] = LAYERS) -> None:
        super().__init__()
        model = kimi_linear(layers)
        self.embed_tokens, self.layers, self.norm, self.lm_head = (
            model.model.embed_tokens,
            model.model.layers,
            model.model.norm,
            model.lm_head,
        )
        with torch.random.fork_rng():
            torch.manual_seed(1)
            eps = float(model.config.rms_norm_eps)
            self.attention_reads = nn.ModuleList(DepthRead(WIDTH, eps) for _ in layers)
            self.mlp_reads = nn.ModuleList(DepthRead(WIDTH, eps) for _ in layers)
            self.output_read = DepthRead(WIDTH, eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map tokens ``[1, T]`` to logits ``[1, T, V]``."""
        partial = self.embed_tokens(input_ids)[0]
        bank = partial.unsqueeze(1)[:, :0]
        for index, layer in enumerate(self.layers):
            layer_any = cast("Any", layer)
            x = partial if index == 0 else self.attention_reads[index](bank, partial)
            boundary = index % BLOCK_LAYERS == 0
            if boundary:  # behind the read, which still sees the finished block
                bank = partial.unsqueeze(1) if index == 0 else torch.cat([bank, partial.unsqueeze(1)], dim=1)
            attended = layer_any.self_attn(hidden_states=layer_any.input_layernorm(x)[None], attention_mask=None)
            attended = (attended[0] if isinstance(attended, tuple) else attended)[0]
            partial = attended if boundary else partial + attended
            x = self.mlp_reads[index](bank, partial)
            partial = partial + layer_any.mlp(layer_any.post_attention_layernorm(x)[None])[0]
        result: Tensor = self.lm_head(self.norm(self.output_read(bank, partial))[None])
        return result


def reads(layers: int) -> int:
    """Return how many reads have more than one source: two a layer but the first, and the output's."""
    return 2 * layers
