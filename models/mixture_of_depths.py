"""Mixture-of-Depths (arXiv 2404.02258): a linear router picks the tokens that a block computes.

What published conversions get wrong is not repeated here: selection is per sequence, in the order of the sequence; K
tokens are taken, not K - 1; and the router does not scale a pretrained block's update unless ``gate="score"`` asks
for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from depthwire.models._stream import LayerRecord, Stream, count_taken, selected_bits
from depthwire.models.routed_decoder import PlainLayer, RoutedDecoder, RoutedLayer
from depthwire.models.routers import CausalPredictor, LinearRouter, imitation_loss, neutral_gate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from depthwire.models.routing_config import Kind, RoutedConfig


class MixtureOfDepthsLayer(RoutedLayer):
    """A block that computes the tokens of the greatest router weights: ``x + r · (Blk(x) - x)``, or without r.

    Training adds the cross-entropy of the router's own logits against the choice, which centres them on the boundary;
    with a predictor, that of the predictor's, whose input is detached.
    """

    def __init__(self, config: RoutedConfig, index: int) -> None:
        super().__init__(config.decoder, index)
        self.router = LinearRouter(config.decoder.width)
        self.predictor = CausalPredictor(config.decoder.width) if config.routing.predictor else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """Map ``[batch, tokens, width]`` to the same."""
        weight = self.router(x)
        score = weight
        if self.predictor is not None and stream.rule == "budget":
            score = self.predictor(x)
        state = None if stream.state is None else stream.state.layers[self.index]
        selection = stream.select(score, self.threshold, None if state is None else state.taken)
        gate = None
        if stream.routing.gate == "score":
            gate = weight
        elif stream.training:
            gate = neutral_gate(weight.sigmoid())
        out = stream.route(self.compute, x, selection, gate, self.index)
        if state is not None:
            state.taken = state.taken + count_taken(selection)
        if stream.records is not None:
            record = LayerRecord(f"layers.{self.index}", score, selection)
            if stream.training:
                logits = weight if self.predictor is None else self.predictor(x)
                record.router_loss = imitation_loss(logits, selected_bits(selection, stream.tokens), stream.valid)
            stream.records.append(record)
        return out


class MixtureOfDepthsDecoder(RoutedDecoder):
    """A decoder whose routed layers are Mixture-of-Depths blocks."""

    kind: ClassVar[Kind] = "mixture_of_depths"

    def make_layer(self, index: int) -> nn.Module:
        """Return a routed layer where the configuration routes, and a plain one elsewhere."""
        if index in self.config.routed_layers:
            return MixtureOfDepthsLayer(self.config, index)
        return PlainLayer(self.config.decoder, index)
