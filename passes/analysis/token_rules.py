"""Which rule a choice of tokens follows: its core is evaluated, and compared with the operators' own definition.

A core (``token_choice.Core``) is made of ranks, comparisons, prefix sums and moves of integers: a function of the order
of the scores alone. It is computed for scores of several sizes, with padding on either side, in between and everywhere,
and for every length of the budget, at the program's own shapes; every slot must hold what the operator puts there.
Scores are distinct: among equals ``torch.topk`` leaves the choice open, and the operator takes the lower index.

A budget is read off the choice itself: with every token asking, the number taken up to t is min(t, cap_t), and the
simplest fraction and the smallest margin that give these caps are the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx.node import map_arg

from depthwire.ops.select_tokens import select_tokens_budget_reference, select_tokens_reference
from depthwire.passes._match import value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from depthwire.passes.analysis.token_choice import Core

Node = torch.fx.Node
Budget = tuple[int, int, int]
_SIZES = (1.0, 1e-3, 50.0)
_FAR = 1.0e30


@dataclass(frozen=True)
class Point:
    """Scores ``[B, T]``, valid bits and a threshold, at which a choice is evaluated."""

    score: Tensor
    valid: Tensor
    threshold: float

    def known(self, core: Core, mask: Node | None) -> dict[Node, Tensor]:
        """Return the values of a core's roots."""
        values: dict[Node, Tensor] = {
            node: torch.zeros(value(node).shape, dtype=value(node).dtype) for node in core.shapes
        }
        # Narrow scores are evaluated in fp32: in bf16 an order of thousands of tokens has ties.
        dtype = torch.promote_types(value(core.score).dtype, torch.float32)
        values[core.score] = self.score.to(dtype).reshape(value(core.score).shape)
        if isinstance(core.threshold, Node):
            values[core.threshold] = torch.full(value(core.threshold).shape, self.threshold, dtype=dtype)
        if mask is not None:
            values[mask] = self.valid.to(value(mask).dtype)
        return values


@dataclass(frozen=True)
class Rule:
    """What a choice computes.

    Attributes:
        slots: K.
        budget: Numerator, denominator and margin; ``None`` for top-k.
        exact: Whether every slot holds what the operator's holds, those without a token too.
        full: Whether every slot always holds a token.
        sorted: Whether slots are in the order of the tokens.
    """

    slots: int
    budget: Budget | None
    exact: bool
    full: bool
    sorted: bool


@dataclass(frozen=True)
class Slots:
    """An index ``[B, K]`` and which of its slots hold a selected token, ``[B, K]`` bool."""

    index: Tensor
    taken: Tensor


def points(core: Core, shape: tuple[int, int], *, padded: bool) -> list[Point]:
    """Return what a choice is evaluated at."""
    batch, tokens = shape
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(6):
        order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])
        # Distinct in every dtype that has as many values: an order, spread around zero.
        score = (order.double() * 2 - tokens) / tokens * _SIZES[number % len(_SIZES)]
        valid = torch.ones(shape, dtype=torch.bool)
        if padded:
            valid = torch.stack([_padding(number + row, tokens, generator) for row in range(batch)])
        threshold = float(score.flatten()[number]) if core.threshold is not None else 0.0
        if isinstance(core.threshold, float):
            score, threshold = score + core.threshold, core.threshold
        elif number == 0:
            threshold = -_FAR  # every token asks
        found.append(Point(score.to(torch.float32 if tokens < 1 << 20 else torch.float64), valid, threshold))
    return [_at_threshold(point) for point in found]


def _at_threshold(point: Point) -> Point:
    """Let the threshold be a number of the scores' dtype: a score that equals it reaches it."""
    if abs(point.threshold) == _FAR:
        return point
    return Point(point.score, point.valid, float(torch.tensor(point.threshold, dtype=point.score.dtype)))


def _padding(kind: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Return the valid bits of a row: all, a run at either end, some anywhere, one, none."""
    valid = torch.ones(tokens, dtype=torch.bool)
    cut = int(torch.randint(1, tokens, (1,), generator=generator)) if tokens > 1 else 0
    match kind % 6:
        case 1:
            valid[:cut] = False
        case 2:
            valid[cut:] = False
        case 3:
            valid = torch.rand(tokens, generator=generator) < 0.6
        case 4:
            valid[:] = False
            valid[cut] = True
        case 5:
            valid[:] = False
    return valid


def evaluate(nodes: Iterable[Node], known: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
    """Compute nodes, which stand in order, from the values of what enters them."""
    values = dict(known)
    with torch.no_grad():
        for node in nodes:
            if node not in values:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values


def reference(point: Point, slots: int, budget: Budget | None) -> Slots:
    """Return what the operator selects."""
    arange = torch.arange(slots)
    if budget is None:
        return Slots(*select_tokens_reference(point.score, point.valid, arange))
    state = torch.zeros(point.score.shape[0], 2, dtype=torch.int64)
    threshold = torch.tensor(point.threshold, dtype=point.score.dtype)
    index, taken, _ = select_tokens_budget_reference(
        point.score, point.valid, threshold, torch.tensor(budget), state, arange
    )
    return Slots(index, taken)


def slots_of(tensor: Tensor, *, matrix: bool) -> tuple[Tensor, Tensor] | None:
    """Return an index ``[B, K]`` and which slots hold a token, as an index or a matrix says; ``None`` if it is neither.

    Args:
        tensor: ``[B, K]``, an index repeated along further axes, or a 0/1 matrix ``[B, K, T]``.
        matrix: Which of them.
    """
    if matrix:
        rows = tensor.sum(-1)
        if not bool(((tensor == 0) | (tensor == 1)).all()) or bool((rows > 1).any()):
            return None
        return tensor.to(torch.float32).argmax(-1), rows > 0
    index = tensor.reshape(*tensor.shape[:2], -1)[..., 0]
    if not torch.equal(tensor, index.reshape(*index.shape, *([1] * (tensor.dim() - 2))).expand_as(tensor)):
        return None
    return index, torch.ones_like(index, dtype=torch.bool)


def in_slots(index: Tensor, held: Tensor, wanted: Slots, tokens: int) -> Slots | None:
    """Return a choice's own slots if they hold the wanted tokens, each once; else ``None``."""
    if bool((index < 0).any()) or bool((index >= tokens).any()):
        return None
    bits = torch.zeros(index.shape[0], tokens, dtype=torch.bool)
    bits.scatter_(1, wanted.index, wanted.taken)
    taken = bits.gather(1, index.to(torch.int64)) & held
    hits = torch.zeros(index.shape[0], tokens, dtype=torch.int64)
    hits.scatter_add_(1, index.to(torch.int64), taken.to(torch.int64))
    return Slots(index, taken) if torch.equal(hits, bits.to(torch.int64)) else None


def is_ascending(slots: Slots) -> bool:
    """Tell whether the taken slots of every row are in the order of the tokens."""
    return all(bool((row[bits].diff() > 0).all()) for row, bits in zip(slots.index, slots.taken, strict=True))


def budget_of(bits: Sequence[bool], slots: int) -> Budget | None:
    """Return the budget that lets these tokens through when every token asks; ``None`` if there is none.

    Args:
        bits: Which tokens were taken.
        slots: K, which also bounds them.
    """
    counts = torch.tensor(bits).to(torch.int64).cumsum(0)
    place = torch.arange(1, len(bits) + 1)
    capped = counts < place.clamp(max=slots)  # there the count is the cap; elsewhere the cap is at least the count
    best: Budget | None = None
    for margin in range(int(counts[-1]) + 1):
        lows = (counts - margin).double() / place
        highs = torch.where(capped, (counts - margin + 1).double() / place, torch.inf)
        if lows.max() >= highs.min():
            continue
        t = int(lows.argmax())
        low = max(Fraction(0), Fraction(int(counts[t]) - margin, t + 1))
        t = int(highs.argmin())
        high = Fraction(int(counts[t]) - margin + 1, t + 1) if capped[t] else low + 1
        ratio = simplest(low, high)
        if best is None or (ratio.denominator, margin) < best[1:]:
            best = (ratio.numerator, ratio.denominator, margin)
    return best


def simplest(low: Fraction, high: Fraction) -> Fraction:
    """Return the fraction of the smallest denominator in [low, high)."""
    denominator = 1
    while True:
        numerator = -(-low.numerator * denominator // low.denominator)
        if Fraction(numerator, denominator) < high:
            return Fraction(numerator, denominator)
        denominator += 1
