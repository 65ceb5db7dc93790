"""Routing calls that cannot be meant: each is an error of ONNX Runtime that names the operator and the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import onnxruntime
import pytest
import torch

from depthwire.runtime.native import OPS_ENTRY, custom_ops_library
from tests.routing_cases import (
    MoveCase,
    SelectCase,
    SurpriseCase,
    move_operands,
    select_operands,
    surprise_operands,
)
from tests.runtime.native.routing_node import (
    RoutingNode,
    budget_node,
    move_nodes,
    run_node,
    select_node,
    surprise_node,
)

if TYPE_CHECKING:
    from torch import Tensor


class Spoiled(NamedTuple):
    """An input that is replaced, and what the error says of it."""

    op_type: str
    place: str
    tensor: Tensor
    message: str


def good(op_type: str) -> RoutingNode:
    """A call that runs: B 2, T 12, K 4, width 5."""
    operands = select_operands(SelectCase(12, 4, 2))
    nodes = [
        select_node(operands),
        budget_node(operands),
        *move_nodes(move_operands(MoveCase(12, 4, 2, (5,)))),
        surprise_node(surprise_operands(SurpriseCase(12, 5)), 3),
    ]
    return next(node for node in nodes if node.op_type.partition("_")[0] == op_type)


def f32(*shape: int) -> Tensor:
    return torch.zeros(shape)


def i64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def bits(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def index_with(row: int, slot: int, value: int) -> Tensor:
    index = torch.arange(4).repeat(2, 1)
    index[row, slot] = value
    return index


SPOILED = [
    Spoiled("SelectTokens", "score", f32(12), r"'score' is float \[12\], wanted float or double \[B, T\]"),
    Spoiled("SelectTokens", "score", f32(2, 12).half(), r"'score' is float16 \[2, 12\], wanted float or double"),
    Spoiled("SelectTokens", "valid", bits(2, 11), r"'valid' is bool \[2, 11\], wanted bool \[2, 12\]"),
    Spoiled("SelectTokens", "valid", f32(2, 12), r"'valid' is float \[2, 12\], wanted bool \[2, 12\]"),
    Spoiled(
        "SelectTokens", "slots", torch.arange(13), r"'slots' is int64 \[13\], wanted int64 \[K\] with K from 1 to 12"
    ),
    Spoiled("SelectTokens", "slots", i64(), r"'slots' is int64 \[0\], wanted int64 \[K\] with K from 1 to 12"),
    Spoiled("SelectTokens", "slots", i64(0, 1).int(), r"'slots' is int32 \[2\], wanted int64 \[K\]"),
    Spoiled("SelectTokens", "slots", i64(4)[0], r"'slots' is int64 \[\], wanted int64 \[K\]"),
    Spoiled("SelectTokensBudget", "threshold", f32(2), r"'threshold' is float \[2\], wanted float \[\] or \[1\]"),
    Spoiled("SelectTokensBudget", "threshold", f32().double(), r"'threshold' is double \[\], wanted float \[\]"),
    Spoiled("SelectTokensBudget", "budget", i64(1, 2), r"'budget' is int64 \[2\], wanted int64 \[3\]"),
    Spoiled("SelectTokensBudget", "budget", i64(1, 0, 0), r"'budget' begins with 1 and 0, wanted a numerator"),
    Spoiled("SelectTokensBudget", "budget", i64(-1, 2, 0), r"'budget' begins with -1 and 2, wanted a numerator"),
    Spoiled("SelectTokensBudget", "state", i64(0, 0), r"'state' is int64 \[2\], wanted int64 \[2, 2\]"),
    Spoiled("SelectTokensBudget", "state", i64(0, 0, 0, -3).reshape(2, 2), r"'state' holds -3, wanted counts"),
    Spoiled("SelectTokensBudget", "state", i64(2**63 - 1, 0, 0, 0).reshape(2, 2), r"'state' holds 9223372036854775807"),
    Spoiled("SelectTokensBudget", "slots", torch.arange(13), r"'slots' is int64 \[13\], wanted int64 \[K\]"),
    Spoiled("GatherTokens", "x", f32(2), r"'x' is float \[2\], wanted \[B, T, \.\.\.\]"),
    Spoiled("GatherTokens", "index", torch.zeros(3, 4).long(), r"'index' is int64 \[3, 4\], wanted int64 \[2, K\]"),
    Spoiled("GatherTokens", "index", i64(1, 2), r"'index' is int64 \[2\], wanted int64 \[2, K\]"),
    Spoiled("GatherTokens", "index", torch.zeros(2, 4).int(), r"'index' is int32 \[2, 4\], wanted int64 \[2, K\]"),
    Spoiled(
        "GatherTokens", "index", index_with(1, 2, 12), r"'index' is 12 at \[1, 2\], wanted a token of 'x', which has 12"
    ),
    Spoiled("GatherTokens", "index", index_with(0, 3, -1), r"'index' is -1 at \[0, 3\], wanted a token of 'x'"),
    Spoiled("GatherTokens", "index", index_with(0, 0, 2**40), r"'index' is 1099511627776 at \[0, 0\]"),
    Spoiled("ScatterTokens", "base", f32(7), r"'base' is float \[7\], wanted \[B, T, \.\.\.\]"),
    Spoiled("ScatterTokens", "base", f32(2, 3, 5), r"'index' is int64 \[2, 4\], wanted at most 3 slots"),
    Spoiled("ScatterTokens", "index", index_with(1, 0, 12), r"'index' is 12 at \[1, 0\], wanted a token of 'base'"),
    Spoiled(
        "ScatterTokens", "index", index_with(0, 2, 1), r"'index' is 1 at \[0, 2\], as in an earlier slot of the row"
    ),
    Spoiled("ScatterTokens", "taken", bits(2, 3), r"'taken' is bool \[2, 3\], wanted bool \[2, 4\]"),
    Spoiled("ScatterTokens", "taken", f32(2, 4), r"'taken' is float \[2, 4\], wanted bool \[2, 4\]"),
    Spoiled("ScatterTokens", "rows", f32(2, 4, 6), r"'rows' is float \[2, 4, 6\], wanted float \[2, 4, 5\], as 'base'"),
    Spoiled("ScatterTokens", "rows", f32(2, 4), r"'rows' is float \[2, 4\], wanted float \[2, 4, 5\]"),
    Spoiled("ScatterTokens", "rows", f32(2, 4, 5).half(), r"'rows' is float16 \[2, 4, 5\], wanted float \[2, 4, 5\]"),
    Spoiled("SurpriseScore", "delta", f32(2, 12), r"'delta' is float \[2, 12\], wanted float, float16, bfloat16 or"),
    Spoiled("SurpriseScore", "delta", f32(2, 12, 0), r"'delta' is float \[2, 12, 0\], wanted .* with a width"),
    Spoiled("SurpriseScore", "delta", torch.zeros(2, 12, 5).long(), r"'delta' is int64 \[2, 12, 5\], wanted float,"),
    Spoiled("SurpriseScore", "prior", f32(2, 12, 6), r"'prior' is float \[2, 12, 6\], wanted float \[2, 12, 5\]"),
    Spoiled("SurpriseScore", "prior", f32(2, 12, 5).double(), r"'prior' is double \[2, 12, 5\], wanted float"),
    Spoiled("SurpriseScore", "criteria", f32(3), r"'criteria' is float \[3\], wanted float \[4\]"),
    Spoiled("SurpriseScore", "criteria", i64(1, 2, 3, 4), r"'criteria' is int64 \[4\], wanted float \[4\]"),
    Spoiled("SurpriseScore", "valid", bits(2, 13), r"'valid' is bool \[2, 13\], wanted bool \[2, 12\]"),
]


@pytest.mark.parametrize("spoiled", SPOILED, ids=lambda one: f"{one.op_type}-{one.message[:28]}")
def test_an_input_that_cannot_be_meant(spoiled: Spoiled) -> None:
    node = good(spoiled.op_type)
    run_node(node)
    node.inputs[spoiled.place] = spoiled.tensor
    with pytest.raises(Exception, match=rf"depthwire {node.op_type}: input {spoiled.message}"):
        run_node(node, dynamic=True)


@pytest.mark.parametrize(
    ("op_type", "window", "message"),
    [
        ("SelectTokens", 5, "attribute 'window' is 5, which does not divide input 'score'"),
        ("SelectTokens", 13, "attribute 'window' is 13, which does not divide input 'score'"),
        ("SelectTokens", 2, r"input 'slots' is int64 \[4\], wanted a number of slots that 6 windows share evenly"),
        ("SelectTokens", -4, "attribute 'window' is -4, wanted a number of tokens, or 0 for no windows"),
        ("SurpriseScore", 0, r"attribute 'window' is 0, wanted from 1 to 2\^31 tokens"),
        ("SurpriseScore", -1, r"attribute 'window' is -1, wanted from 1 to 2\^31 tokens"),
        ("SurpriseScore", 2**62, r"attribute 'window' is 4611686018427387904, wanted from 1 to 2\^31 tokens"),
    ],
)
def test_a_window_that_cannot_be_meant(op_type: str, window: int, message: str) -> None:
    node = good(op_type)
    node.attributes["window"] = window
    with pytest.raises(Exception, match=f"depthwire {node.op_type}: {message}"):
        run_node(node)


@pytest.mark.parametrize("op_type", ["SelectTokens", "SelectTokensBudget", "GatherTokens", "ScatterTokens"])
def test_an_input_that_is_missing(op_type: str) -> None:
    node = good(op_type)
    node.inputs.popitem()
    with pytest.raises(Exception, match=rf"{node.op_type}.* has input size {len(node.inputs)} not in range"):
        run_node(node)


def test_slots_that_are_not_taken_may_point_anywhere() -> None:
    node = good("ScatterTokens")
    fine = run_node(node)["out"]
    node.inputs["index"] = node.inputs["index"].masked_fill(~node.inputs["taken"], 99)
    assert not bool(node.inputs["taken"].all())
    assert torch.equal(run_node(node)["out"], fine)


@pytest.mark.parametrize(
    "op_type", ["SelectTokens", "SelectTokensBudget", "GatherTokens", "ScatterTokens", "SurpriseScore"]
)
def test_no_sequences_are_no_error(op_type: str) -> None:
    node = good(op_type)
    batched = {"score", "valid", "state", "x", "base", "index", "taken", "rows", "delta", "prior"}
    node.inputs = {name: tensor[:0] if name in batched else tensor for name, tensor in node.inputs.items()}
    assert all(value.shape[0] == 0 for value in run_node(node, dynamic=True).values())


def test_rows_without_numbers_are_no_error() -> None:
    gather, scatter = move_nodes(move_operands(MoveCase(12, 4, 2, (0, 3))))
    assert run_node(gather)["out"].shape == (2, 4, 0, 3)
    assert run_node(scatter)["out"].shape == (2, 12, 0, 3)


@pytest.mark.parametrize(
    "entry",
    ["SelectTokens", "SelectTokens_0", "SelectTokens_30-32", "GatherTokens_3", "SelectTokensBudget_x", "Surprise"],
)
def test_a_name_that_is_no_operator_is_refused(entry: str) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(OPS_ENTRY, f"GatherTokens,{entry}")
    with pytest.raises(Exception, match=f"no operator '{entry}'"):
        options.register_custom_ops_library(custom_ops_library())
