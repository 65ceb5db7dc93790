"""The torch bodies against the case table, the two-phase form against the read, gradients, and the fused forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from depthwire.ops import (
    attn_res_add_merge,
    attn_res_add_merge_norm,
    attn_res_add_read,
    attn_res_add_read_norm,
    attn_res_inter,
    attn_res_merge,
    attn_res_merge_norm,
    attn_res_read,
    attn_res_read_norm,
)
from tests.attn_res_cases import (
    CASES,
    TWO_PHASE_CASES,
    Case,
    Operands,
    TwoPhaseCase,
    allowed,
    expected,
    operands,
    two_phase_operands,
)

if TYPE_CHECKING:
    from torch import Tensor


def read(case: Case, t: Operands) -> tuple[Tensor, Tensor | None]:
    last: tuple[Any, ...] = (case.unit, case.last_bias)
    match case.add, case.norm:
        case False, False:
            return attn_res_read(t.query, t.sources, case.eps, case.scale, *last), None
        case False, True:
            args = (t.query, t.norm_weight, t.sources, case.eps, case.scale, case.eps)
            return attn_res_read_norm(*args, *last), None
        case True, False:
            out, total = attn_res_add_read(t.query, t.sources, t.delta, case.eps, case.scale, *last)
        case _:
            more = (t.query, t.norm_weight, t.sources, t.delta, case.eps, case.scale, case.eps)
            out, total = attn_res_add_read_norm(*more, *last)
    return out, total


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_torch_body(case: Case) -> None:
    tensors = operands(case)
    out, total = read(case, tensors)
    exact, exact_total = expected(case, tensors)
    assert out.dtype == tensors.sources[0].dtype
    assert float((out.double() - exact).abs().max()) <= allowed(case, exact)
    assert (total is None) == (exact_total is None)
    if total is not None and exact_total is not None:
        assert torch.equal(total.double(), exact_total)


def two_phase(case: TwoPhaseCase, queries: Tensor, t: Operands) -> tuple[Tensor, Tensor | None]:
    """Both phases in place of the one read."""
    bank, own = t.sources[: case.bank], t.sources[case.bank :]
    inter = attn_res_inter(queries, bank, case.eps, case.scale)
    tail = (case.index, case.eps, case.scale)
    match case.add, case.norm:
        case False, False:
            return attn_res_merge(t.query, *inter, own, *tail), None
        case False, True:
            return attn_res_merge_norm(t.query, t.norm_weight, *inter, own, *tail, case.eps), None
        case True, False:
            out, total = attn_res_add_merge(t.query, *inter, own, t.delta, *tail)
        case _:
            out, total = attn_res_add_merge_norm(t.query, t.norm_weight, *inter, own, t.delta, *tail, case.eps)
    return out, total


@pytest.mark.parametrize("case", TWO_PHASE_CASES, ids=str)
def test_two_phases_equal_one_read(case: TwoPhaseCase) -> None:
    queries, tensors = two_phase_operands(case)
    out, total = two_phase(case, queries, tensors)
    exact, exact_total = expected(case.reads(), tensors)
    # Phase 1's mean is rounded to the dtype on its way, once more than in a single read.
    assert float((out.double() - exact).abs().max()) <= 2 * allowed(case.reads(), exact)
    assert total is None or (exact_total is not None and torch.equal(total.double(), exact_total))


@pytest.mark.parametrize("index", [0, 2])
def test_two_phases_are_exact(index: int) -> None:
    case = TwoPhaseCase(7, 3, 2, 64, index=index, norm=True)
    queries, tensors = two_phase_operands(case)
    sources = [source.double() for source in tensors.sources]
    inter = attn_res_inter(queries.double(), sources[:7], 1e-6, 1.0)
    out = attn_res_merge(tensors.query.double(), *inter, sources[7:], index, 1e-6, 1.0)
    torch.testing.assert_close(out, attn_res_read(tensors.query.double(), sources, 1e-6, 1.0), rtol=1e-13, atol=1e-14)
    another = attn_res_merge(tensors.query.double(), *inter, sources[7:], 1, 1e-6, 1.0)
    assert float((another - out).abs().max()) > 1e-3  # the row that is named, and no other


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_gradients_of_the_fused_read() -> None:
    query, weight, a, b, delta = leaves((4,), (4,), (2, 4), (2, 4), (2, 4))

    def run(*t: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = attn_res_add_read_norm(t[0], t[1], [t[2], t[3]], t[4], 1e-3, 0.7, 1e-3, True, 0.5)
        return out

    assert torch.autograd.gradcheck(run, (query, weight, a, b, delta))
    assert torch.autograd.gradgradcheck(run, (query, weight, a, b, delta))


def test_gradients_of_the_two_phases() -> None:
    queries, query, weight, a, b, delta = leaves((2, 4), (4,), (4,), (2, 4), (2, 4), (2, 4))

    def run(*t: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attn_res_inter(t[0], [t[3]], 1e-3, 0.7)
        merged: tuple[Tensor, Tensor] = attn_res_add_merge_norm(
            t[1], t[2], out, lse, [t[4]], t[5], 1, 1e-3, 0.7, 1e-3, 0.5
        )
        return merged

    assert torch.autograd.gradcheck(run, (queries, query, weight, a, b, delta))


def test_torchs_rules_hold_for_every_operator() -> None:
    ops = torch.ops.depthwire
    query, weight, queries = torch.randn(8), torch.randn(8), torch.randn(3, 8)
    bank = [torch.randn(2, 5, 8) for _ in range(3)]
    delta = torch.randn(2, 5, 8)
    inter = attn_res_inter(queries, bank, 1e-6, 1.0)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.attn_res_read_norm, (query, weight, bank, 1e-6, 1.0, 1e-5)),
        (ops.attn_res_add_read, (query, bank, delta, 1e-6, 1.0)),
        (ops.attn_res_add_read_norm, (query, weight, bank, delta, 1e-6, 1.0, 1e-5, True, 2.0)),
        (ops.attn_res_inter, (queries, bank, 1e-6, 1.0)),
        (ops.attn_res_merge, (query, *inter, [], 1, 1e-6, 1.0)),
        (ops.attn_res_merge_norm, (query, weight, *inter, bank, 2, 1e-6, 1.0, 1e-5)),
        (ops.attn_res_add_merge, (query, *inter, bank, delta, 0, 1e-6, 1.0)),
        (ops.attn_res_add_merge_norm, (query, weight, *inter, bank, delta, 0, 1e-6, 1.0, 1e-5)),
    ]
    for op, args in calls:
        query.requires_grad_()
        assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}, op


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda q, b, _: attn_res_read_norm(q, torch.ones(3), b, 1e-6, 1.0, 1e-6), r"norm_weight must be \[8\]"),
        (lambda q, b, _: attn_res_add_read(q, b, torch.ones(2, 7), 1e-6, 1.0), r"delta is torch.float32\[2, 7\]"),
        (lambda q, b, _: attn_res_inter(q, b, 1e-6, 1.0), r"queries must be \[S, 8\]"),
        (lambda q, b, _: attn_res_inter(q[None].long(), b, 1e-6, 1.0), "queries must be floating point"),
        (lambda q, b, i: attn_res_merge(q, *i, b, 3, 1e-6, 1.0), "index 3 is not a row"),
        (lambda q, b, i: attn_res_merge(q, i[0], i[1].half(), b, 0, 1e-6, 1.0), "inter_lse must be torch.float32"),
        (lambda q, b, i: attn_res_merge(q, *i, [b[0].half()], 0, 1e-6, 1.0), "the row of inter_out is"),
        (lambda q, b, i: attn_res_add_merge(q, *i, [], b[0], 0, 1e-6, 1.0), "to add delta to"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, text: str) -> None:
    bank = [torch.ones(2, 8)] * 2
    inter = attn_res_inter(torch.ones(3, 8), bank, 1e-6, 1.0)
    with pytest.raises(ValueError, match=text):
        call(torch.ones(8), bank, inter)
