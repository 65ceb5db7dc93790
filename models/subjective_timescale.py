"""Subjective Timescale Transformer (arXiv 2511.21408): a token is computed where time brings something unforeseen.

A routed layer has a teacher and a student. The teacher sees the layer's output: a transition network predicts each
token's update from the previous token's processed state, and the surprise at the true update says which tokens
mattered. The student sees the layer's input alone, ``[x_t; x_{t-1}]``, learns the teacher's choice, and makes it at
inference, where nothing but the chosen tokens is computed.

Training passes on what inference passes on: the same block on the teacher's tokens, the others unchanged
(``teacher_output="routed"``). Passing on the dense output, as a published version does, trains a model that is never
run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from depthwire.models._stream import LayerRecord, Stream, count_taken, selected_bits
from depthwire.models.priors import PriorFfn
from depthwire.models.routed_decoder import PlainLayer, RoutedDecoder, RoutedLayer
from depthwire.models.routers import TemporalRouter, imitation_loss, masked_mean, neutral_gate, previous
from depthwire.models.surprise import SurpriseGate

if TYPE_CHECKING:
    from torch import nn

    from depthwire.models._stream import DecodeState
    from depthwire.models.routing_config import Kind, RoutedConfig


class TimescaleLayer(RoutedLayer):
    """A layer whose student chooses the tokens that it computes.

    Attributes:
        transition: The transition network.
        surprise: The teacher's criteria; inference uses neither of the two.
        router: The student.
    """

    def __init__(self, config: RoutedConfig, index: int) -> None:
        super().__init__(config.decoder, index)
        self.transition = PriorFfn(config.decoder.width, config.routing.prior_factor, config.decoder.eps)
        self.surprise = SurpriseGate(config.routing)
        self.router = TemporalRouter(config.decoder.width)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """Map ``[batch, tokens, width]`` to the same."""
        return self._taught(x, stream) if stream.training else self._chosen(x, stream)

    def _chosen(self, x: Tensor, stream: Stream) -> Tensor:
        """Inference: the student's tokens."""
        state = None if stream.state is None else stream.state.layers[self.index]
        score = self.router(x, previous(x, stream.valid, None if state is None else state.last))
        selection = stream.select(score, self.threshold, None if state is None else state.taken)
        gate = score.sigmoid() if stream.routing.gate == "score" else None
        out = stream.route(self.compute, x, selection, gate, self.index)
        if state is not None:
            state.taken = state.taken + count_taken(selection)
            state.last = _last(x, stream.valid, state.last)
        if stream.records is not None:
            stream.records.append(LayerRecord(f"layers.{self.index}", score, selection))
        return out

    def _taught(self, x: Tensor, stream: Stream) -> Tensor:
        """Training: the teacher's tokens, and the losses of the transition network and the student."""
        routing, valid = stream.routing, stream.valid
        dense = self.dense(x, stream)
        update = dense - x
        predicted = self.transition(previous(dense, valid))
        surprise = self.surprise(update, predicted, valid)
        selection = stream.select(surprise.rank, self.threshold)
        bits = selected_bits(selection, stream.tokens)
        if routing.teacher_threshold is not None:
            bits = bits & (surprise.gate >= routing.teacher_threshold)
        student = self.router(x, previous(x, valid))
        record = LayerRecord(f"layers.{self.index}", surprise.rank, selection, surprise, student=student)
        record.prior_loss = masked_mean((predicted - update.detach()).square().mean(-1), valid)
        record.router_loss = imitation_loss(student, bits, valid)
        record.gate_loss = masked_mean(surprise.gate, valid)
        if stream.records is not None:
            stream.records.append(record)
        if routing.teacher_output == "dense":
            return dense
        gate = student.sigmoid() if routing.gate == "score" else neutral_gate(surprise.gate)
        return stream.route(self.compute, x, selection, gate, self.index)


def _last(x: Tensor, valid: Tensor | None, before: Tensor | None) -> Tensor:
    """Return each sequence's last valid state ``[batch, width]``; that of the chunk before, where this one has none."""
    if valid is None:
        return x[:, -1]
    before = torch.zeros_like(x[:, 0]) if before is None else before
    end = torch.where(valid, torch.arange(1, x.shape[1] + 1, device=x.device), 0).amax(1)
    place = (end - 1).clamp_min(0)[:, None, None].expand(-1, 1, x.shape[2])
    return torch.where((end > 0).unsqueeze(1), x.gather(1, place).squeeze(1), before)


class SubjectiveTimescaleDecoder(RoutedDecoder):
    """A decoder whose routed layers follow their students."""

    kind: ClassVar[Kind] = "subjective_timescale"

    def make_layer(self, index: int) -> nn.Module:
        """Return a routed layer where the configuration routes, and a plain one elsewhere."""
        if index in self.config.routed_layers:
            return TimescaleLayer(self.config, index)
        return PlainLayer(self.config.decoder, index)

    def start(self, batch: int, length: int, chunk: int = 1) -> DecodeState:
        """Return the state before the first token, the students' last inputs among it."""
        state = super().start(batch, length, chunk)
        for layer, kept in zip(self.layers, state.layers, strict=True):
            if isinstance(layer, TimescaleLayer):
                kept.last = self.embed_tokens.weight.new_zeros(batch, self.config.decoder.width)
        return state
