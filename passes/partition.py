"""How sublayers are partitioned into the blocks of Block AttnRes.

``full``            every sublayer is its own source
``block:N``         N blocks of consecutive sublayers; sizes differ by at most one
``block-layers:K``  a block per K transformer layers, boundaries before attention (Kimi K3's rule); the last may be
                    short
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from depthwire.errors import PassError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

_LAYER_STARTS = ("attention", "parallel")


@dataclass(frozen=True)
class Partition:
    """A partition rule.

    Attributes:
        mode: ``full``, ``block`` or ``block-layers``.
        size: N or K; 0 for ``full``.
    """

    mode: Literal["full", "block", "block-layers"]
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Read ``full``, ``block:N`` or ``block-layers:K``.

        Raises:
            UsageError: Anything else, or a size below 1.
        """
        mode, _, size = text.partition(":")
        if text == "full":
            return cls("full")
        if mode in ("block", "block-layers") and size.isdecimal() and int(size) >= 1:
            return cls(mode, int(size))  # type: ignore[arg-type]
        raise UsageError(
            "attn-res.bad-partition",
            "The AttnRes partition cannot be read",
            at="--attn-res",
            want="full, block:N (N blocks, N >= 1) or block-layers:K (K layers a block, K >= 1)",
            got=text,
            todo="Try --attn-res block:8.",
        )

    def __str__(self) -> str:
        return self.mode if self.mode == "full" else f"{self.mode}:{self.size}"

    def starts(self, kinds: Sequence[str]) -> list[bool]:
        """Tell for every sublayer whether a block starts with it.

        Args:
            kinds: The sublayers' kinds, in order.

        Raises:
            PassError: More blocks than sublayers, or layers cannot be counted for want of attention sublayers.
        """
        count = len(kinds)
        if self.mode == "full":
            return [True] * count
        if self.mode == "block":
            if self.size > count:
                raise PassError(
                    "attn-res.too-many-blocks",
                    "There are more blocks than sublayers",
                    at="--attn-res",
                    want=f"at most block:{count} (which is full) for this model's {count} sublayers",
                    got=str(self),
                    todo=f"Use block:N with N <= {count}, or full.",
                )
            boundaries = {number * count // self.size for number in range(self.size)}
            return [position in boundaries for position in range(count)]
        layers = layer_starts(kinds)
        if not any(layers):
            raise PassError(
                "attn-res.no-layers",
                "Layers cannot be counted: no sublayer is attention",
                at="--attn-res",
                want="sublayers of kind attention or parallel, each of which starts a layer",
                got=", ".join(sorted(set(kinds))),
                todo="Use block:N, which counts sublayers.",
            )
        if self.size > sum(layers):
            raise PassError(
                "attn-res.too-many-blocks",
                "A block is longer than the model",
                at="--attn-res",
                want=f"at most block-layers:{sum(layers)} for this model's {sum(layers)} layers",
                got=str(self),
                todo="Use fewer layers a block.",
            )
        layer, starts = -1, []
        for starts_layer in layers:
            layer += starts_layer
            starts.append(starts_layer and layer % self.size == 0)
        starts[0] = True
        return starts


def layer_starts(kinds: Sequence[str]) -> list[bool]:
    """Tell which sublayers start a layer: the first attention after something else (cross-attention goes with it)."""
    joins = "mlp" in kinds
    return [
        kind in _LAYER_STARTS and not (joins and position > 0 and kind == kinds[position - 1] == "attention")
        for position, kind in enumerate(kinds)
    ]
