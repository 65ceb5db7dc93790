"""The shape of a decoder that routes its tokens, checked when it is made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from depthwire.errors import UsageError
from depthwire.models._config_json import read_config
from depthwire.models.attn_res_config import AttnResConfig  # noqa: TC001 - pydantic resolves it at run time

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MODEL_TYPE = "depthwire_routed"
KINDS = ("mixture_of_depths", "subjective_depth", "subjective_timescale", "attn_res")
Kind = Literal["mixture_of_depths", "subjective_depth", "subjective_timescale", "attn_res"]
Rule = Literal["top-k", "budget"]
Spelling = Literal["gather", "index", "onehot"]


@dataclass(frozen=True)
class RoutingConfig:
    """Which tokens a routed layer computes, and how its code spells that.

    Attributes:
        capacity: Share of the tokens that a routed layer computes, above 0 and at most 1.
        layers: The routed layers; ``None`` for every odd one. In a Subjective Depth Transformer these are the Dynamic
            layers, and the layer before each is its Decision layer.
        rule: ``top-k`` ranks the whole sequence and looks ahead; ``budget`` takes a token whose score reaches the
            layer's threshold while fewer than ``floor(capacity * position) + margin`` tokens were taken before it:
            causal, and the same for every length, chunk and decode step. Training is by ``top-k`` always.
        margin: m of the budget, in tokens.
        kv: Keys and values of a routed layer: of the ``selected`` tokens, or of ``all``.
        spelling: How tokens are moved: ``gather`` (gather and scatter), ``index`` (advanced indexing and index_put) or
            ``onehot`` (products with a 0/1 matrix).
        gate: ``unit``: a selected token's update has the factor 1, and the router its gradient all the same, so an
            untrained router leaves the model's function intact at capacity 1; ``score``: the factor is the score, as
            published, and the function of a pretrained model is not kept.
        unit: What is routed: whole blocks, or (AttnRes alone) ``attention``, ``mlp`` or ``both`` sublayers, each apart.
        fallback: AttnRes alone: the source that a token left out writes, ``zero`` or a learned ``prior``.
        predictor: Whether a causal predictor of the top-k choice is trained; under ``budget`` it is then the score.
        prior_factor: f of the prior's width f·d.
        rank: What the surprise ranks tokens by: ``softplus`` (sp(a) + sp(b), in the gate's order, and not saturated at
            the top) or the ``gate`` itself, as published.
        beta: ``learned`` steepness per layer, or a ``schedule`` that ``set_step`` moves.
        average: How the moving average is spelled: ``avg_pool1d``, ``conv1d`` or ``cumsum``.
        window: Tokens in the moving average.
        teacher_output: What a Subjective Timescale layer passes on while training: the ``routed`` pass that inference
            runs, or the ``dense`` one.
        teacher_threshold: Gate from which the teacher calls a token selected, ``None`` for top-k alone.
        prior_weight: Factor on the mean prior loss.
        router_weight: Factor on the mean loss of routers and predictors.
        gate_weight: lambda_g, the factor on the mean gate.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    capacity: float = 0.5
    layers: tuple[int, ...] | None = None
    rule: Rule = "top-k"
    margin: int = 4
    kv: Literal["selected", "all"] = "selected"
    spelling: Spelling = "gather"
    gate: Literal["unit", "score"] = "unit"
    unit: Literal["block", "attention", "mlp", "both"] = "block"
    fallback: Literal["zero", "prior"] = "zero"
    predictor: bool = False
    prior_factor: float = 1 / 16
    rank: Literal["softplus", "gate"] = "softplus"
    beta: Literal["learned", "schedule"] = "learned"
    average: Literal["avg_pool1d", "conv1d", "cumsum"] = "avg_pool1d"
    window: int = 100
    teacher_output: Literal["routed", "dense"] = "routed"
    teacher_threshold: float | None = None
    prior_weight: float = 0.05
    router_weight: float = 0.01
    gate_weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers that route nothing or more than there is."""
        exact_capacity(self.capacity)
        for name, least in (("margin", 0), ("window", 1)):
            if getattr(self, name) < least:
                raise _refused(name, f"at least {least}", str(getattr(self, name)))
        if not 0 < self.prior_factor <= 4:
            raise _refused("prior_factor", "above 0 and at most 4", str(self.prior_factor))
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise _refused("layers", "layer numbers in ascending order, each once", str(self.layers))


@dataclass(frozen=True)
class RoutedConfig:
    """A decoder and its routing.

    Attributes:
        kind: ``mixture_of_depths``, ``subjective_depth``, ``subjective_timescale``, or ``attn_res``: routed sublayers
            of an AttnRes decoder.
        decoder: The decoder without routing. Its residual is ``plain`` but for ``attn_res``.
        routing: What is routed, and how.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    kind: Kind
    decoder: AttnResConfig
    routing: RoutingConfig = field(default_factory=RoutingConfig)

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        if self.kind not in KINDS:
            raise _refused("kind", ", ".join(KINDS), repr(self.kind))
        attn_res, routing = self.kind == "attn_res", self.routing
        if attn_res == (self.decoder.residual == "plain"):
            raise _refused("decoder.residual", "plain, or AttnRes for kind attn_res", repr(self.decoder.residual))
        if attn_res == (routing.unit == "block"):
            raise _refused("routing.unit", "block; for attn_res: attention, mlp or both", repr(routing.unit))
        if attn_res and routing.kv == "all":
            # Keys of all tokens would need the depth read for all of them, which is what routing is to save.
            raise _refused("routing.kv", "selected, for attn_res", "'all'")
        if not attn_res and routing.fallback != "zero":
            raise _refused("routing.fallback", "zero, but for attn_res", repr(routing.fallback))
        outside = [layer for layer in self.routed_layers if not 0 <= layer < self.decoder.layers]
        if outside or not self.routed_layers:
            raise _refused("routing.layers", f"some of 0 to {self.decoder.layers - 1}", str(outside or "none"))
        if self.kind == "subjective_depth":
            decisions = [layer - 1 for layer in self.routed_layers]
            if -1 in decisions or set(decisions) & set(self.routed_layers):
                raise _refused(
                    "routing.layers", "a layer before each that is not routed itself", str(self.routed_layers)
                )

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Numbers of the routed layers, ascending."""
        given = self.routing.layers
        return tuple(range(1, self.decoder.layers, 2)) if given is None else tuple(given)

    def save(self, file: Path) -> None:
        """Write the configuration as JSON."""
        fields = {"model_type": MODEL_TYPE, **asdict(self)}
        file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, at: str) -> RoutedConfig:
        """Read a configuration that ``save`` wrote.

        Args:
            fields: The parsed JSON.
            at: Where it came from, for the error.

        Raises:
            CaptureError: ``checkpoint.config``: a field is unknown, missing, of another type or out of range.
        """
        return read_config(cls, fields, what="a routed decoder", at=at)


def exact_capacity(capacity: float) -> Fraction:
    """Return a capacity as a ratio of whole numbers: a budget counts, and must not depend on a rounding.

    Raises:
        UsageError: ``routed-model.config``: it is not above 0 and at most 1.
    """
    if not 0 < capacity <= 1:
        raise _refused("capacity", "above 0 and at most 1", str(capacity))
    return max(Fraction(capacity).limit_denominator(4096), Fraction(1, 4096))


def _refused(at: str, want: str, got: str) -> UsageError:
    return UsageError(
        "routed-model.config",
        f"a routed decoder cannot have this {at}",
        at=at,
        want=want,
        got=got,
        todo="docs/models.md describes every field.",
    )
