"""How far activations reach: histograms that need no range beforehand, and the scale with the least expected error."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from depthwire.passes.analysis.quantization_rounding import short

_PER_OCTAVE = 32  # a bin is 2.2 % wide
_LOW, _HIGH = -32, 32  # octaves: 2e-10 … 4e9
_CANDIDATES = 256  # eight octaves below the largest value
_HIGHEST = 127


def output_energy(rows: Tensor, importance: Tensor) -> Tensor:
    """Return about how large the output of every token is, ``[T]``: as if its channels were independent; not 0."""
    return (rows.square() @ importance).clamp_(min=torch.finfo(torch.float32).tiny)


@dataclass
class Histogram:
    """How often magnitudes occur, in bins of equal ratio; weighted by what their errors cost relative to the output.

    Attributes:
        counts: ``[bins]`` fp64, sums of weights.
        largest: The largest magnitude.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros((_HIGH - _LOW) * _PER_OCTAVE, dtype=torch.float64))
    largest: float = 0.0

    def add(self, rows: Tensor, importance: Tensor) -> None:
        """Count the values of an activation.

        Args:
            rows: ``[T, K]`` fp32.
            importance: ``[K]``, what an error of 1 in a channel costs in energy of the output.
        """
        size = rows.abs()
        self.largest = max(self.largest, float(size.max()))
        place = ((size.log2() - _LOW) * _PER_OCTAVE).clamp_(0, len(self.counts) - 1).to(torch.int64)
        # Every token counts alike, whatever the size of its output.
        weights = (output_energy(rows, importance).reciprocal().unsqueeze(1) * importance).reshape(-1)
        self.counts += torch.bincount(place.reshape(-1), weights, minlength=len(self.counts)).to(torch.float64)

    def scale(self) -> float:
        """Return the scale of int8 with the least expected squared error.

        A magnitude a costs ``(a - 127 s)²`` where it saturates, else ``s² / 12``, the variance of rounding, but never
        more than a² (what rounds to zero).
        """
        if not self.largest:
            return 1.0
        octaves = torch.arange(len(self.counts), dtype=torch.float64).add_(0.5).div_(_PER_OCTAVE).add_(_LOW)
        sizes = octaves.exp2().clamp_(max=self.largest)
        falls = torch.arange(_CANDIDATES, dtype=torch.float64).div_(_PER_OCTAVE).neg_().exp2()
        scales = short(falls * (self.largest / _HIGHEST))
        steps = scales.unsqueeze(1)
        lost = (sizes - _HIGHEST * steps).clamp_(min=0)
        costs = torch.minimum(steps.square() / 12, sizes.square()) + lost.square()
        return float(scales[int((costs @ self.counts).argmin())])
