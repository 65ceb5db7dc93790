"""AttnRes with routing: sublayers that compute some tokens and read the depth for those alone.

Per routed sublayer the router scores the newest source (the open block's sum, or the last source), as it is. For the
tokens that it picks every source is gathered, the read and the sublayer run on them, and the result is scattered into
zeros, or into a learned prior of the newest source. That is the sublayer's source for every later read, so a token left
out offers zero (or its prior) there. At capacity 1 it is the AttnRes decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from depthwire.models._layers import MixtureOfExperts, Mlp, Router
from depthwire.models._stream import LayerRecord, LayerState, Stream, count_taken, selected_bits
from depthwire.models._token_attention import TokenAttention
from depthwire.models.attn_res import depth_read
from depthwire.models.priors import PriorFfn
from depthwire.models.routed_decoder import RoutedDecoder
from depthwire.models.routers import CausalPredictor, LinearRouter, imitation_loss, masked_mean, neutral_gate

if TYPE_CHECKING:
    from typing import Literal

    from depthwire.models._token_movement import Selection
    from depthwire.models.routing_config import Kind, RoutedConfig


class SublayerRouting(nn.Module):
    """The parts that routing adds to one sublayer."""

    threshold: Tensor

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__()
        width, routing = config.decoder.width, config.routing
        self.router = LinearRouter(width)
        self.predictor = CausalPredictor(width) if routing.predictor else None
        self.prior = PriorFfn(width, routing.prior_factor, config.decoder.eps) if routing.fallback == "prior" else None
        self.register_buffer("threshold", torch.tensor(-torch.inf))


class RoutedAttnResLayer(nn.Module):
    """One attention and one MLP sublayer with their reads; either may be routed."""

    def __init__(self, config: RoutedConfig, index: int) -> None:
        super().__init__()
        decoder, unit = config.decoder, config.routing.unit
        self.index = index
        self.full = decoder.residual == "full"
        self.boundary = decoder.block_layers is not None and index % decoder.block_layers == 0
        self.self_attention_res_norm = _key_norm(config)
        self.self_attention_res_proj = nn.Linear(decoder.width, 1, bias=False)
        self.mlp_res_norm = _key_norm(config)
        self.mlp_res_proj = nn.Linear(decoder.width, 1, bias=False)
        kind = nn.RMSNorm if decoder.norm == "rmsnorm" else nn.LayerNorm
        self.input_layernorm = kind(decoder.width, eps=decoder.eps)
        self.self_attn = TokenAttention(decoder)
        self.post_attention_layernorm = kind(decoder.width, eps=decoder.eps)
        dense = decoder.moe is None or index < decoder.moe.dense_layers
        self.mlp: nn.Module = (
            Mlp(decoder.width, decoder.mlp_width)
            if dense or decoder.moe is None
            else MixtureOfExperts(decoder.width, decoder.moe)
        )
        routed = index in config.routed_layers
        self.attention_routing = SublayerRouting(config) if routed and unit in ("attention", "both") else None
        self.mlp_routing = SublayerRouting(config) if routed and unit in ("mlp", "both") else None

    def forward(self, bank: list[Tensor], partial: Tensor | None, stream: Stream) -> tuple[list[Tensor], Tensor | None]:
        """Read, attend, read, map.

        Args:
            bank: Finished sources, oldest first.
            partial: Sum of the open block, ``None`` when there is none.
            stream: The pass.

        Returns:
            The bank and the open block after this layer.
        """
        sources = _sources(bank, partial)
        if self.attention_routing is None:
            x = depth_read(sources, self.self_attention_res_proj, self.self_attention_res_norm)
            keys = stream.dense_keys(self.index)
            output = self.self_attn(self.input_layernorm(x), stream.cos, stream.sin, keys)
        else:
            output = self._routed(self.attention_routing, "self_attn", sources, stream)
        if self.boundary:  # after the read, which still sees the finished block, and before attention's own source
            bank, partial = sources, None
        bank, partial = self._write(bank, partial, output)
        sources = _sources(bank, partial)
        if self.mlp_routing is None:
            x = depth_read(sources, self.mlp_res_proj, self.mlp_res_norm)
            output = self.mlp(self.post_attention_layernorm(x))
        else:
            output = self._routed(self.mlp_routing, "mlp", sources, stream)
        return self._write(bank, partial, output)

    def _routed(
        self, routing: SublayerRouting, name: Literal["self_attn", "mlp"], sources: list[Tensor], stream: Stream
    ) -> Tensor:
        """Return the sublayer's source ``[batch, tokens, width]``."""
        newest = sources[-1]
        weight = routing.router(newest)
        predictor = routing.predictor
        score = weight if predictor is None or stream.rule != "budget" else predictor(newest)
        state = None if stream.state is None else stream.state.layers[self.index]
        selection = stream.select(score, routing.threshold, _taken(state, name))
        rows = [selection.gather(source) for source in sources]
        if name == "self_attn":
            x = depth_read(rows, self.self_attention_res_proj, self.self_attention_res_norm)
            cos, sin = selection.table(stream.cos), selection.table(stream.sin)
            keys = stream.routed_keys(selection, newest, self.index)
            output = self.self_attn(self.input_layernorm(x), cos, sin, keys)
        else:
            x = depth_read(rows, self.mlp_res_proj, self.mlp_res_norm)
            output = self.mlp(self.post_attention_layernorm(x))
        if stream.routing.gate == "score":
            output = selection.gather(weight.unsqueeze(-1)).to(output.dtype) * output
        elif stream.training:
            gate = neutral_gate(weight.sigmoid()).unsqueeze(-1)
            output = selection.gather(gate).to(output.dtype) * output
        base = torch.zeros_like(newest) if routing.prior is None else routing.prior(newest)
        source = selection.scatter(base, selection.gather(base), output)
        _count(state, name, selection)
        if stream.records is not None:
            record = LayerRecord(f"layers.{self.index}.{name}", score, selection)
            if stream.training:
                bits = selected_bits(selection, stream.tokens)
                logits = weight if predictor is None else predictor(newest)
                record.router_loss = imitation_loss(logits, bits, stream.valid)
                if routing.prior is not None:
                    # The update is known where it was computed, and the prior learns from those tokens.
                    target = selection.scatter(base, selection.gather(base), output).detach()
                    known = bits if stream.valid is None else bits & stream.valid
                    record.prior_loss = masked_mean((base - target).square().mean(-1), known)
            stream.records.append(record)
        return source

    def _write(self, bank: list[Tensor], partial: Tensor | None, output: Tensor) -> tuple[list[Tensor], Tensor | None]:
        if self.full:
            return [*bank, output], None
        return bank, output if partial is None else partial + output


class RoutedAttnResDecoder(RoutedDecoder):
    """An AttnRes decoder with routed sublayers."""

    kind: ClassVar[Kind] = "attn_res"

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        self.output_attn_res_norm = _key_norm(config)
        self.output_attn_res_proj = nn.Linear(config.decoder.width, 1, bias=False)
        nn.init.zeros_(self.output_attn_res_proj.weight)

    def make_layer(self, index: int) -> nn.Module:
        """Return a layer with its reads."""
        return RoutedAttnResLayer(self.config, index)

    def reset_parameters(self) -> None:
        """Draw the weights; the queries start at zero, so that every read starts as the mean of its sources."""
        super().reset_parameters()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.endswith("res_proj"):
                nn.init.zeros_(module.weight)
            elif isinstance(module, Router):
                nn.init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)

    def hidden(self, x: Tensor, stream: Stream) -> Tensor:
        """Run the layers; the embedding is the first source."""
        bank, partial = ([x], None) if self.config.decoder.residual == "full" else ([], x)
        for layer in self.layers:
            bank, partial = layer(bank, partial, stream)
        return depth_read(_sources(bank, partial), self.output_attn_res_proj, self.output_attn_res_norm)

    def has_routed_keys(self, layer: nn.Module) -> bool:
        """Say whether a layer's attention is routed."""
        return isinstance(layer, RoutedAttnResLayer) and layer.attention_routing is not None


def _sources(bank: list[Tensor], partial: Tensor | None) -> list[Tensor]:
    return bank if partial is None else [*bank, partial]


def _key_norm(config: RoutedConfig) -> nn.RMSNorm:
    decoder = config.decoder
    return nn.RMSNorm(decoder.width, eps=decoder.eps, elementwise_affine=decoder.key_norm_gain)


def _taken(state: LayerState | None, name: str) -> Tensor | None:
    if state is None:
        return None
    return state.taken if name == "self_attn" else state.taken_mlp


def _count(state: LayerState | None, name: str, selection: Selection) -> None:
    if state is not None and name == "self_attn":
        state.taken = state.taken + count_taken(selection)
    elif state is not None:
        state.taken_mlp = state.taken_mlp + count_taken(selection)
