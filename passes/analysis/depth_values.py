"""The normal form of what is computed from stacked sources: a product of known factors over labelled axes.

For sources v_1 … v_n with features c, a term is, for source i and each token::

    scalar · v_i[c]^power · Π factor^exponent (+ bias_i)

The factors are the mean square of a source (``Moment``), constants, the contraction with constants (``Dot``), and what
a softmax over depth makes of it (``Exp``, ``ExpSum``, ``Soft``, …, ``Mix``). Casts leave a term as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from depthwire.passes.analysis.depth_axes import DEPTH, Dim, Dims, has_axis, whole

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import torch

T = TypeVar("T")


class Source(NamedTuple):
    """One source: a node, or a view of one.

    Attributes:
        node: Its node; a fresh buffer stands for a slot that nothing was written into.
        dims: The axes of the source in terms of the node's own axes; ``None`` if they are the same.
        blank: Whether it is an unwritten slot.
    """

    node: torch.fx.Node
    dims: Dims | None = None
    blank: bool = False


class Bank:
    """An ordered list of sources of one shape; there is one object per list, so banks compare by identity.

    Attributes:
        sources: The sources.
        shape: Sizes of a source's axes, those of size 1 left out.
    """

    __slots__ = ("shape", "sources")

    def __init__(self, sources: tuple[Source, ...], shape: tuple[int, ...]) -> None:
        """Use ``Banks.get``."""
        self.sources = sources
        self.shape = shape

    def __len__(self) -> int:
        return len(self.sources)


class Banks:
    """The banks of one graph."""

    def __init__(self) -> None:
        """Start without any."""
        self._known: dict[tuple[tuple[Source, ...], tuple[int, ...]], Bank] = {}
        self._order: dict[Source, int] = {}

    def get(self, sources: Sequence[Source], shape: tuple[int, ...]) -> Bank:
        """Return the bank of some sources."""
        key = (tuple(sources), shape)
        for source in sources:
            self._order.setdefault(source, len(self._order))
        return self._known.setdefault(key, Bank(*key))

    def order(self, source: Source) -> int:
        """Return a number that grows with a source's place in the graph."""
        return self._order[source]

    def take(self, bank: Bank, indices: Sequence[int]) -> Bank:
        """Return the bank of some of a bank's sources."""
        if len(indices) == len(bank) and list(indices) == list(range(len(bank))):
            return bank
        return self.get([bank.sources[index] for index in indices], bank.shape)


@dataclass(frozen=True, slots=True)
class Const:
    """A constant, each of whose dimensions runs over axes of the term (none where its values do not differ)."""

    node: torch.fx.Node
    dims: Dims


Consts = frozenset[tuple[Const, float]]


@dataclass(frozen=True, slots=True)
class Moment:
    """``mean_c(v_i²) + eps``; ``axis`` is that of the features."""

    axis: int
    eps: float


@dataclass(frozen=True, slots=True)
class Dot:
    """``Σ_c v_i[c] · Π consts[c]``."""

    axis: int
    consts: Consts


Shift = frozenset[tuple["Hashable", float]]
"""A sum of named values per token, each with its coefficient: see ``depth_merge``."""


@dataclass(frozen=True, slots=True)
class Gauge:
    """``exp`` of a sum of named values per token."""

    exponent: Shift


@dataclass(frozen=True, slots=True)
class Level:
    """A sum of named values per token."""

    exponent: Shift


@dataclass(frozen=True, slots=True)
class Logits:
    """``s_i = scale · (u · v_i) / sqrt(mean(v_i²) + eps) + bias_i``, with u the product of ``query``.

    Attributes:
        bank: The sources.
        axis: Axis of the features.
        query: Constants over the features, and over queries if there are several.
        eps: Added to the mean square.
        scale: Factor.
        bias: One number per source, or ``None``.
        fixed: Query axes of which one index was taken.
    """

    bank: Bank
    axis: int
    query: Consts
    eps: float
    scale: float
    bias: tuple[float, ...] | None = None
    fixed: frozenset[tuple[Hashable, int]] = frozenset()


def _features(logits: Logits) -> Dim:
    return whole(logits.axis, logits.bank.shape[logits.axis])


@dataclass(frozen=True, slots=True)
class Exp:
    """``exp(s_i)``."""

    logits: Logits


@dataclass(frozen=True, slots=True)
class ExpSum:
    """``Σ_i exp(s_i)``."""

    logits: Logits


@dataclass(frozen=True, slots=True)
class LogSum:
    """``log Σ_i exp(s_i)``."""

    logits: Logits


@dataclass(frozen=True, slots=True)
class LogSoft:
    """``s_i - log Σ_j exp(s_j)``."""

    logits: Logits


@dataclass(frozen=True, slots=True)
class Soft:
    """``softmax_i(s)``."""

    logits: Logits


@dataclass(frozen=True, slots=True)
class Mix:
    """``Σ_i w_i v_i[c]`` over the sources of ``mask``.

    Attributes:
        logits: What the weights are made of.
        unit: Whether the sources are normalised first, as in the logits.
        mask: Bit i is set if source i is in the sum.
        raw: Whether w is ``exp(s)``, not yet divided by its sum.
    """

    logits: Logits
    unit: bool
    mask: int
    raw: bool

    @property
    def whole(self) -> bool:
        """Whether every source is in the sum, with weights that sum to 1."""
        return not self.raw and self.mask == (1 << len(self.logits.bank)) - 1


@dataclass(frozen=True, slots=True)
class Difference:
    """``left - right``, one of them a mix."""

    left: Term
    right: Term


Factor = Const | Moment | Dot | Exp | ExpSum | LogSum | LogSoft | Soft | Mix | Gauge | Level | Difference
Factors = frozenset[tuple[Factor, float]]
Lanes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Term:
    """One alternative for what a node holds; see the module's docstring.

    Attributes:
        dims: What each dimension of the node runs over.
        bank: The sources over which i runs; ``None`` once they are summed over.
        power: Exponent of v.
        scalar: Number.
        factors: Factors with their exponents.
        lanes: Where the sources stand among those of the ``Soft`` or ``Exp`` factor, if there is one.
        bias: Added per source; logits only.
        shift: What is subtracted from every logit of a token alike (a maximum); no softmax sees it. Logits only.
        fixed: See ``Logits``.
    """

    dims: Dims
    bank: Bank | None
    power: int = 0
    scalar: float = 1.0
    factors: Factors = field(default=frozenset())
    lanes: Lanes | None = None
    bias: tuple[float, ...] | None = None
    shift: Shift = frozenset()
    fixed: frozenset[tuple[Hashable, int]] = frozenset()

    @property
    def over(self) -> Bank:
        """The sources, where a term over none cannot be."""
        if self.bank is None:
            raise AssertionError(self)
        return self.bank

    @property
    def deep(self) -> bool:
        """Whether some dimension runs over the sources."""
        return has_axis(self.dims, DEPTH)

    @property
    def pure(self) -> bool:
        """Whether this is the sources themselves."""
        return self.power == 1 and self.scalar == 1.0 and not self.factors and self.bias is None

    def only(self, kind: type[T]) -> T | None:
        """Return the factor if it is the only one, to the power 1, and nothing else is in the term."""
        if len(self.factors) != 1 or self.power or self.scalar != 1.0 or self.bias is not None:
            return None
        ((factor, exponent),) = self.factors
        return factor if isinstance(factor, kind) and exponent == 1.0 else None

    def find(self, kind: type[T]) -> T | None:
        """Return a factor of a kind."""
        return next((factor for factor, _ in self.factors if isinstance(factor, kind)), None)

    @property
    def mix(self) -> Mix | None:
        """The mix, if the term is a whole one, up to a number and constants over the features."""
        found = self.find(Mix)
        if found is None or not found.whole or self.power or self.bias is not None or self.bank is not None:
            return None
        for factor, exponent in self.factors:
            if factor is found:
                if exponent != 1.0:
                    return None
            elif not isinstance(factor, Const) or [dim for dim in factor.dims if dim] != [_features(found.logits)]:
                return None
        return found


@dataclass(frozen=True, slots=True)
class Tainted:
    """A value over stacked sources that has no normal form.

    Attributes:
        dims: What each dimension runs over.
        reason: Why, as the last part of a decline's code.
        node: Where that happened.
    """

    dims: Dims
    reason: str
    node: torch.fx.Node

    @property
    def deep(self) -> bool:
        """Whether some dimension runs over the sources."""
        return has_axis(self.dims, DEPTH)


Value = Term | Tainted


class Read(NamedTuple):
    """A node that holds a read, or a view of reads."""

    term: Term
    mix: Mix
