"""What quantisation decides: a value that passes, manifests and tests read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from depthwire.passes._base import Decline

Kind = Literal["int8", "int4-weights"]


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight as it is stored, and what its layers do with their input.

    Attributes:
        values: int8, of the weight's shape.
        scale: fp32 ``[channels]``, or with blocks of the weight's rank, fewer along ``axis``.
        axis: The axis of the channels, or that of the blocks.
        block: Weights that share a scale; 0 for one scale a channel.
        bits: 8 or 4.
        activation: The scale of the layers' input; ``None`` leaves it as it is.
        weight_error: Share of a token's output energy that rounding the weight costs, on average over the
            calibration inputs.
        activation_error: The same of rounding the input; ``None`` for ``int4-weights``.
        reason: Why the input is left alone, or why the weight is given more bits than the others.
    """

    values: Tensor
    scale: Tensor
    axis: int
    block: int
    bits: int
    activation: float | None = None
    weight_error: float = 0.0
    activation_error: float | None = None
    reason: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes in a file with fp32 scales."""
        return self.values.numel() * self.bits // 8 + self.scale.numel() * 4

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the numbers as JSON-ready values."""
        return {
            "bits": self.bits,
            "block": self.block,
            "activation_scale": self.activation,
            "weight_error": self.weight_error,
            "activation_error": self.activation_error,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class QuantizationPlan:
    """What ``QuantizeLinear`` does to which weight.

    Attributes:
        kind: What was asked for.
        weights: By the name of the parameter.
        kept: Linear weights that stay as they are, and why.
        tokens: Rows of activations that the plan was made from, at the layer that saw most.
    """

    kind: Kind
    weights: Mapping[str, QuantizedWeight]
    kept: Mapping[str, Decline] = field(default_factory=dict)
    tokens: int = 0

    @property
    def weight_only(self) -> tuple[str, ...]:
        """Names of the weights whose layers take their input as it is."""
        return tuple(name for name, weight in self.weights.items() if weight.activation is None)

    @property
    def nbytes(self) -> int:
        """Bytes of the quantised weights in a file with fp32 scales."""
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def float_nbytes(self) -> int:
        """Bytes of the same weights in fp32."""
        return sum(weight.values.numel() * 4 for weight in self.weights.values())

    def __str__(self) -> str:
        bits = sorted({weight.bits for weight in self.weights.values()})
        each = ", ".join(f"{sum(w.bits == b for w in self.weights.values())} in {b} bits" for b in bits)
        quantized = len(self.weights) - len(self.weight_only)
        return f"{self.kind}: {each or 'no weights'}, {quantized} with int8 inputs, {len(self.kept)} kept"

    def as_dict(self) -> dict[str, Any]:
        """Return the plan without the numbers as JSON-ready values."""
        return {
            "kind": self.kind,
            "tokens": self.tokens,
            "weights": {name: weight.as_dict() for name, weight in self.weights.items()},
            "kept": {name: decline.as_dict() for name, decline in self.kept.items()},
        }


def most_sensitive(weights: Mapping[str, QuantizedWeight], share: float) -> list[str]:
    """Return the weights whose rounding costs the output of their layer most for their size.

    Grouped-query attention's projection to values is the typical one: small, and its error reaches the stream whole.

    Args:
        weights: All of them, rounded.
        share: How many of their elements may belong to the chosen ones, 0 to 1.
    """
    left = share * sum(weight.values.numel() for weight in weights.values())
    chosen = []
    for name in sorted(weights, key=lambda name: -weights[name].weight_error / weights[name].values.numel()):
        left -= weights[name].values.numel()
        if left < 0:
            break
        chosen.append(name)
    return chosen
