"""What reads cost in memory traffic, in one pass each or in two phases, and the cheapest grouping.

A read passes over its n sources and writes one result: n + 1 rows of d values per token. A group of S reads that share
a bank of N sources, and of which read j has m_j sources of its own, moves

    singly       Σ_j (N + m_j + 1)
    two-phase    (N + S) + Σ_j (1 + m_j + 1)      phase 1 reads the bank and writes S means; a merge reads one of them

(arXiv 2603.15031, section 5, counts keys and values apart; a fused kernel reads each source once for both.) An
operator costs something to start whatever it moves; ``START_BYTES`` is what could have been moved meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

START_BYTES = 64 << 10
"""Five microseconds at 13 GB/s: what starting an operator costs on two CPU cores. It decides single tokens only."""

LONGEST_GROUP = 64
"""Reads in a group at most: keeps the search linear, and phase 1's results small beside the sources."""


@dataclass(frozen=True)
class Site:
    """One read, as the cost model sees it.

    Attributes:
        sources: How many it has.
        shared: How many of its first sources are also the first sources of the read before it.
        row_bytes: Bytes of one source over all tokens.
        kind: Reads of different kinds (eps, scale, width) cannot share a group.
    """

    sources: int
    shared: int
    row_bytes: int
    kind: object


@dataclass(frozen=True)
class Group:
    """Consecutive reads ``first … first + size - 1`` and what they cost.

    Attributes:
        first: Index of the first read.
        size: S.
        bank: N, the sources that all of them share.
        single: Bytes moved by one pass each.
        two_phase: Bytes moved in two phases.
    """

    first: int
    size: int
    bank: int
    single: int
    two_phase: int

    @property
    def pays(self) -> bool:
        """Whether two phases move less."""
        return self.size > 1 and self.two_phase < self.single

    @property
    def bytes(self) -> int:
        """What the better of the two moves."""
        return min(self.single, self.two_phase) if self.size > 1 else self.single


def cheapest_groups(sites: Sequence[Site], start_bytes: int = START_BYTES) -> list[Group]:
    """Return the grouping of consecutive reads that moves the fewest bytes (dynamic programming over the last group).

    Args:
        sites: The reads, in order. The bank of a group is all the sources of its first read.
        start_bytes: What starting an operator counts as.
    """
    best: list[int] = [0]
    chosen: list[Group] = []
    for end in range(1, len(sites) + 1):
        candidates = [
            (best[group.first] + group.bytes, -group.first, group) for group in _groups_ending(sites, end, start_bytes)
        ]
        cost, _, group = min(candidates, key=lambda candidate: candidate[:2])
        best.append(cost)
        chosen.append(group)
    groups, end = [], len(sites)
    while end:
        groups.append(chosen[end - 1])
        end = chosen[end - 1].first
    return groups[::-1]


def _groups_ending(sites: Sequence[Site], end: int, start_bytes: int) -> list[Group]:
    """Return every possible group whose last read is ``end - 1``."""
    groups = []
    own_total, shared = 0, sites[end - 1].sources
    last = sites[end - 1]
    for first in range(end - 1, max(-1, end - 1 - LONGEST_GROUP), -1):
        site = sites[first]
        if site.kind != last.kind:
            break
        own_total += site.sources
        size, bank = end - first, site.sources
        own = own_total - size * bank
        row = site.row_bytes
        if site.sources <= shared:  # else some later read lacks a source of this one
            single = (own_total + size) * row + size * start_bytes
            two_phase = (bank + size + size * 2 + own) * row + (size + 1) * start_bytes
            groups.append(Group(first, size, bank, single, two_phase))
        shared = min(shared, site.shared)
    return groups
