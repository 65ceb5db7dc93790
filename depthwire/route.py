"""What is routed, and how: the specification behind ``convert --route…`` and the routing pass.

A routed unit (a layer, or its attention or MLP sublayer) computes K of the T tokens, the capacity; the others pass it
by. The terms are those of Mixture-of-Depths (arXiv 2404.02258) and of Subjective Depth and Timescale Transformers
(arXiv 2511.21408).
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from depthwire.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Unit = Literal["block", "attention", "mlp"]
KeysValues = Literal["selected", "all"]
Rule = Literal["budget", "top-k"]
Score = Literal["linear", "mod", "surprise", "timescale"]
Gate = Literal["one", "score", "sigmoid", "surprise"]
Fallback = Literal["identity", "linear", "swiglu"]

MAX_DENOMINATOR = 10_000
"""Capacities are fractions, so that every back end rounds a running budget alike."""

_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?")


@dataclass(frozen=True)
class RouteSpec:
    """How a model's layers are routed.

    Attributes:
        layers: Numbers of the routed layers, 0-based, ascending.
        capacity: Share of the tokens that a routed layer computes, in (0, 1]; one per layer, or one for all.
        unit: What is skipped: the whole layer (``block``), or only its attention or MLP sublayer.
        keys_values: Whether unselected tokens are keys and values of the routed attention: ``selected`` leaves them
            out, so that the K/V cache shrinks by the capacity; ``all`` routes the queries alone.
        rule: ``budget``: causal, and the same function in every bucket, chunk and decode step; ``top-k``: the best K
            of the whole sequence, which looks ahead.
        score: What ranks tokens: ``linear`` (w · norm(x) + b), ``mod`` (w · x), ``surprise`` (the SDT criteria, from
            the layer before and its prior), ``timescale`` (w · [x_t; x_{t-1}], the STT student).
        gate: What a selected token's update is multiplied by: ``one``, the ``score``, its ``sigmoid``, or the SDT gate
            ``surprise``.
        fallback: What an unselected token's update is: ``identity`` (nothing), or a prior: ``linear`` or ``swiglu``.
        margin: Tokens that a running budget grants at once, beyond the share of those seen.
        window: With ``top-k``: tokens per window that is selected from apart; 0 selects from the whole sequence.
        surprise_window: Tokens that the surprise's moving average covers.
    """

    layers: tuple[int, ...]
    capacity: tuple[Fraction, ...]
    unit: Unit = "block"
    keys_values: KeysValues = "selected"
    rule: Rule = "budget"
    score: Score = "linear"
    gate: Gate = "one"
    fallback: Fallback = "identity"
    margin: int = 1
    window: int = 0
    surprise_window: int = 100

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if list(self.layers) != sorted({layer for layer in self.layers if layer >= 0}):
            raise _refusal(
                "route.layers",
                "The routed layers are not in order",
                want="different numbers from 0, ascending",
                got=", ".join(map(str, self.layers)),
                todo="Sort them, and name each once.",
            )
        if len(self.capacity) not in (1, len(self.layers)):
            raise _refusal(
                "route.capacity",
                "Capacities and layers do not match",
                want=f"one capacity, or one for each of the {len(self.layers)} routed layers",
                got=f"{len(self.capacity)} capacities",
                todo="Give one capacity for all layers, or as many as there are layers.",
            )
        if self.gate == "surprise" and self.score != "surprise":
            raise _refusal(
                "route.options",
                "The surprise gate needs the surprise score",
                want="score surprise",
                got=f"score {self.score}",
                todo="Use another gate, or the surprise score.",
            )
        if self.window and self.rule != "top-k":
            raise _refusal(
                "route.options",
                "A window belongs to the top-k rule",
                want="rule top-k",
                got=f"rule {self.rule}, window {self.window}",
                todo="Leave the window out: a running budget needs none.",
            )
        if self.margin < 0 or self.window < 0 or self.surprise_window < 1:
            raise _refusal(
                "route.options",
                "A routing option is out of range",
                want="margin and window of 0 or more, surprise window of 1 or more",
                got=f"margin {self.margin}, window {self.window}, surprise window {self.surprise_window}",
                todo="Correct the number.",
            )

    def capacity_of(self, layer: int) -> Fraction:
        """Return the capacity of one routed layer."""
        return self.capacity[0] if len(self.capacity) == 1 else self.capacity[self.layers.index(layer)]

    def slots(self, layer: int, tokens: int) -> int:
        """Return K, the number of tokens that a layer computes at most, of so many.

        Top-k takes ``max(1, floor(capacity · T))`` (in each window); a budget grants ``margin`` more.
        """
        capacity = self.capacity_of(layer)
        if self.rule == "budget":
            return max(1, min(tokens, math.floor(capacity * tokens) + self.margin))
        window = self.window or tokens
        return max(1, math.floor(capacity * window)) * (tokens // window)

    def with_capacity(self, capacity: Fraction) -> RouteSpec:
        """Return the same routing with another capacity for all layers."""
        return dataclasses.replace(self, capacity=(capacity,))

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        values = dataclasses.asdict(self)
        return {**values, "layers": list(self.layers), "capacity": [str(part) for part in self.capacity]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RouteSpec:
        """Return the specification that ``as_dict`` wrote.

        Raises:
            UsageError: An unknown field, or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown or not {"layers", "capacity"} <= set(values):
            raise _refusal(
                "route.options",
                "A routing specification has fields that are unknown, or lacks some",
                want=", ".join(sorted(known)),
                got=", ".join(sorted(values)) or "nothing",
                todo="Write the file with this version of Depthwire.",
            )
        capacity = tuple(parse_capacity(part) for part in values["capacity"])
        return cls(**{**values, "layers": tuple(int(layer) for layer in values["layers"]), "capacity": capacity})


def parse_capacity(value: object) -> Fraction:
    """Read a capacity: ``0.5``, ``"50%"`` or ``"1/3"``.

    Raises:
        UsageError: Anything but a number in (0, 1].
    """
    text = str(value).strip()
    try:
        number = Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)  # NaN and infinity among them
    if not 0 < number <= 1:
        raise _refusal(
            "route.capacity",
            "The capacity is not a share of the tokens",
            want="a number above 0 and up to 1 (such as 0.5, 50% or 1/2)",
            got=text,
            todo="Give the share of tokens that a routed layer computes; 1 computes all.",
        )
    return number.limit_denominator(MAX_DENOMINATOR) or Fraction(1, MAX_DENOMINATOR)


def parse_layers(text: str, count: int | None = None) -> tuple[int, ...]:
    """Read which layers are routed: ``9,11,13``, ``8-20``, ``8-20:2``, ``every:2`` (1, 3, …), ``all``.

    Args:
        text: The choice.
        count: Layers of the model; ``every`` and ``all`` need it, and numbers are checked against it.

    Raises:
        UsageError: It cannot be read, or names a layer that does not exist.
    """
    step = re.fullmatch(r"every:([1-9]\d*)", text.strip())
    if (step is not None or text.strip() == "all") and count is not None:
        every = 1 if step is None else int(step[1])
        layers = tuple(range(every - 1, count, every))
        check_layers(layers, count)
        return layers
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise _refusal(
                "route.layers",
                "The routed layers cannot be read",
                want="numbers and ranges such as 9,11,13 or 8-20:2, every:2 or all",
                got=text,
                todo="Count layers from 0; 'depthwire inspect' lists them.",
            )
        first, last = int(match[1]), int(match[2] or match[1])
        found.update(range(first, last + 1, int(match[3] or 1)))
    layers = tuple(sorted(found))
    if count is not None:
        check_layers(layers, count)
    return layers


def check_layers(layers: Sequence[int], count: int) -> None:
    """Raise UsageError if a layer does not exist, or none is named."""
    beyond = [str(layer) for layer in layers if layer >= count]
    if beyond or not layers:
        raise _refusal(
            "route.layers",
            "A routed layer does not exist" if beyond else "No layer is routed",
            want=f"layers 0 to {count - 1}",
            got=", ".join(beyond) or "none",
            todo="Count layers from 0; 'depthwire inspect' lists them.",
        )


def _refusal(code: str, what: str, *, want: str, got: str, todo: str) -> UsageError:
    return UsageError(code, what, at="route", want=want, got=got, todo=todo)
