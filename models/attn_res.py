"""The reference AttnRes decoder, in plain eager PyTorch.

Attention Residuals (arXiv 2603.15031, section 3) with the conventions of the Kimi K3 release: the token embedding is
a source, every read has a query ``*_res_proj`` (``[1, d]``, zero at first) and a key norm ``*_res_norm``, and a
boundary between blocks lies before attention. It is written the way the paper lists it, a list of tensors that every
read stacks: what a compiler has to recognise, not what runs fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from depthwire.models._layers import Attention, MixtureOfExperts, Mlp, Router, rotary_tables
from depthwire.models.attn_res_config import CONFIG, AttnResConfig, MoeConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AttnResConfig", "AttnResDecoder", "MoeConfig", "block", "depth_read", "full", "plain"]

WEIGHTS = "model.safetensors"


def depth_read(sources: Sequence[Tensor], proj: nn.Linear, norm: nn.RMSNorm) -> Tensor:
    """Mix the sources by softmax attention over depth.

    ``s_i = w · RMSNorm(v_i)``, ``p = softmax_i(s)``, ``out = Σ p_i v_i``; norm, logits, softmax and sum in fp32 (fp64
    for fp64 sources), as in the K3 release.

    Args:
        sources: n tensors ``[batch, length, d]`` of one dtype; with n = 1 the source is the result.
        proj: The query as a linear layer ``d -> 1``.
        norm: The key norm.

    Returns:
        ``[batch, length, d]`` in the dtype of the sources.
    """
    if len(sources) == 1:
        return sources[0]
    compute = torch.promote_types(sources[0].dtype, torch.float32)
    values = torch.stack(list(sources)).to(compute)
    gain = None if norm.weight is None else norm.weight.to(compute)
    keys = F.rms_norm(values, norm.normalized_shape, gain, norm.eps)
    logits = torch.einsum("d, n b t d -> n b t", proj.weight.to(compute).squeeze(0), keys)
    mixed = torch.einsum("n b t, n b t d -> b t d", logits.softmax(0), values)
    return mixed.to(sources[0].dtype)


class DecoderLayer(nn.Module):
    """One attention and one MLP sublayer, each with its pre-norm and, unless the residual is plain, its read."""

    def __init__(self, config: AttnResConfig, index: int) -> None:
        super().__init__()
        self.full = config.residual == "full"
        self.boundary = config.block_layers is not None and index % config.block_layers == 0
        if config.residual != "plain":
            # The first layer's attention has one source and so no use for its query; checkpoints hold it all the same.
            self.self_attention_res_norm = _key_norm(config)
            self.self_attention_res_proj = nn.Linear(config.width, 1, bias=False)
            self.mlp_res_norm = _key_norm(config)
            self.mlp_res_proj = nn.Linear(config.width, 1, bias=False)
        self.input_layernorm = _norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = _norm(config)
        self.mlp: nn.Module
        if config.moe is not None and index >= config.moe.dense_layers:
            self.mlp = MixtureOfExperts(config.width, config.moe)
        else:
            self.mlp = Mlp(config.width, config.mlp_width)

    def forward(
        self, bank: list[Tensor], partial: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[list[Tensor], Tensor | None]:
        """Read, attend, read, map.

        Args:
            bank: Finished sources, oldest first.
            partial: Sum of the open block, ``None`` when there is none (Full AttnRes never has one).
            cos: See ``rotary_tables``.
            sin: See ``rotary_tables``.

        Returns:
            The bank and the open block after this layer.
        """
        x = depth_read(_sources(bank, partial), self.self_attention_res_proj, self.self_attention_res_norm)
        if self.boundary:  # after the read, which still sees the finished block, and before attention
            bank, partial = _sources(bank, partial), None
        bank, partial = self._write(bank, partial, self.self_attn(self.input_layernorm(x), cos, sin))
        x = depth_read(_sources(bank, partial), self.mlp_res_proj, self.mlp_res_norm)
        return self._write(bank, partial, self.mlp(self.post_attention_layernorm(x)))

    def plain(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Run the layer on an ordinary residual stream ``[batch, length, width]``."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return cast("Tensor", x + self.mlp(self.post_attention_layernorm(x)))

    def _write(self, bank: list[Tensor], partial: Tensor | None, output: Tensor) -> tuple[list[Tensor], Tensor | None]:
        if self.full:
            return [*bank, output], None
        return bank, output if partial is None else partial + output


def _sources(bank: list[Tensor], partial: Tensor | None) -> list[Tensor]:
    return bank if partial is None else [*bank, partial]


def _norm(config: AttnResConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.width, eps=config.eps)


def _key_norm(config: AttnResConfig) -> nn.RMSNorm:
    return nn.RMSNorm(config.width, eps=config.eps, elementwise_affine=config.key_norm_gain)


class AttnResDecoder(nn.Module):
    """A causal language model that reads the depth by attention; ``config.residual`` says how.

    Attributes:
        config: Its shape.
    """

    def __init__(self, config: AttnResConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.layers))
        if config.residual != "plain":
            self.output_attn_res_norm = _key_norm(config)
            self.output_attn_res_proj = nn.Linear(config.width, 1, bias=False)
        self.norm = _norm(config)
        self.lm_head = None if config.tied_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights; the queries start at zero, so that every read starts as the mean of its sources."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.endswith("res_proj"):
                nn.init.zeros_(module.weight)
            elif isinstance(module, (nn.Linear, Router)):
                nn.init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.width**-0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits.

        Args:
            input_ids: ``[batch, length]`` int64, ``length`` at most ``config.max_length``.

        Returns:
            ``[batch, length, vocab_size]`` in the dtype of the weights.
        """
        embedding = self.embed_tokens(input_ids)
        cos, sin = rotary_tables(input_ids.shape[1], self.config, embedding)
        if self.config.residual == "plain":
            x = embedding
            for layer in self.layers:
                x = cast("DecoderLayer", layer).plain(x, cos, sin)
        else:
            # Under Full the embedding is the first finished source; under Block it is the first "block".
            bank, partial = ([embedding], None) if self.config.residual == "full" else ([], embedding)
            for layer in self.layers:
                bank, partial = layer(bank, partial, cos, sin)
            x = depth_read(_sources(bank, partial), self.output_attn_res_proj, self.output_attn_res_norm)
        x = self.norm(x)
        return F.linear(x, self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)

    def save(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, which ``load`` and ``depthwire convert`` read."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.config.save(directory / CONFIG)
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, str(directory / WEIGHTS), metadata={"format": "pt"})

    @classmethod
    def load(cls, directory: str | Path) -> AttnResDecoder:
        """Load what ``save`` wrote, in eval mode and in the stored dtype.

        Raises:
            CaptureError: ``checkpoint.*``: a file is missing or damaged, or names or shapes do not fit.
        """
        from depthwire.models.checkpoints import load_checkpoint

        return load_checkpoint(directory)


def full() -> tuple[AttnResDecoder, dict[str, Tensor]]:
    """Return a small untrained Full AttnRes decoder and its inputs: a factory for ``depthwire convert``."""
    return _example("full")


def block() -> tuple[AttnResDecoder, dict[str, Tensor]]:
    """Return a small untrained Block AttnRes decoder and its inputs: a factory for ``depthwire convert``."""
    return _example("block-layers:2")


def plain() -> tuple[AttnResDecoder, dict[str, Tensor]]:
    """Return the same decoder with an ordinary residual, and its inputs: a factory for ``depthwire convert``."""
    return _example("plain")


def _example(residual: str) -> tuple[AttnResDecoder, dict[str, Tensor]]:
    config = AttnResConfig(
        vocab_size=256, width=128, layers=8, heads=4, kv_heads=2, head_dim=32, mlp_width=256, residual=residual
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AttnResDecoder(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("res_proj.weight"):
                    # Queries at zero read the mean, whatever the sources: drawn ones show the softmax at work.
                    weight.normal_(std=config.width**-0.5)
        return model, {"input_ids": torch.randint(0, config.vocab_size, (1, 128))}
