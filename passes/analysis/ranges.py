"""How large the values of a program get on real inputs: whether half precision holds them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._base import module_path, where
from depthwire.passes.analysis.observe import observe

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from torch import Tensor

    from depthwire.program import Program

_FILL = 1e30
"""Beyond this a finite value is a mask's fill and no number; ``cast_precision`` replaces it."""


@dataclass(frozen=True)
class Ranges:
    """The largest magnitudes that were seen.

    Attributes:
        magnitudes: By the name of the node; infinities of masks and fills are left out, NaN counts as infinite.
        places: Module and node, by the name of the node.
    """

    magnitudes: Mapping[str, float] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def largest(self) -> float:
        """The largest of all; 0 if there are none."""
        return max(self.magnitudes.values(), default=0.0)

    @property
    def largest_at(self) -> str | None:
        """The module that computes it, the first of several."""
        if not self.magnitudes:
            return None
        return self.places[max(self.magnitudes, key=lambda name: self.magnitudes[name])]


def measure(program: Program, feeds: Sequence[Mapping[str, Tensor]], names: Container[str]) -> Ranges:
    """Run a program and measure the values of some nodes.

    Args:
        program: The program.
        feeds: Inputs by name, one after the other.
        names: The nodes to look at.
    """
    found: dict[str, float] = {}
    places: dict[str, str] = {}

    def look(node: torch.fx.Node, result: Any) -> None:
        if node.name not in names:
            return
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                found[node.name] = max(found.get(node.name, 0.0), magnitude(tensor))
                # A weight is named by the module that reads it.
                at = node if module_path(node) else next(iter(node.users), node)
                places.setdefault(node.name, where(at))

    for feed in feeds:
        observe(program, feed, look)
    return Ranges(found, places)


def magnitude(tensor: Tensor) -> float:
    """Return the largest magnitude of a tensor's numbers: infinite for NaN; fills of masks do not count."""
    largest = float(tensor.abs().max())
    if math.isnan(largest):
        return math.inf
    if largest <= _FILL:
        return largest
    kept = tensor[tensor.abs() <= _FILL]
    return float(kept.abs().max()) if kept.numel() else 0.0
