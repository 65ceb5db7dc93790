"""The one case table of the depth-attention operators: every body of every operator is tested against it.

Operands are drawn in fp64 and rounded to the case's dtype; the expected results are computed from the rounded operands
in fp64 by the torch reference, which ``tests/test_ops.py`` in turn checks against the formula written out by hand.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from depthwire.ops import _reference

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COUNTS = (1, 2, 9, 61, 129)
WIDTHS = (64, 77, 576, 7168)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        sources: n, the number of sources (of the merge's own sources m in two-phase operators).
        width: d.
        dtype: Of the sources; query and gain are fp32.
        rows: Tokens.
        magnitude: Standard deviation of the sources.
        equal: Every source is the same, so all logits are equal.
        norm: The RMSNorm behind the read is part of it.
        add: The last source is a sum that is made on the way.
        unit: The normalised sources are mixed.
        last_bias: Added to the last logit.
        scale: Factor on the logits.
        eps: Added to the mean squares.
    """

    sources: int
    width: int
    dtype: str = "float32"
    rows: int = 3
    magnitude: float = 1.0
    equal: bool = False
    norm: bool = False
    add: bool = False
    unit: bool = False
    last_bias: float = 0.0
    scale: float = 1.0
    eps: float = 1e-6

    def __str__(self) -> str:
        """Return a name for pytest: what differs from the defaults."""
        parts = [f"n{self.sources}", f"d{self.width}", self.dtype]
        for field in dataclasses.fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(field.name if value is True else f"{field.name}{value:g}")
        return "-".join(parts)

    @property
    def op_type(self) -> str:
        """The read's ONNX operator, such as ``AttnResAddReadNorm_9``."""
        flags = (self.add and "Add", self.unit and "Unit", "Read", self.norm and "Norm")
        return "AttnRes" + "".join(flag for flag in flags if flag) + f"_{self.sources}"


@dataclass(frozen=True)
class Operands:
    """The tensors of a call: ``query [d]`` and ``norm_weight [d]`` fp32, the rest ``[rows, d]`` of the case's dtype."""

    query: Tensor
    norm_weight: Tensor
    sources: list[Tensor]
    delta: Tensor


def operands(case: Case, *, seed: int = 0) -> Operands:
    """Draw the tensors of a case."""
    generator = torch.Generator().manual_seed(seed + 1000 * case.sources + case.width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dtype = DTYPES[case.dtype]
    sources = [(draw(case.rows, case.width) * case.magnitude).to(dtype) for _ in range(case.sources)]
    if case.equal:
        sources = [sources[0]] * case.sources
    # Logits of a few units: the softmax is neither flat nor a choice of one.
    query = (draw(case.width) * 2 / case.width**0.5).float()
    delta = (draw(case.rows, case.width) * case.magnitude / 4).to(dtype)
    return Operands(query, (1 + draw(case.width) / 4).float(), sources, delta)


def expected(case: Case, tensors: Operands) -> tuple[Tensor, Tensor | None]:
    """Return the read and, for ``add``, the sum (rounded to the dtype, as the operator does), both fp64."""
    sources, total = list(tensors.sources), None
    if case.add:
        total = sources[-1] + tensors.delta
        sources[-1] = total
    wide = [source.double() for source in sources]
    read = _reference.mix(
        tensors.query.double(), wide, case.eps, case.scale, value_norm=case.unit, last_bias=case.last_bias
    )
    if case.norm:
        read = _reference.rms_norm(read, tensors.norm_weight.double(), case.eps)
    return read, None if total is None else total.double()


def allowed(case: Case, exact: Tensor) -> float:
    """Return the largest absolute error that a sound body may have.

    One rounding to the dtype (or one unit of the subnormals), and fp32 arithmetic before it: a logit is a sum of d
    products, whose error of at most d·2⁻²⁴ in theory and about √d·2⁻²⁴ in practice the softmax hands on as a relative
    error of the weights; four times that, and never less than 32 units.
    """
    finfo = torch.finfo(DTYPES[case.dtype])
    arithmetic = max(32.0, 4 * math.sqrt(case.width)) * 2.0**-24
    largest = float(exact.abs().max())
    rounding, floor = float(finfo.eps) / 2, float(finfo.smallest_normal) * float(finfo.eps)
    return largest * (rounding + arithmetic) + floor


def _table() -> list[Case]:
    cases = [
        Case(n, d, dtype, norm=bool((n + d) % 2), add=n % 2 == 0)
        for n, d, dtype in itertools.product(COUNTS, WIDTHS, DTYPES)
        if n * d <= 129 * 576 or dtype == "float32"
    ]
    small = [Case(9, 77), Case(2, 576)]
    for case, dtype in itertools.product(small, DTYPES):
        case = dataclasses.replace(case, dtype=dtype)  # noqa: PLW2901 - the same case in another dtype
        cases += [dataclasses.replace(case, magnitude=m, norm=norm) for m in (1e-6, 1e4) for norm in (False, True)]
        cases += [dataclasses.replace(case, equal=True, norm=norm) for norm in (False, True)]
        cases += [
            dataclasses.replace(case, add=add, unit=unit, norm=norm)
            for add, unit, norm in itertools.product((False, True), repeat=3)
        ]
        cases += [dataclasses.replace(case, last_bias=2.5, scale=0.125), dataclasses.replace(case, rows=64)]
    return list(dict.fromkeys(cases))


CASES = _table()


@dataclass(frozen=True)
class TwoPhaseCase:
    """A group of reads in two phases: ``bank`` sources seen by all queries, and ``own`` ones that read ``index`` adds.

    Attributes:
        bank: Sources of phase 1.
        queries: S.
        own: m, the sources of the merge; 0 allowed without ``add``.
        width: d.
        dtype: Of the sources.
        rows: Tokens.
        index: Which of the queries the merge finishes.
        norm: The RMSNorm is part of the merge.
        add: The last own source is a sum that is made on the way.
    """

    bank: int
    queries: int
    own: int
    width: int
    dtype: str = "float32"
    rows: int = 3
    index: int = 0
    norm: bool = False
    add: bool = False
    scale: float = 1.0
    eps: float = 1e-6

    def __str__(self) -> str:
        """Return a name for pytest."""
        flags = "-".join(flag for flag in ("norm", "add") if getattr(self, flag))
        return f"b{self.bank}-s{self.queries}-m{self.own}-d{self.width}-{self.dtype}-i{self.index}-{flags or 'plain'}"

    @property
    def op_type(self) -> str:
        """The merge's ONNX operator, such as ``AttnResMergeNorm_2``."""
        return "AttnRes" + ("Add" if self.add else "") + "Merge" + ("Norm" if self.norm else "") + f"_{self.own}"

    def reads(self) -> Case:
        """The same group as one read of all its sources, which it must equal."""
        return Case(
            self.bank + self.own, self.width, self.dtype, self.rows, norm=self.norm, add=self.add, scale=self.scale
        )


def two_phase_operands(case: TwoPhaseCase, *, seed: int = 0) -> tuple[Tensor, Operands]:
    """Return the queries ``[S, d]`` and the operands of read ``index`` over all sources, the bank's first."""
    tensors = operands(case.reads(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(case.queries, case.width, generator=generator, dtype=torch.float64) * 2 / case.width**0.5
    return queries.float(), dataclasses.replace(tensors, query=queries[case.index].float())


TWO_PHASE_CASES = [
    TwoPhaseCase(bank, queries, own, width, dtype, index=queries - 1, norm=norm, add=add)
    for (bank, queries, own, width), dtype, norm, add in itertools.product(
        [(1, 1, 0, 64), (2, 6, 1, 77), (9, 4, 3, 576), (60, 3, 1, 576), (8, 2, 5, 7168), (100, 2, 29, 64)],
        DTYPES,
        (False, True),
        (False, True),
    )
    if own or not add
]
