"""Selecting tokens and moving them, as eager PyTorch spells it: what a compiler has to recognise.

Every function works on each sequence of the batch by itself. No shape depends on values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fractions import Fraction

    from depthwire.models.routing_config import Spelling


@dataclass(frozen=True)
class Selection:
    """Tokens in slots.

    Attributes:
        index: ``[batch, slots]`` int64, distinct positions within a row; ascending over the taken slots.
        taken: ``[batch, slots]`` bool, the slots that count; ``None`` when all do.
    """

    index: Tensor
    taken: Tensor | None

    def gather(self, x: Tensor) -> Tensor:
        """Take the slots' rows of ``x [batch, tokens, d]``: ``[batch, slots, d]``."""
        return x.gather(1, self._wide(x))

    def scatter(self, base: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Put rows back.

        Args:
            base: ``[batch, tokens, d]``.
            before: ``[batch, slots, d]``, the rows of ``base``.
            after: ``[batch, slots, d]``, what the taken slots get in their place.
        """
        return base.scatter(1, self._wide(base), self.kept(before, after))

    def table(self, table: Tensor) -> Tensor:
        """Take the slots' rows of a table, ``[tokens, d]`` or ``[batch, tokens, d]``: ``[batch, slots, d]``."""
        return self.gather(table.expand(self.index.shape[0], -1, -1))

    def positions(self) -> Tensor:
        """Return the slots' positions ``[batch, slots]``."""
        return self.index

    def kept(self, before: Tensor, after: Tensor) -> Tensor:
        """Return ``after`` in the taken slots and ``before`` in the others."""
        return after if self.taken is None else torch.where(self.taken.unsqueeze(-1), after, before)

    def _wide(self, x: Tensor) -> Tensor:
        return self.index.unsqueeze(-1).expand(-1, -1, x.shape[-1])


@dataclass(frozen=True)
class IndexedSelection(Selection):
    """The same with advanced indexing and ``index_put``."""

    def gather(self, x: Tensor) -> Tensor:
        """Take the slots' rows."""
        return x[self._rows(), self.index]

    def scatter(self, base: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Put rows back."""
        return base.index_put((self._rows(), self.index), self.kept(before, after))

    def table(self, table: Tensor) -> Tensor:
        """Take the slots' rows of a table."""
        return table[self.index] if table.dim() == 2 else self.gather(table)

    def _rows(self) -> Tensor:
        return torch.arange(self.index.shape[0], device=self.index.device).unsqueeze(1)


@dataclass(frozen=True)
class MatrixSelection(Selection):
    """The same with products: slot j of row b is the token at which ``matrix[b, j]`` has its one.

    A slot that is not taken has a row of zeros, so that it computes on zeros and adds nothing.

    Attributes:
        matrix: ``[batch, slots, tokens]`` bool.
    """

    matrix: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """Take the slots' rows."""
        return self.matrix.to(x.dtype) @ x

    def scatter(self, base: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Put rows back: their change is added, since the product has zeros elsewhere."""
        return base + self.matrix.to(base.dtype).transpose(1, 2) @ (after - before)

    def table(self, table: Tensor) -> Tensor:
        """Take the slots' rows of a table."""
        return self.gather(table)

    def positions(self) -> Tensor:
        """Return the slots' positions; exact, being a sum with one term."""
        tokens = torch.arange(self.matrix.shape[2], dtype=torch.float32, device=self.matrix.device)
        return (self.matrix.to(torch.float32) @ tokens).to(torch.int64)


def select_top(score: Tensor, valid: Tensor | None, slots: int, spelling: Spelling) -> Selection:
    """Take the tokens of the ``slots`` greatest scores of each sequence, in the order of the sequence.

    Args:
        score: ``[batch, tokens]``.
        valid: ``[batch, tokens]`` bool, False for padding, which is never taken; ``None`` when there is none.
        slots: K, at most ``tokens``.
        spelling: How the tokens will be moved.
    """
    ranked = score if valid is None else score.masked_fill(~valid, float("-inf"))
    found = ranked.topk(slots, dim=1).indices
    if spelling == "onehot":
        bits = torch.zeros_like(score, dtype=torch.bool).scatter(1, found, value=True)
        bits = bits if valid is None else bits & valid
        return _compacted(bits, slots, all_taken=valid is None)
    index = found.sort(dim=1).values
    taken = None if valid is None else valid.gather(1, index)
    return Selection(index, taken) if spelling == "gather" else IndexedSelection(index, taken)


def select_within_budget(
    score: Tensor,
    valid: Tensor | None,
    threshold: Tensor,
    *,
    capacity: Fraction,
    margin: int,
    slots: int,
    spelling: Spelling,
    carried: tuple[Tensor, Tensor] | None = None,
) -> Selection:
    """Take the tokens whose score reaches the threshold while the budget lasts; causal.

    With ``cap_t = floor(capacity * position_t) + margin``, token t is taken iff ``score_t >= threshold`` and fewer than
    ``cap_t`` were taken before it. Two prefix scans do it: with A the running count of the tokens that reach the
    threshold, ``C_t = A_t + min(0, min_{s <= t} (cap_s - A_s))`` are taken up to t.

    Args:
        score: ``[batch, tokens]``.
        valid: As for ``select_top``.
        threshold: ``[]``.
        capacity: Of the budget.
        margin: Of the budget, in tokens.
        slots: K, at least as many as can be taken.
        spelling: How the tokens will be moved.
        carried: Valid tokens seen and tokens taken before these, each ``[batch]`` int64; ``None`` for none.

    Returns:
        The taken tokens first, in order; then unselected ones in the slots that are left.
    """
    tokens = score.shape[1]
    reached = score >= threshold
    places = torch.arange(tokens, device=score.device)
    position = (places + 1).unsqueeze(0)
    if valid is not None:
        reached = reached & valid
        position = valid.to(torch.int64).cumsum(1)
    if carried is not None:
        position = position + carried[0].unsqueeze(1)
    cap = position * capacity.numerator // capacity.denominator + margin
    if carried is not None:
        cap = (cap - carried[1].unsqueeze(1)).clamp_min(0)
    count = reached.to(torch.int64).cumsum(1)
    upto = count + (cap - count).cummin(1).values.clamp_max(0)
    bits = upto > torch.nn.functional.pad(upto[:, :-1], (1, 0))
    if spelling == "onehot":
        return _compacted(bits, slots, all_taken=False)
    # Positions of the taken tokens, then, behind all of them, those of the others.
    order = torch.where(bits, places, places + tokens).sort(dim=1).values[:, :slots]
    taken = order < tokens
    index = torch.where(taken, order, order - tokens)
    return Selection(index, taken) if spelling == "gather" else IndexedSelection(index, taken)


def _compacted(bits: Tensor, slots: int, *, all_taken: bool) -> MatrixSelection:
    """Give the j-th selected token of each row the slot j."""
    rank = bits.to(torch.int64).cumsum(1)
    wanted = torch.arange(1, slots + 1, device=bits.device)
    matrix = (rank.unsqueeze(1) == wanted.unsqueeze(1)) & bits.unsqueeze(1)
    index = matrix.to(torch.int64).argmax(2)
    return MatrixSelection(index, None if all_taken else matrix.any(2), matrix)
