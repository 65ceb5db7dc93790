"""Thresholds, budgets and counts as inputs with defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from depthwire.errors import UsageError
from depthwire.export.to_onnx import to_onnx
from depthwire.ops import select_tokens_budget
from depthwire.passes.route_tokens import THRESHOLDS
from depthwire.runtime.tolerances import tolerance
from tests.routed_tiny import BATCH, ROUTED, TOKENS, feed, routed

if TYPE_CHECKING:
    from depthwire.program import Program

INPUTS = {"route_thresholds": [2], "route_budgets": [2, 3], "route_states": [2, BATCH, 2]}


def session_of(model: ir.Model, *more: str) -> onnxruntime.InferenceSession:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in more)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def logits_of(program: Program) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = program.module()(torch.from_numpy(feed()["input_ids"]))
    return out


def with_thresholds(values: list[float]) -> Program:
    """Return the program with other thresholds in its own table."""
    changed = routed()
    changed.exported.constants[THRESHOLDS] = torch.tensor(values)
    return changed


@pytest.fixture(scope="module")
def program() -> Program:
    return routed()


def assert_close(actual: Any, expected: torch.Tensor) -> None:
    difference = float((torch.from_numpy(actual) - expected).abs().max())
    assert difference <= tolerance("float32", "logits").allowed(float(expected.abs().max()))


def test_the_tables_are_inputs_that_nobody_must_give(program: Program) -> None:
    session = session_of(to_onnx(program))
    assert [value.name for value in session.get_inputs()] == ["input_ids"]
    assert {value.name: value.shape for value in session.get_overridable_initializers()} == INPUTS
    (logits,) = session.run(["logits"], feed())
    assert_close(logits, logits_of(program))


def test_a_moved_threshold_moves_the_selection_as_in_torch(program: Program) -> None:
    model = to_onnx(program)
    taken = [str(node.outputs[1].name) for node in model.graph if node.op_type.startswith("SelectTokensBudget")]
    session = session_of(model, *taken)
    counts = []
    for values in ([0.0, 0.0], [-np.inf, 0.3], [0.8, -np.inf]):
        moved = {**feed(), "route_thresholds": np.array(values, np.float32)}
        logits, *bits = session.run(["logits", *taken], moved)
        counts.append([int(row.sum()) for row in bits])
        assert_close(logits, logits_of(with_thresholds(values)))
    assert len({tuple(row) for row in counts}) == 3, counts
    assert counts[1][0] == counts[2][1] == BATCH * (TOKENS // 2 + 1)  # all ask: the budget gives what it has


def test_carried_counts_make_two_chunks_select_as_the_whole(program: Program) -> None:
    model = to_onnx(program, carry=True)
    selects = [node for node in model.graph if node.op_type.startswith("SelectTokensBudget")]
    scores = [value.name or "" for node in selects for value in node.inputs[:1] if value is not None]
    names = [str(value.name) for node in selects for value in node.outputs[:2]]
    session = session_of(model, *scores, *names)
    assert [value.name for value in session.get_outputs()][:2] == ["logits", "route_states_out"]
    states = np.zeros((2, BATCH, 2), np.int64)
    seen: list[list[Any]] = []
    for seed in (1, 2):
        given = {**feed(seed), "route_states": states, "route_budgets": np.array([[1, 3, 1]] * 2)}
        states, *rest = session.run(["route_states_out", *scores, *names], given)
        seen.append(rest)
    for unit, _ in enumerate(ROUTED):
        score = torch.from_numpy(np.concatenate([part[unit] for part in seen], axis=1))
        valid = torch.ones(score.shape, dtype=torch.bool)
        slots, zeros = torch.arange(2 * TOKENS), torch.zeros(BATCH, 2, dtype=torch.int64)
        index, bits, after = select_tokens_budget(
            score, valid, torch.tensor(0.0), torch.tensor([1, 3, 1]), zeros, slots
        )
        for row in range(BATCH):
            whole = index[row][bits[row]].tolist()
            parts = []
            for chunk, part in enumerate(seen):
                at, took = part[2 + 2 * unit], part[3 + 2 * unit]
                parts += (at[row][took[row]] + chunk * TOKENS).tolist()
            assert parts == whole
        assert torch.equal(torch.from_numpy(states[unit]), after)
        assert states[unit, :, 0].tolist() == [2 * TOKENS] * BATCH


def test_a_selection_of_the_best_has_no_counts() -> None:
    top_k = routed(rule="top-k")
    assert [value.name for value in to_onnx(top_k).graph.inputs] == ["input_ids"]
    with pytest.raises(UsageError) as raised:
        to_onnx(top_k, carry=True)
    assert raised.value.code == "route.carry"
