"""Subjective Depth Transformer (arXiv 2511.21408): a Decision layer is surprised, a Dynamic layer follows where it is.

Layers come in pairs. The Decision layer computes every token and compares its update with what a small prior foresaw;
the Dynamic layer computes the tokens of the greatest surprise. A token left out keeps the Decision layer's output; the
prior is never used as an output. The ranking is the gate's, by a sum of softplus that does not saturate: the published
gate reaches 1.0 exactly for a large part of the tokens once it is steep, and top-k of it is then a matter of ties.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from depthwire.models._stream import LayerRecord, Stream, count_taken, selected_bits
from depthwire.models.priors import PriorFfn
from depthwire.models.routed_decoder import DecoderLayer, PlainLayer, RoutedDecoder, RoutedLayer
from depthwire.models.routers import CausalPredictor, imitation_loss, masked_mean, neutral_gate
from depthwire.models.surprise import RecentSurprise, Surprise, SurpriseGate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from depthwire.models._stream import DecodeState
    from depthwire.models.routing_config import Kind, RoutedConfig


class DecisionLayer(DecoderLayer):
    """A dense layer that measures how surprising its update of each token is."""

    def __init__(self, config: RoutedConfig, index: int) -> None:
        super().__init__(config.decoder, index)
        self.prior = PriorFfn(config.decoder.width, config.routing.prior_factor, config.decoder.eps)
        self.surprise = SurpriseGate(config.routing)

    def forward(self, x: Tensor, stream: Stream) -> tuple[Tensor, Surprise, Tensor | None]:
        """Compute every token and score it.

        Returns:
            ``[batch, tokens, width]``, the surprise, and in training the prior's loss.
        """
        after = self.dense(x, stream)
        update, predicted = after - x, self.prior(x)
        recent = None if stream.state is None else stream.state.layers[self.index].surprise
        surprise = self.surprise(update, predicted, stream.valid, recent)
        loss = None
        if stream.training:
            loss = masked_mean((predicted - update.detach()).square().mean(-1), stream.valid)
        return after, surprise, loss


class DynamicLayer(RoutedLayer):
    """A layer that computes the most surprising tokens: ``x + g · (Blk(x) - x)``, or without g.

    Attributes:
        router: The causal router of the paper, where the configuration asks for a predictor: it sees the Decision
            layer's input. Without it the budget rule compares the surprise itself with the threshold, which is causal
            too, since the Decision layer computes every token anyway.
    """

    def __init__(self, config: RoutedConfig, index: int) -> None:
        super().__init__(config.decoder, index)
        self.router = CausalPredictor(config.decoder.width) if config.routing.predictor else None

    def forward(
        self, x: Tensor, before: Tensor, surprise: Surprise, prior_loss: Tensor | None, stream: Stream
    ) -> Tensor:
        """Compute some of the tokens.

        Args:
            x: ``[batch, tokens, width]``, the Decision layer's output.
            before: Its input.
            surprise: Its surprise.
            prior_loss: Its loss, for the record.
            stream: The pass.
        """
        score = surprise.rank
        if self.router is not None and stream.rule == "budget":
            score = self.router(before)
        state = None if stream.state is None else stream.state.layers[self.index]
        selection = stream.select(score, self.threshold, None if state is None else state.taken)
        gate = None
        if stream.routing.gate == "score":
            gate = surprise.gate
        elif stream.training:
            gate = neutral_gate(surprise.gate)
        out = stream.route(self.compute, x, selection, gate, self.index)
        if state is not None:
            state.taken = state.taken + count_taken(selection)
        if stream.records is not None:
            record = LayerRecord(f"layers.{self.index}", score, selection, surprise, prior_loss)
            if stream.training:
                record.gate_loss = masked_mean(surprise.gate, stream.valid)
                if self.router is not None:
                    bits = selected_bits(selection, stream.tokens)
                    record.router_loss = imitation_loss(self.router(before), bits, stream.valid)
            stream.records.append(record)
        return out


class SubjectiveDepthDecoder(RoutedDecoder):
    """A decoder of Decision and Dynamic layers; layers of no pair are plain."""

    kind: ClassVar[Kind] = "subjective_depth"

    def make_layer(self, index: int) -> nn.Module:
        """Return the Dynamic, Decision or plain layer of this place."""
        routed = self.config.routed_layers
        if index in routed:
            return DynamicLayer(self.config, index)
        if index + 1 in routed:
            return DecisionLayer(self.config, index)
        return PlainLayer(self.config.decoder, index)

    def hidden(self, x: Tensor, stream: Stream) -> Tensor:
        """Run the layers; a Decision layer's surprise goes to the Dynamic layer behind it."""
        told: tuple[Tensor, Surprise, Tensor | None] | None = None
        for layer in self.layers:
            if isinstance(layer, DecisionLayer):
                before = x
                x, surprise, loss = layer(x, stream)
                told = before, surprise, loss
            elif isinstance(layer, DynamicLayer) and told is not None:
                x = layer(x, *told, stream)
            else:
                x = layer(x, stream)
        return x

    def start(self, batch: int, length: int, chunk: int = 1) -> DecodeState:
        """Return the state before the first token, the moving averages' windows among it."""
        state = super().start(batch, length, chunk)
        for layer, kept in zip(self.layers, state.layers, strict=True):
            if isinstance(layer, DecisionLayer):
                kept.surprise = RecentSurprise(batch, self.config.routing.window)
        return state
