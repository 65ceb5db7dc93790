"""Form E: Inkling-2 of transformers. Normalised values, scale d^-½, three queries before a full-attention layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LAYERS = ("hybrid_sliding", "hybrid")
# Nothing before the attention of layer 0, three queries before a full-attention layer, one before each MLP, the last.
READS = 1 + (3 + 1) + 1


class LastHidden(nn.Module):
    """The text model without its cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` token ids to ``[B, T, d]``."""
        return self.model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def build() -> nn.Module:
    """Return a tiny Inkling-2 with random weights and queries."""
    from transformers.models.inkling2 import configuration_inkling2, modeling_inkling2

    config = configuration_inkling2.Inkling2TextConfig(
        vocab_size=67,
        unpadded_vocab_size=67,
        hidden_size=32,
        num_hidden_layers=len(LAYERS),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        sliding_window_size=4,
        d_rel=4,
        rel_extent=8,
        layer_types=list(LAYERS),
        max_position_embeddings=64,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_layers_per_attn_res_block=1,
        eos_token_id=None,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = modeling_inkling2.Inkling2TextModel(config).float().eval()
        for name, parameter in model.named_parameters():
            if name.endswith(".query"):
                parameter.data.normal_()
    return LastHidden(model)


def example() -> Tensor:
    """Return token ids ``[B, T]``."""
    return torch.randint(0, 67, (2, 6), generator=torch.Generator().manual_seed(0))
