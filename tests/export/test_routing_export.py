"""A routed block through the exporter: names, types, bodies, and results in ONNX Runtime and onnx's evaluator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from depthwire.export.to_onnx import to_onnx
from depthwire.ops import gather_tokens, scatter_tokens, select_tokens, select_tokens_budget, surprise_score
from depthwire.program import Program, Source
from depthwire.runtime.tolerances import tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOKENS, WIDTH, SLOTS = 24, 16, 9


class Routed(nn.Module):
    """A block on the selected tokens, by surprise or by a running budget."""

    def __init__(self, *, budget: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.budget_rule = budget
        self.block = nn.Linear(WIDTH, WIDTH)
        self.prior = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("criteria", torch.tensor([0.0247, 1.1, 0.554, 0.437]))
        self.register_buffer("slots", torch.arange(SLOTS))
        self.register_buffer("budget", torch.tensor([1, 3, 1]))
        self.register_buffer("threshold", torch.tensor(1.27))

    def forward(self, x: Tensor, valid: Tensor, state: Tensor) -> Any:
        delta = torch.tanh(x)
        rank = surprise_score(delta, self.prior(x), self.criteria, valid, window=5)
        if self.budget_rule:
            chosen = select_tokens_budget(rank, valid, self.threshold, self.budget, state, self.slots)
            index, taken, state = chosen
        else:
            index, taken = select_tokens(rank, valid, self.slots)
        positions = gather_tokens(torch.arange(TOKENS).expand(2, TOKENS), index)
        rows = gather_tokens(x, index)
        gate = -torch.expm1(-gather_tokens(rank, index)).unsqueeze(-1)
        out = scatter_tokens(x, index, taken, rows + gate * self.block(rows))
        return out, positions, taken, state


def program_of(module: nn.Module) -> Program:
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, :7] = False
    inputs = {
        "x": torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)),
        "valid": valid,
        "state": torch.tensor([[0, 0], [12, 3]]),
    }
    exported = torch.export.export(module.eval(), (), inputs).run_decompositions({})
    return Program(exported, Source("module", "Routed"), inputs, ("out", "positions", "taken_slots", "state_out"))


def feed_of(program: Program) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in program.example_inputs.items()}


def assert_right(actual: Any, expected: Any) -> None:
    out, *exact = (torch.from_numpy(np.asarray(array)) for array in actual)
    want, *want_exact = expected
    assert float((out - want).abs().max()) <= tolerance("float32", "hidden").allowed(float(want.abs().max()))
    for one, other in zip(exact, want_exact, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("budget", "select"), [(False, "SelectTokens_5"), (True, "SelectTokensBudget_5")], ids=["top-k", "budget"]
)
def test_a_routed_block(select: str, *, budget: bool) -> None:
    module = Routed(budget=budget)
    program = program_of(module)
    model = to_onnx(program)
    own = [node.op_type for node in model.graph if node.domain == "depthwire"]
    moves = ["GatherTokens"] * 3 + ["ScatterTokens"]
    assert sorted(own) == sorted(["SurpriseScore", select, *moves])
    assert {name for _, name, _ in model.functions} == set(own)
    types = {value.name: value.dtype for node in model.graph for value in node.outputs if node.domain == "depthwire"}
    assert types["surprise_score"] == ir.DataType.FLOAT
    assert types["positions"] == ir.DataType.INT64
    with torch.no_grad():
        expected = module(**program.example_inputs)
    taken = int(expected[2].sum())
    assert 0 < taken < 2 * SLOTS if budget else taken == 2 * SLOTS

    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {value.name: feed_of(program)[value.name] for value in session.get_inputs()}
    assert_right(session.run(None, feed), expected)
    assert_right(ReferenceEvaluator(proto).run(None, feed), expected)
