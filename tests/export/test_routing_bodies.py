"""The routing operators' ONNX bodies, run by ONNX Runtime without any library of ours, against the case table."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from depthwire.export.ops._token_body import budget_body, steps, top_k_body
from depthwire.export.ops.move_tokens import scatter_body
from depthwire.export.ops.surprise_score import surprise_body
from depthwire.ops import select_tokens, select_tokens_budget
from depthwire.runtime.tolerances import tolerance
from tests.onnx_routing import (
    OPSET,
    budget_model,
    feeds,
    gather_model,
    scatter_model,
    surprise_model,
    top_k_model,
)
from tests.routing_cases import (
    BUDGET_CASES,
    MOVE_CASES,
    SCORES,
    SELECT_CASES,
    SURPRISE_CASES,
    WINDOW_CASES,
    MoveCase,
    SelectCase,
    SelectOperands,
    SurpriseCase,
    assert_same,
    expected_budget,
    expected_moves,
    expected_surprise,
    expected_top_k,
    move_operands,
    select_operands,
    surprise_operands,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto | onnxruntime.InferenceSession, operands: Any) -> list[Tensor]:
    ready = session(model) if isinstance(model, onnx.ModelProto) else model
    arrays = feeds(operands)
    wanted = {value.name: arrays[value.name] for value in ready.get_inputs()}
    return [torch.from_numpy(array) for array in ready.run(None, wanted)]


@pytest.mark.parametrize("case", [*SELECT_CASES, *WINDOW_CASES], ids=str)
def test_top_k(case: SelectCase) -> None:
    t = select_operands(case)
    assert_same(run(top_k_model(t, case.window), t), expected_top_k(t.score, t.valid, case.slots, case.window))


@pytest.mark.parametrize("case", BUDGET_CASES, ids=str)
def test_running_budget(case: SelectCase) -> None:
    t = select_operands(case)
    assert_same(run(budget_model(t), t), expected_budget(t))


@functools.cache
def wide_table(seed: int) -> SelectOperands:
    """5,000 rows of every kind of scores and padding, as one batch."""
    parts = [
        select_operands(SelectCase(48, 20, 93, scores, padding), seed=seed)
        for scores in SCORES
        for padding in ("none", "left", "right", "ragged", "all", "scattered")
    ]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("score", "valid")}
    row = torch.arange(len(joined["score"]))
    state = torch.stack([row % 50, row * 7 % 31], dim=1)  # some rows have taken more than the budget grants so far
    return dataclasses.replace(
        parts[0], **joined, state=state, threshold=torch.tensor(0.0), budget=torch.tensor([2, 5, 1])
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_thousands_of_rows_are_selected_as_in_torch(seed: int) -> None:
    t = wide_table(seed)
    assert len(t.score) >= 5000
    assert_same(run(top_k_model(t), t), select_tokens(t.score, t.valid, t.slots))
    assert_same(run(top_k_model(t, 12), t), select_tokens(t.score, t.valid, t.slots, 12))
    assert_same(
        run(budget_model(t), t),
        select_tokens_budget(t.score, t.valid, t.threshold, t.budget, t.state, t.slots),
    )


@pytest.mark.parametrize("make", [top_k_model, budget_model])
def test_fp64_scores(make: Callable[[SelectOperands], onnx.ModelProto]) -> None:
    t = select_operands(SelectCase(50, 20, 3, "denormal", "ragged"))
    wide = dataclasses.replace(t, score=t.score.double(), threshold=t.threshold.double())
    assert_same(run(make(wide), wide), run(make(t), t))


def test_the_number_of_slots_may_be_an_inputs_length() -> None:
    case = SelectCase(40, 40, 3, "ties", "ragged")
    t = select_operands(case)
    top_k, budget = session(top_k_model(t, 8, dynamic=True)), session(budget_model(t, dynamic=True))
    for slots in (5, 20, 40):
        now = dataclasses.replace(t, slots=torch.arange(slots))
        assert_same(run(top_k, now), expected_top_k(t.score, t.valid, slots, 8))
        assert_same(run(budget, now), expected_budget(now))


@pytest.mark.parametrize("chunk", [64, 100, 512])
def test_chunks_with_a_carried_state_are_the_whole(chunk: int) -> None:
    t = select_operands(SelectCase(1024, 1024, 2, padding="ragged", threshold=-0.3, budget=(2, 5, 1)))
    index, taken, state = run(budget_model(t), t)
    whole = [row[flags].tolist() for row, flags in zip(index, taken, strict=True)]
    parts: list[list[int]] = [[], []]
    carried = t.state
    for start in range(0, 1024, chunk):
        score, valid = t.score[:, start : start + chunk], t.valid[:, start : start + chunk]
        piece = dataclasses.replace(t, score=score, valid=valid, slots=t.slots[: score.shape[1]], state=carried)
        index, taken, carried = run(budget_model(piece), piece)
        for row, part in enumerate(parts):
            part.extend((index[row][taken[row]] + start).tolist())
    assert parts == whole
    assert torch.equal(carried, state)


@pytest.mark.parametrize("case", MOVE_CASES, ids=str)
def test_moves(case: MoveCase) -> None:
    t = move_operands(case)
    got = [*run(gather_model(t), t), *run(scatter_model(t), t)]
    assert_same([tensor.to(case.dtype) for tensor in got], expected_moves(t))


@pytest.mark.parametrize("case", SURPRISE_CASES, ids=str)
def test_surprise(case: SurpriseCase) -> None:
    t = surprise_operands(case)
    exact = expected_surprise(case, t)
    (rank,) = run(surprise_model(t, case.window), t)
    assert rank.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert float((rank.double() - exact).abs().max()) <= tolerance("float32", "layer").allowed(float(exact.max()))
    assert not rank[~t.valid].any()


def test_the_surprise_of_unsurprising_tokens_still_ranks_them() -> None:
    # Both criteria far below 0: softplus is e^z there, from 4e-9 down to 2e-18.
    case = SurpriseCase(64, 64, batch=1, criteria=(-1.0, 4.0, 20.0, 20.0), magnitude=0.1, first=100.0, miss=0.5)
    t = surprise_operands(case)
    exact = expected_surprise(case, t)[0, 1:]
    (rank,) = run(surprise_model(t, 100), t)
    assert float(exact.max()) < 6e-8
    # z itself, of magnitude 40 at most, is off by a few units of 2^-19; e^z by as much, relatively.
    assert float((rank[0, 1:] / exact - 1).abs().max()) < 64 * 2.0**-19


OTHER_RUNTIMES = [
    SelectCase(1, 1, 3),
    SelectCase(33, 16, 3, "ties", "ragged"),
    SelectCase(36, 36, 2, "infinite", "all", window=9),
    SelectCase(36, 12, 3, "nan", "left", window=12),
    SelectCase(36, 12, 3, "denormal", "right", threshold=0.0, state=(9, 2)),
]


@pytest.mark.parametrize("case", OTHER_RUNTIMES, ids=str)
def test_the_selections_are_the_same_in_onnxs_evaluator_and_without_optimization(case: SelectCase) -> None:
    t = select_operands(case)
    pairs: list[tuple[onnx.ModelProto, tuple[Tensor, ...]]] = [
        (top_k_model(t, case.window), expected_top_k(t.score, t.valid, case.slots, case.window)),
        (budget_model(t), expected_budget(t)),
    ]
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for model, right in pairs:
        arrays = {value.name: feeds(t)[value.name] for value in model.graph.input}
        unfolded = onnxruntime.InferenceSession(model.SerializeToString(), plain, providers=["CPUExecutionProvider"])
        for runtime in (unfolded, ReferenceEvaluator(model)):
            assert_same([torch.from_numpy(np.asarray(out)) for out in runtime.run(None, arrays)], right)


SABOTAGE = [
    (top_k_body, "equal = And(at_kth, ranked_valid)", "equal = Identity(at_kth)"),
    (top_k_body, "LessOrEqual(place, left)", "Less(place, left)"),
    (top_k_body, "Sub(equal_places, before)", "Identity(equal_places)"),
    (top_k_body, "usable = And(ordered, valid)", "usable = Identity(valid)"),
    (top_k_body, "Where(vanishing, null, finite)", "Identity(finite)"),
    (budget_body, "GreaterOrEqual(canonical, threshold)", "Greater(canonical, threshold)"),
    (budget_body, "Min(least, nought)", "Identity(least)"),
    (budget_body, "Max(wide_room, zero)", "Identity(wide_room)"),
    (budget_body, "Add(wide_through, seen)", "Identity(wide_through)"),
    (budget_body, "Sub(cap, taken_before)", "Identity(cap)"),
    (budget_body, "Min(least_1, least_shifted_2)", "Identity(least_1)"),
]


@functools.cache
def right_answers(seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    t = wide_table(seed)
    return expected_top_k(t.score, t.valid, 20, 12), expected_budget(t)


@pytest.mark.parametrize(("make", "line", "wrong"), SABOTAGE)
def test_a_wrong_line_is_seen(make: Callable[..., str], line: str, wrong: str) -> None:
    t = wide_table(3)
    budget = make is budget_body
    model = budget_model(t) if budget else top_k_model(t, 12)
    model = with_body(model, make(steps(48), opset=OPSET), line, wrong)
    right = right_answers(3)[budget]
    try:
        wrong_out = run(model, t)
    except InvalidArgument as error:
        assert "out of data bounds" in str(error)  # noqa: PT017 - a place beyond the row is one way to be seen
    else:
        assert not all(torch.equal(a, b) for a, b in zip(wrong_out, right, strict=True))


def with_body(model: onnx.ModelProto, text: str, line: str, wrong: str) -> onnx.ModelProto:
    assert line in text
    model.functions[0].CopyFrom(onnx.parser.parse_function(text.replace(line, wrong)))
    return model


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("Where(valid, found_static, first)", "Identity(found_static)"),  # padding's NaN would reach the averages
        ("Slice(rows, one, columns_end, two)", "Slice(rows, zero, tokens, two)"),  # a window that ends one too early
        ("Where(valid, iota, end)", "Where(valid, end, iota)"),
        ("Sub(static, surplus)", "Sub(static, change)"),
        ("Mul(beta_cu, unexpected_change)", "Mul(beta_ce, unexpected_change)"),
        ("Where(valid, found_rank, null)", "Identity(found_rank)"),
    ],
)
def test_a_wrong_line_of_the_surprise_is_seen(line: str, wrong: str) -> None:
    case = SurpriseCase(40, 64, 3, padding="left", window=10)
    t = surprise_operands(case)
    exact = expected_surprise(case, t)
    (rank,) = run(with_body(surprise_model(t, 10), surprise_body(opset=OPSET), line, wrong), t)
    allowed = tolerance("float32", "layer").allowed(float(exact.max()))
    assert not float((rank.double() - exact).abs().max()) <= allowed  # NaN counts as wrong


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("Where(mask, wide_rows, wide_held)", "Identity(wide_rows)"),
        ("Expand(row_column, column_shape)", "Mul(column, zero)"),  # every row into the first
    ],
)
def test_a_wrong_line_of_the_scatter_is_seen(line: str, wrong: str) -> None:
    t = move_operands(MoveCase(9, 4, 3, (5,)))
    (out,) = run(with_body(scatter_model(t), scatter_body(opset=OPSET, widen=False), line, wrong), t)
    assert not torch.equal(out, expected_moves(t)[1])


def test_l_reaches_over_the_tokens_and_no_further() -> None:
    assert [steps(n) for n in (1, 2, 3, 4, 5, 512, 513)] == [1, 1, 2, 2, 3, 9, 10]
    assert all(2 ** steps(n) >= n and (steps(n) == 1 or 2 ** (steps(n) - 1) < n) for n in range(1, 3000))
    assert math.ceil(math.log2(16384)) == steps(16384)
