"""What the layers of one forward pass share, and what decoding carries from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from depthwire.models._token_attention import Keys, KeyValueCache, causal_mask
from depthwire.models._token_movement import Selection, select_top, select_within_budget

if TYPE_CHECKING:
    from collections.abc import Callable
    from fractions import Fraction

    from depthwire.models.routing_config import RoutingConfig, Rule
    from depthwire.models.surprise import RecentSurprise, Surprise


@dataclass
class LayerState:
    """What decoding keeps of one layer.

    Attributes:
        cache: Its keys and values; ``None`` where attention has none.
        taken: ``[batch]`` int64, tokens that it has computed, if it is routed.
        taken_mlp: The same for an MLP sublayer that is routed apart.
        surprise: The moving average's window, in a layer that has one.
        last: ``[batch, width]``, its last input, in a layer whose router asks for it.
    """

    cache: KeyValueCache
    taken: Tensor
    taken_mlp: Tensor
    surprise: RecentSurprise | None = None
    last: Tensor | None = None


@dataclass
class DecodeState:
    """What decoding carries from one call to the next.

    Attributes:
        layers: One per layer.
        seen: ``[batch]`` int64, valid tokens so far.
        position: ``[batch]`` int64, where the next token stands.
        used: Entries of the dense caches that are written.
        length: Entries that they have.
        chunk: The longest chunk.
        cos: Rotary table of all positions.
        sin: Rotary table of all positions.
    """

    layers: list[LayerState]
    seen: Tensor
    position: Tensor
    used: int
    length: int
    chunk: int
    cos: Tensor
    sin: Tensor


@dataclass
class LayerRecord:
    """What a routed layer did; the losses are present in training alone.

    Attributes:
        name: ``layers.{i}``, for AttnRes with the sublayer.
        score: ``[batch, tokens]``, what the selection was made by.
        selection: The tokens that were computed.
        surprise: The surprise of the layer, where it has one.
        prior_loss: Mean square error of the prediction.
        router_loss: Mean cross-entropy of the router or predictor.
        gate_loss: Mean gate.
        student: ``[batch, tokens]``, the student's logits, where the teacher made the selection.
    """

    name: str
    score: Tensor
    selection: Selection
    surprise: Surprise | None = None
    prior_loss: Tensor | None = None
    router_loss: Tensor | None = None
    gate_loss: Tensor | None = None
    student: Tensor | None = None


@dataclass
class Stream:
    """What the layers of one forward pass share.

    Attributes:
        routing: The configuration.
        capacity: Share of the tokens that routed layers compute in this pass.
        rule: Selection rule of this pass.
        tokens: T.
        cos: Rotary table, ``[tokens, head_dim]`` or ``[batch, tokens, head_dim]``.
        sin: The same.
        valid: ``[batch, tokens]`` bool, ``None`` without padding.
        training: Whether the layers compute their losses.
        calibrating: Whether thresholds are set to the quantile of the scores that lets ``capacity`` through.
        records: Where routed layers say what they did, ``None`` for nowhere.
        state: Caches and counts, when decoding.
    """

    routing: RoutingConfig
    capacity: Fraction
    rule: Rule
    tokens: int
    cos: Tensor
    sin: Tensor
    valid: Tensor | None = None
    training: bool = False
    calibrating: bool = False
    records: list[LayerRecord] | None = None
    state: DecodeState | None = None
    _dense: Keys | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Make the mask that dense layers share."""
        if self.valid is not None and self.state is None:
            self._dense = Keys(causal_mask(self.valid))

    @property
    def slots(self) -> int:
        """K: the tokens that a routed layer computes."""
        if self.state is not None:  # a chunk may take up what earlier chunks left of the budget
            return self.tokens
        share = self.tokens * self.capacity.numerator // self.capacity.denominator
        return max(1, share if self.rule == "top-k" else min(self.tokens, share + self.routing.margin))

    def dense_keys(self, layer: int) -> Keys | None:
        """Return what a layer's queries see when every token is one."""
        if self.state is None:
            return self._dense
        kept, everything = self._kept(), self._everything()
        advance = torch.full_like(self.state.seen, self.tokens)
        return Keys(cache=self.state.layers[layer].cache, kept=kept, advance=advance, queries=everything)

    def select(self, score: Tensor, threshold: Tensor, taken: Tensor | None = None) -> Selection:
        """Select tokens by the rule of this pass.

        Args:
            score: ``[batch, tokens]``.
            threshold: ``[]``, of the layer; set here when calibrating.
            taken: ``[batch]``, tokens taken before, when decoding.
        """
        routing = self.routing
        if self.calibrating:
            among = score.detach() if self.valid is None else score.detach()[self.valid]
            threshold.copy_(among.flatten().quantile(1 - float(self.capacity)))
        if self.rule == "top-k":
            return select_top(score, self.valid, self.slots, routing.spelling)
        carried = None if self.state is None or taken is None else (self.state.seen, taken)
        return select_within_budget(
            score,
            self.valid,
            threshold,
            capacity=self.capacity,
            margin=routing.margin,
            slots=self.slots,
            spelling=routing.spelling,
            carried=carried,
        )

    def routed_keys(self, selection: Selection, x: Tensor, layer: int) -> Keys | None:
        """Return what the selected tokens see.

        Args:
            selection: The queries.
            x: ``[batch, tokens, width]``, where the keys of all tokens come from, if they are asked for.
            layer: Whose cache.
        """
        cache = None if self.state is None else self.state.layers[layer].cache
        if self.routing.kv == "all":
            where = selection.positions()
            if cache is not None:
                dense = self.dense_keys(layer)
                advance = None if dense is None else dense.advance
                return Keys(None, x, self.cos, self.sin, cache, self._kept(), advance, where)
            span = torch.arange(self.tokens, device=x.device)
            mask = span <= where.unsqueeze(2)
            if self.valid is not None:
                mask = (mask & self.valid.unsqueeze(1)) | (span == where.unsqueeze(2))
            return Keys(mask.unsqueeze(1), x, self.cos, self.sin)
        if cache is not None:
            taken = torch.ones_like(selection.index, dtype=torch.bool) if selection.taken is None else selection.taken
            return Keys(cache=cache, kept=taken, advance=taken.sum(1), queries=self._everything())
        return None if selection.taken is None else Keys(causal_mask(selection.taken))

    def route(
        self,
        block: Callable[[Tensor, Tensor, Tensor, Keys | None], Tensor],
        x: Tensor,
        selection: Selection,
        gate: Tensor | None,
        layer: int,
    ) -> Tensor:
        """Run a block on the selected tokens; the others keep their state.

        Args:
            block: Maps states, rotary tables and keys to states.
            x: ``[batch, tokens, width]``.
            selection: The tokens.
            gate: ``[batch, tokens]``, factor on their update; ``None`` for 1.
            layer: Whose cache.
        """
        rows = selection.gather(x)
        after = block(rows, selection.table(self.cos), selection.table(self.sin), self.routed_keys(selection, x, layer))
        if gate is not None:
            after = rows + selection.gather(gate.unsqueeze(-1)).to(x.dtype) * (after - rows)
        return selection.scatter(x, rows, after)

    def _kept(self) -> Tensor:
        if self.valid is not None:
            return self.valid
        return torch.ones(self._batch(), self.tokens, dtype=torch.bool, device=self.cos.device)

    def _everything(self) -> Tensor:
        return torch.arange(self.tokens, device=self.cos.device).expand(self._batch(), -1)

    def _batch(self) -> int:
        return 1 if self.state is None else self.state.seen.shape[0]


def count_taken(selection: Selection) -> Tensor:
    """Return the number of computed tokens ``[batch]`` int64."""
    if selection.taken is None:
        return torch.full(selection.index.shape[:1], selection.index.shape[1], dtype=torch.int64)
    return selection.taken.sum(1)


def selected_bits(selection: Selection, tokens: int) -> Tensor:
    """Return which tokens a selection computes, ``[batch, tokens]`` bool."""
    bits = torch.zeros(selection.index.shape[0], tokens, dtype=torch.int64, device=selection.index.device)
    taken = torch.ones_like(selection.index) if selection.taken is None else selection.taken.to(torch.int64)
    # A slot that is not taken adds nothing, wherever it points.
    return bits.scatter_add(1, selection.index, taken) > 0
