"""Small untrained routed decoders with their inputs: factories for ``depthwire convert``, and material for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from depthwire.models.attn_res_config import AttnResConfig
from depthwire.models.routed_checkpoints import build
from depthwire.models.routing_config import RoutedConfig, RoutingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from depthwire.models.routed_decoder import RoutedDecoder
    from depthwire.models.routing_config import Kind


def example(
    kind: Kind,
    *,
    depth: int = 4,
    tokens: int = 128,
    batch: int = 1,
    residual: str = "block-layers:2",
    **routing: Any,
) -> tuple[RoutedDecoder, dict[str, Tensor]]:
    """Return a decoder of width 64 and its inputs; the same arguments give the same weights.

    Args:
        kind: Of ``RoutedConfig``.
        depth: Layers of the decoder.
        tokens: Tokens of the input.
        batch: Sequences of the input.
        residual: Of the AttnRes decoder; the other kinds have a plain one.
        routing: Fields of ``RoutingConfig``. The weights do not depend on how it is spelled.
    """
    attn_res = kind == "attn_res"
    if attn_res:
        routing = {"unit": "both", **routing}
    decoder = AttnResConfig(
        vocab_size=256,
        width=64,
        layers=depth,
        heads=4,
        kv_heads=2,
        head_dim=16,
        mlp_width=128,
        residual=residual if attn_res else "plain",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(RoutedConfig(kind, decoder, RoutingConfig(**routing))).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("res_proj.weight"):
                    # Queries at zero read the mean, whatever the sources: drawn ones show the softmax at work.
                    weight.normal_(std=decoder.width**-0.5)
        input_ids = torch.randint(0, decoder.vocab_size, (batch, tokens))
        if model.rule == "budget":
            model.trace(input_ids, calibrate=True)
        return model, {"input_ids": input_ids}


def mixture_of_depths() -> tuple[RoutedDecoder, dict[str, Tensor]]:
    """Return a Mixture-of-Depths decoder and its inputs."""
    return example("mixture_of_depths")


def subjective_depth() -> tuple[RoutedDecoder, dict[str, Tensor]]:
    """Return a Subjective Depth Transformer and its inputs."""
    return example("subjective_depth")


def subjective_timescale() -> tuple[RoutedDecoder, dict[str, Tensor]]:
    """Return a Subjective Timescale Transformer and its inputs."""
    return example("subjective_timescale")


def attn_res() -> tuple[RoutedDecoder, dict[str, Tensor]]:
    """Return an AttnRes decoder with routed sublayers and its inputs."""
    return example("attn_res")
