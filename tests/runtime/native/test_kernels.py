"""Every operator of the library of kernels, in ONNX Runtime, against the case table."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.attn_res_cases import (
    CASES,
    TWO_PHASE_CASES,
    Case,
    TwoPhaseCase,
    allowed,
    expected,
    operands,
    two_phase_operands,
)
from tests.runtime.native.one_node import read_node, run, two_phase_nodes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_read(case: Case) -> None:
    tensors = operands(case)
    found = run([read_node(case, tensors)])
    exact, exact_sum = expected(case, tensors)
    assert float((found["out"].double() - exact).abs().max()) <= allowed(case, exact)
    assert (exact_sum is None) == ("sum" not in found)
    if exact_sum is not None:
        assert torch.equal(found["sum"].double(), exact_sum)


@pytest.mark.parametrize("case", TWO_PHASE_CASES, ids=str)
def test_two_phases(case: TwoPhaseCase) -> None:
    queries, tensors = two_phase_operands(case)
    found = run(two_phase_nodes(case, queries, tensors))
    exact, exact_sum = expected(case.reads(), tensors)
    # Phase 1's mean is rounded to the dtype on its way, once more than in a single read.
    assert float((found["out"].double() - exact).abs().max()) <= 2 * allowed(case.reads(), exact)
    if exact_sum is not None:
        assert torch.equal(found["sum"].double(), exact_sum)


@pytest.mark.parametrize("case", [TwoPhaseCase(60, 7, 0, 576), TwoPhaseCase(9, 9, 0, 77, "bfloat16")], ids=str)
def test_phase_1(case: TwoPhaseCase) -> None:
    queries, tensors = two_phase_operands(case)
    found = run(two_phase_nodes(case, queries, tensors)[:1])
    for row in range(case.queries):
        own = dataclasses.replace(tensors, query=queries[row])
        exact, _ = expected(case.reads(), own)
        assert float((found["inter_out"][row].double() - exact).abs().max()) <= allowed(case.reads(), exact)
        wide = torch.stack([source.double() for source in tensors.sources])
        rstd = torch.rsqrt(wide.square().mean(-1) + case.eps)
        lse = torch.logsumexp((wide * queries[row].double()).sum(-1) * rstd * case.scale, dim=0)
        # A logit's absolute error is that of a dot product of about unit terms, see ``allowed``.
        torch.testing.assert_close(found["inter_lse"][row].double(), lse, rtol=1e-6, atol=4e-6)
