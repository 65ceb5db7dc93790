"""Finds chains of residual additions in a graph.

::

    x_0,  x_1 = x_0 + f_1,  x_2 = x_1 + f_2, …        every f_i depends on x_0
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import TRANSPARENT, aten, is_call, is_float, same_shape, scalar, value
from depthwire.passes.analysis.views import factor, viewed

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from depthwire.passes.analysis.norm import Norm

_MINIMUM = 2  # one x + f(x) alone is a gate or an activation, not a stream


@dataclass(frozen=True)
class Write:
    """One addition onto the stream: add = skip_alpha · view(state before) + alpha · branch.

    Attributes:
        add: The addition.
        branch: What is written, with its own scaling (``alpha`` excepted).
        alpha: Factor that the addition itself applies to the branch.
        scale: Scalar factor on the branch, as a label (Granite's residual multiplier); 1.0 if there is none.
        skip: The views between the state before and the addition, from the addition back.
        skip_alpha: Factor that the addition itself applies to the skip path.
    """

    add: torch.fx.Node
    branch: torch.fx.Node
    alpha: float
    scale: float
    skip: tuple[torch.fx.Node, ...]
    skip_alpha: float

    @property
    def skip_scale(self) -> float:
        """Scalar factor on the whole skip path, as a label."""
        return self.skip_alpha * _product(self.skip)


@dataclass(frozen=True)
class Chain:
    """A chain of writes from its origin; ``states[i + 1]`` is the sum after ``writes[i]``.

    Attributes:
        origin: Where it starts.
        writes: The additions, in order.
        post_norms: Norms on the skip path, which normalise the sum itself.
        states: The origin and the result of every write.
    """

    origin: torch.fx.Node
    writes: tuple[Write, ...] = ()
    post_norms: tuple[Norm, ...] = ()
    states: tuple[torch.fx.Node, ...] = field(default=())


def ancestors(graph: torch.fx.Graph) -> dict[torch.fx.Node, int]:
    """Return for every node the set of nodes it depends on (itself included) as a bit set over graph positions.

    Positions are those of the enumeration of ``graph.nodes``; quadratic in bits, 0.1 s for 5,000 nodes.
    """
    sets: dict[torch.fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        bits = 1 << position
        for argument in node.all_input_nodes:
            bits |= sets[argument]
        sets[node] = bits
    return sets


def longest_chain(exported: ExportedProgram, norms: list[Norm]) -> tuple[Chain | None, int]:
    """Return the longest chain of residual additions, and how many separate streams there are.

    A stream counts if it has at least half the longest one's writes, shares none of them, and does not lie inside a
    branch: what a sublayer sums up on its way from one state to the next (a series, a recurrence) is its own affair.
    """
    search = _Search(exported.graph, norms)
    chains = search.chains
    longest = max(chains.values(), key=lambda chain: len(chain.writes), default=None)
    if longest is None or len(longest.writes) < _MINIMUM:
        return None, 0
    longest = search.outermost(longest)
    # Behind a last norm, or inside a branch, a model may go on with additions of another kind.
    sums = [chain for chain in chains.values() if not chain.post_norms]
    plain = search.outermost(max(sums, key=lambda chain: len(chain.writes)))
    best = plain if len(plain.writes) >= max(_MINIMUM, len(longest.writes) / 2) else longest
    return best, 1 + _others(best, search)


class _Search:
    """The longest chain that ends in each addition, found in graph order."""

    def __init__(self, graph: torch.fx.Graph, norms: list[Norm]) -> None:
        self._above = ancestors(graph)
        self._by_output = {norm.output: norm for norm in norms}
        self.chains: dict[torch.fx.Node, Chain] = {}
        for node in graph.nodes:
            if not _is_addition(node):
                continue
            # The skip is the operand with the longer chain below it, and rather a sum than a norm of one.
            found = [chain for side in (0, 1) if (chain := self._extend(node, side)) is not None]
            if found:
                self.chains[node] = max(found, key=lambda chain: (not chain.post_norms, len(chain.writes)))

    def outermost(self, chain: Chain) -> Chain:
        """Return the chain that a chain lies in a branch of, and that one's, and so on; itself if there is none."""
        extended = {other.states[-2] for other in self.chains.values()}
        whole = [other for end, other in self.chains.items() if end not in extended and len(other.writes) >= _MINIMUM]
        whole.sort(key=lambda other: -len(other.writes))
        outer = next((other for other in whole if self.is_inside(chain, other)), None)
        return chain if outer is None else self.outermost(outer)

    def is_inside(self, chain: Chain, outer: Chain) -> bool:
        """Tell whether a chain starts behind one state of another and ends before the next."""
        first, last = chain.origin, chain.states[-1]
        return any(
            write.add is not last and self._depends(first, state) and self._depends(write.add, last)
            for state, write in zip(outer.states, outer.writes, strict=False)
            if state is not first
        )

    def _extend(self, node: torch.fx.Node, side: int) -> Chain | None:
        """Return the chain that ends in an addition whose operand number ``side`` is the skip."""
        skip: Any = node.args[side]
        branch: Any = node.args[1 - side]
        path = self._path(skip)
        norm = self._by_output.get(path[-1])
        below = None if norm is None else self.chains.get(self._path(norm.source)[-1])
        if path[-1] in self.chains:
            chain = self.chains[path[-1]]
        elif norm is not None and below is not None:  # post-norm: the sum itself was normalised
            chain = Chain(below.origin, below.writes, (*below.post_norms, norm), below.states)
        else:
            # A stream starts where its readers read it: x = 16 · embedding, not the embedding.
            start = next((index for index, view in enumerate(path) if self._depends(branch, view)), None)
            if start is None:
                return None
            while is_call(path[start], *TRANSPARENT):  # readers before and after a cast or copy read one value
                start += 1
            path = path[: start + 1]
            chain = Chain(path[-1], states=(path[-1],))
        alpha = scalar(node.kwargs.get("alpha", 1)) or 0.0
        if not self._depends(branch, chain.origin) or alpha == 0.0:
            return None
        alphas = (1.0, alpha) if side == 1 else (alpha, 1.0)
        write = Write(node, branch, alphas[0], _branch_scale(branch) * alphas[0], tuple(path[:-1]), alphas[1])
        return Chain(chain.origin, (*chain.writes, write), chain.post_norms, (*chain.states, node))

    def _path(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """Follow a skip operand back through views to the last state, a norm's output or where the views end."""
        path = [node]
        while path[-1] not in self._by_output:
            source = viewed(path[-1])
            if source is None:
                break
            path.append(source)
        return path

    def _depends(self, node: torch.fx.Node, on: torch.fx.Node) -> bool:
        return bool(self._above[node] >> (self._above[on].bit_length() - 1) & 1)


def _is_addition(node: torch.fx.Node) -> bool:
    if not is_call(node, aten.add.Tensor) or not is_float(node) or value(node).dim() < 2:
        return False
    a, b = node.args[0], node.args[1]
    if not isinstance(a, torch.fx.Node) or not isinstance(b, torch.fx.Node):
        return False
    return same_shape(a, node) and same_shape(b, node) and a is not b


def _product(views: tuple[torch.fx.Node, ...]) -> float:
    result = 1.0
    for view in views:
        result *= factor(view)
    return result


def _branch_scale(branch: torch.fx.Node) -> float:
    """Return the scalar factors at the end of a branch."""
    scale = 1.0
    source = viewed(branch)
    while source is not None:
        scale *= factor(branch)
        branch, source = source, viewed(source)
    return scale


def _others(best: Chain, search: _Search) -> int:
    taken = {write.add for write in best.writes}
    count = 0
    for chain in sorted(search.chains.values(), key=lambda chain: -len(chain.writes)):
        adds = {write.add for write in chain.writes}
        if len(adds) >= max(_MINIMUM, len(best.writes) / 2) and not adds & taken and not search.is_inside(chain, best):
            count += 1
            taken |= adds
    return count
