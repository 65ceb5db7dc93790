"""The decoder that routed models share: blocks, passes over a batch, losses, and steps with caches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from depthwire.errors import UsageError
from depthwire.models._layers import Mlp, rotary_tables
from depthwire.models._stream import DecodeState, LayerRecord, LayerState, Stream
from depthwire.models._token_attention import Keys, KeyValueCache, TokenAttention
from depthwire.models.attn_res_config import CONFIG, AttnResConfig
from depthwire.models.priors import PriorFfn
from depthwire.models.routers import CausalPredictor, LinearRouter, TemporalRouter
from depthwire.models.routing_config import Kind, RoutedConfig, Rule, exact_capacity
from depthwire.models.surprise import SurpriseGate

WEIGHTS = "model.safetensors"
_ADDED = (PriorFfn, LinearRouter, CausalPredictor, TemporalRouter, SurpriseGate)
"""Parts that a dense model does not have."""


@dataclass(frozen=True)
class Losses:
    """Losses of a batch, each ``[]``.

    Attributes:
        total: What to minimise.
        lm: Mean negative log-likelihood of the labels, in nats.
        prior: Mean over layers of the prior's squared error.
        router: Mean over layers of the cross-entropy of routers and predictors.
        gate: Mean over layers of the gate.
        records: What each routed layer did.
    """

    total: Tensor
    lm: Tensor
    prior: Tensor
    router: Tensor
    gate: Tensor
    records: list[LayerRecord]


class DecoderLayer(nn.Module):
    """A pre-norm layer with both its residuals, on all tokens or on some."""

    def __init__(self, config: AttnResConfig, index: int) -> None:
        super().__init__()
        kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
        self.index = index
        self.input_layernorm = kind(config.width, eps=config.eps)
        self.self_attn = TokenAttention(config)
        self.post_attention_layernorm = kind(config.width, eps=config.eps)
        self.mlp = Mlp(config.width, config.mlp_width)

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Keys | None = None) -> Tensor:
        """Map ``[batch, tokens, width]`` to the same; see ``TokenAttention`` for the rest."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, keys, self.input_layernorm)
        return cast("Tensor", x + self.mlp(self.post_attention_layernorm(x)))

    def dense(self, x: Tensor, stream: Stream) -> Tensor:
        """Compute every token."""
        return self.compute(x, stream.cos, stream.sin, stream.dense_keys(self.index))


class PlainLayer(DecoderLayer):
    """A layer that is not routed."""

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """Map ``[batch, tokens, width]`` to the same."""
        return self.dense(x, stream)


class RoutedLayer(DecoderLayer):
    """A layer that computes some tokens; its threshold serves the budget rule.

    Attributes:
        threshold: ``[]`` fp32; minus infinity takes tokens as they come, while the budget lasts.
    """

    threshold: Tensor

    def __init__(self, config: AttnResConfig, index: int) -> None:
        super().__init__(config, index)
        self.register_buffer("threshold", torch.tensor(-torch.inf))


class RoutedDecoder(nn.Module):
    """A causal language model some of whose layers compute some of the tokens.

    Attributes:
        config: Its shape.
        capacity: Share of the tokens that routed layers compute; training anneals it from 1 (``annealed_capacity``).
        rule: Selection rule of ``forward``; ``losses`` selects by ``top-k``, ``step`` by ``budget``.
    """

    kind: ClassVar[Kind]

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__()
        if config.kind != self.kind:
            raise UsageError(
                "routed-model.config",
                f"{type(self).__name__} is not a model of this kind",
                at="kind",
                want=self.kind,
                got=config.kind,
                todo="depthwire.models.routed_checkpoints.build takes the class from the configuration.",
            )
        self.config = config
        self.capacity = config.routing.capacity
        self.rule: Rule = config.routing.rule
        decoder = config.decoder
        self.embed_tokens = nn.Embedding(decoder.vocab_size, decoder.width)
        self.layers = nn.ModuleList(self.make_layer(index) for index in range(decoder.layers))
        kind = nn.RMSNorm if decoder.norm == "rmsnorm" else nn.LayerNorm
        self.norm = kind(decoder.width, eps=decoder.eps)
        self.lm_head = None if decoder.tied_embeddings else nn.Linear(decoder.width, decoder.vocab_size, bias=False)
        self.reset_parameters()

    def make_layer(self, index: int) -> nn.Module:
        """Return layer ``index``; each kind of model has its own."""
        raise NotImplementedError

    def hidden(self, x: Tensor, stream: Stream) -> Tensor:
        """Run the layers on the embedding ``[batch, tokens, width]``."""
        for layer in self.layers:
            x = layer(x, stream)
        return x

    def reset_parameters(self) -> None:
        """Draw the decoder's weights; priors, routers and gates have drawn their own."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.decoder.width**-0.5)
            elif isinstance(module, (TokenAttention, Mlp)):
                for linear in module.children():
                    weight = cast("nn.Linear", linear).weight
                    nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=self.config.decoder.width**-0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits.

        Args:
            input_ids: ``[batch, tokens]`` int64.
            attention_mask: ``[batch, tokens]``, nonzero for tokens and zero for padding, which lies on the left or on
                the right; ``None`` without padding.

        Returns:
            ``[batch, tokens, vocab_size]`` in the dtype of the weights.
        """
        return self._logits(input_ids, self._stream(input_ids, attention_mask))

    def trace(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, calibrate: bool = False
    ) -> tuple[Tensor, list[LayerRecord]]:
        """Return the logits and what each routed layer did.

        Args:
            input_ids: As for ``forward``.
            attention_mask: As for ``forward``.
            calibrate: Set every layer's threshold to the score that a share ``capacity`` of these tokens reaches, layer
                after layer on the routed stream.
        """
        stream = self._stream(input_ids, attention_mask)
        stream.records, stream.calibrating = [], calibrate
        with torch.no_grad():
            logits = self._logits(input_ids, stream)
        return logits, stream.records

    def losses(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Losses:
        """Run a training pass.

        Args:
            input_ids: As for ``forward``.
            labels: ``[batch, tokens]`` int64, the token that follows each; -100 for none.
            attention_mask: As for ``forward``.
        """
        stream = self._stream(input_ids, attention_mask)
        stream.records, stream.training, stream.rule = [], True, "top-k"
        logits = self._logits(input_ids, stream)
        lm = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        records, routing = stream.records, self.config.routing
        prior = _mean([record.prior_loss for record in records], lm)
        router = _mean([record.router_loss for record in records], lm)
        gate = _mean([record.gate_loss for record in records], lm)
        total = lm + routing.prior_weight * prior + routing.router_weight * router + routing.gate_weight * gate
        return Losses(total, lm, prior, router, gate, records)

    def start(self, batch: int, length: int, chunk: int = 1) -> DecodeState:
        """Return the state before the first token.

        Args:
            batch: Sequences.
            length: Most tokens of a sequence, padding among them.
            chunk: Most tokens of one ``step``.
        """
        decoder, routing, like = self.config.decoder, self.config.routing, self.embed_tokens.weight
        capacity = exact_capacity(self.capacity)
        share = length * capacity.numerator // capacity.denominator + routing.margin
        nothing = torch.zeros(batch, dtype=torch.int64, device=like.device)
        layers = []
        for layer in self.layers:
            # The write of a chunk reaches past what it keeps, by the length of the chunk at most.
            short = self.has_routed_keys(layer) and routing.kv == "selected"
            entries = min(share, length) + chunk if short else length
            keys = like.new_zeros(batch, decoder.kv_heads, entries, decoder.head_dim)
            layers.append(LayerState(KeyValueCache(keys), nothing, nothing))
        cos, sin = rotary_tables(length, decoder, like)
        return DecodeState(layers, nothing, nothing, 0, length, chunk, cos, sin)

    def has_routed_keys(self, layer: nn.Module) -> bool:
        """Say whether a layer's attention computes the keys of some tokens only."""
        return isinstance(layer, RoutedLayer)

    def step(self, input_ids: Tensor, state: DecodeState, attention_mask: Tensor | None = None) -> Tensor:
        """Run a chunk: a prompt, a part of one, or one new token per sequence.

        Args:
            input_ids: ``[batch, n]`` int64.
            state: From ``start``; brought up to date.
            attention_mask: ``[batch, n]``, as for ``forward``. The valid tokens of a sequence, over all its chunks, are
                one run within each chunk.

        Returns:
            Logits ``[batch, n, vocab_size]``: those that ``forward`` by the budget rule has for these tokens of the
            whole sequence.

        Raises:
            UsageError: ``routed-model.not-causal``: the rule is top-k. ``routed-model.length``: more tokens than the
                state has room for.
        """
        tokens = input_ids.shape[1]
        self._refuse_step(tokens, state)
        valid = None if attention_mask is None else attention_mask != 0
        places = torch.arange(tokens, device=input_ids.device)
        table = (state.position.unsqueeze(1) + places).clamp_max(state.length - 1)
        stream = Stream(
            self.config.routing,
            exact_capacity(self.capacity),
            "budget",
            tokens,
            state.cos[table],
            state.sin[table],
            valid,
            state=state,
        )
        logits = self._logits(input_ids, stream)
        state.used += tokens
        if valid is None:
            state.seen, state.position = state.seen + tokens, state.position + tokens
        else:
            state.seen = state.seen + valid.sum(1)
            # Padding on the right takes no place: the next token stands where it began.
            state.position = state.position + torch.where(valid, places + 1, 0).amax(1)
        return logits

    def new_weights(self) -> set[str]:
        """Return the names of the weights and buffers that a dense model does not have."""
        return {
            f"{owner}.{name}" if owner else name
            for owner, module in self.named_modules()
            if isinstance(module, _ADDED)
            for name in module.state_dict()
        } | {name for name in self.state_dict() if name.endswith(".threshold")}

    def set_step(self, step: int, steps: int) -> None:
        """Prepare the gates for a training step (``SurpriseGate.set_step``); call it before every one."""
        for module in self.modules():
            if isinstance(module, SurpriseGate):
                module.set_step(step, steps)

    def cast(self, dtype: torch.dtype) -> RoutedDecoder:
        """Change the dtype of the weights in place; thresholds and the gates' scalars keep theirs."""
        state = {name: x.to(dtype) if x.dim() else x for name, x in self.state_dict().items()}
        self.load_state_dict(state, strict=True, assign=True)
        return self

    def save(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, which ``load_routed`` reads."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.config.save(directory / CONFIG)
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, str(directory / WEIGHTS), metadata={"format": "pt"})

    def _stream(self, input_ids: Tensor, attention_mask: Tensor | None) -> Stream:
        valid = None if attention_mask is None else attention_mask != 0
        cos, sin = rotary_tables(input_ids.shape[1], self.config.decoder, self.embed_tokens.weight)
        return Stream(
            self.config.routing, exact_capacity(self.capacity), self.rule, input_ids.shape[1], cos, sin, valid
        )

    def _logits(self, input_ids: Tensor, stream: Stream) -> Tensor:
        x = self.norm(self.hidden(self.embed_tokens(input_ids), stream))
        return F.linear(x, self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)

    def _refuse_step(self, tokens: int, state: DecodeState) -> None:
        if self.rule != "budget":
            raise UsageError(
                "routed-model.not-causal",
                "top-k over the sequence cannot be decoded step by step: it looks at tokens that are not there yet",
                at="rule",
                want="budget",
                got=self.rule,
                todo="Set model.rule = 'budget', after model.trace(…, calibrate=True) for its thresholds.",
            )
        if tokens > state.chunk or state.used + tokens > state.length:
            raise UsageError(
                "routed-model.length",
                "the state has no room for these tokens",
                at="step",
                want=f"chunks of at most {state.chunk} tokens, {state.length} in all",
                got=f"{tokens} tokens after {state.used}",
                todo="Call start with a greater length or chunk.",
            )


def _mean(losses: list[Tensor | None], like: Tensor) -> Tensor:
    present = [loss for loss in losses if loss is not None]
    return torch.stack(present).mean() if present else torch.zeros_like(like)


def annealed_capacity(done: float, final: float) -> float:
    """Return the capacity to train with: from 1 down to ``final`` along a cosine, then there.

    Args:
        done: Share of the annealing that is over; 1 or more when all of it is.
        final: Capacity that the model is to have.
    """
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
