"""The ONNX function bodies, run by ONNX Runtime without any library of ours, against the case table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime
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
from tests.onnx_reads import read_feeds, read_model, two_phase_feeds, two_phase_model

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

    from tests.onnx_reads import Arrays


def run(model: onnx.ModelProto, feeds: Arrays) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(array).double() for array in session.run(None, feeds)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_read(case: Case) -> None:
    tensors = operands(case)
    out, *rest = run(read_model(case), read_feeds(case, tensors))
    exact, total = expected(case, tensors)
    assert float((out - exact).abs().max()) <= allowed(case, exact)
    assert bool(rest) == (total is not None)
    if total is not None:
        assert torch.equal(rest[0], total)


@pytest.mark.parametrize("case", TWO_PHASE_CASES, ids=str)
def test_two_phases(case: TwoPhaseCase) -> None:
    queries, tensors = two_phase_operands(case)
    out, *rest = run(two_phase_model(case), two_phase_feeds(case, queries, tensors))
    exact, total = expected(case.reads(), tensors)
    # Phase 1's mean is rounded to the dtype on its way, once more than in a single read.
    assert float((out - exact).abs().max()) <= 2 * allowed(case.reads(), exact)
    assert not rest or (total is not None and torch.equal(rest[0], total))


def test_a_group_keeps_the_leading_axes() -> None:
    case = TwoPhaseCase(3, 2, 1, 64, rows=4)
    queries, tensors = two_phase_operands(case)
    model = two_phase_model(case)
    feeds = two_phase_feeds(case, queries, tensors)
    for value in model.graph.input:
        if value.name not in ("query", "queries"):
            del value.type.tensor_type.shape.dim[:]
            for size in (2, 2, 64):
                value.type.tensor_type.shape.dim.add().dim_value = size
            feeds[value.name] = feeds[value.name].reshape(2, 2, 64)
    (out,) = run(model, feeds)
    exact, _ = expected(case.reads(), tensors)
    assert tuple(out.shape) == (2, 2, 64)
    assert float((out.reshape(4, 64) - exact).abs().max()) <= 2 * allowed(case.reads(), exact)
