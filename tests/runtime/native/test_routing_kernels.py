"""The routing kernels of the library, in ONNX Runtime, against the case table; that they run, and not the bodies."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from depthwire.export.to_onnx import to_onnx
from depthwire.ops import select_tokens, select_tokens_budget
from depthwire.runtime.native import ops_entry
from tests.export.test_routing_export import Routed, feed_of, program_of
from tests.routing_cases import (
    BUDGET_CASES,
    MOVE_CASES,
    SELECT_CASES,
    SURPRISE_CASES,
    WINDOW_CASES,
    MoveCase,
    SelectCase,
    SurpriseCase,
    draw_scores,
    expected_budget,
    expected_moves,
    expected_surprise,
    expected_top_k,
    move_operands,
    select_operands,
    surprise_operands,
)
from tests.runtime.native.one_node import DOMAIN, session_of
from tests.runtime.native.routing_node import (
    RoutingNode,
    budget_node,
    move_nodes,
    routing_model,
    run_node,
    select_node,
    surprise_node,
)


@pytest.mark.parametrize("case", [*SELECT_CASES, *WINDOW_CASES], ids=str)
def test_top_k(case: SelectCase) -> None:
    operands = select_operands(case)
    index, taken = expected_top_k(operands.score, operands.valid, case.slots, case.window)
    found = run_node(select_node(operands, window=case.window))
    assert torch.equal(found["index"], index)
    assert torch.equal(found["taken"], taken)


@pytest.mark.parametrize("case", BUDGET_CASES, ids=str)
def test_running_budget(case: SelectCase) -> None:
    operands = select_operands(case)
    found = run_node(budget_node(operands))
    for name, value in zip(("index", "taken", "state_out"), expected_budget(operands), strict=True):
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("rule", ["top-k", "running budget"])
def test_fp64_scores(rule: str) -> None:
    for scores in ("normal", "nan", "denormal", "infinite", "extreme"):
        case = SelectCase(65, 20, 3, scores, "ragged", threshold=0.25, budget=(1, 3, 1))
        narrow = select_operands(case)
        wide = dataclasses.replace(narrow, score=narrow.score.double(), threshold=narrow.threshold.double()[None])
        nodes = map(select_node if rule == "top-k" else budget_node, (narrow, wide))
        one, other = map(run_node, nodes)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("scores", ["normal", "ties", "infinite", "nan", "denormal", "extreme"])
def test_ten_thousand_rows_are_torchs(scores: str) -> None:
    """Both rules over rows of all kinds and capacities, against the torch operators."""
    generator = torch.Generator().manual_seed(5)
    for slots in (1, 17, 32):
        score = draw_scores(scores, 560, 64, generator)
        case = SelectCase(64, slots, 560, padding="scattered", threshold=-0.25, budget=(slots, 64, 1))
        operands = dataclasses.replace(select_operands(case, seed=slots), score=score)
        found = run_node(select_node(operands), threads=2)
        index, taken = select_tokens(score, operands.valid, operands.slots)
        assert torch.equal(found["index"], index)
        assert torch.equal(found["taken"], taken)
        found = run_node(budget_node(operands), threads=2)
        wanted = select_tokens_budget(
            score, operands.valid, operands.threshold, operands.budget, operands.state, operands.slots
        )
        for name, value in zip(("index", "taken", "state_out"), wanted, strict=True):
            assert torch.equal(found[name], value)


def test_products_beyond_64_bits_are_exact() -> None:
    # The share is 1 + 2^-62, so the budget after 2^61 + p tokens is 2^61 + p, less 2^61 by the margin.
    case = SelectCase(40, 40, 1, threshold=-math.inf)
    budget, state = torch.tensor([2**62 + 1, 2**62, -(2**61)]), torch.tensor([[2**61, 5]])
    found = run_node(budget_node(dataclasses.replace(select_operands(case), budget=budget, state=state)))
    # 5 are taken already, so the sixth token is the first that the budget has a place for.
    assert found["index"][0, :35].tolist() == list(range(5, 40))
    assert found["state_out"].tolist() == [[2**61 + 40, 40]]


@pytest.mark.parametrize("owned", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("case", MOVE_CASES, ids=str)
def test_moves(case: MoveCase, *, owned: bool) -> None:
    operands = move_operands(case)
    for node, wanted in zip(move_nodes(operands), expected_moves(operands), strict=True):
        found = run_node(node, owned=owned)["out"]
        exact = wanted.float() if wanted.dtype == torch.bfloat16 else wanted
        assert found.dtype == exact.dtype
        torch.testing.assert_close(found, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", SURPRISE_CASES, ids=str)
def test_surprise(case: SurpriseCase) -> None:
    operands = surprise_operands(case)
    exact = expected_surprise(case, operands)
    rank = run_node(surprise_node(operands, case.window), threads=2)["rank"]
    assert rank.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    # Sums of `width` squares in fp32, lane by lane, a rounding for each term of the formula; the moving average is
    # taken in fp64.
    allowed = 4 * case.width**0.5 * 2.0**-24 * float(exact.max())
    assert float((rank.double() - exact).abs().max()) <= allowed
    assert not rank[~operands.valid].any()


def test_a_small_rank_is_exact_relative_to_itself() -> None:
    """Where both criteria are far below zero the rank is a sum of small exponentials, which still order tokens."""
    case = SurpriseCase(512, 64, 1, criteria=(-1.0, 1.1, 8.0, 2.0), magnitude=3.0, miss=1.5)
    operands = surprise_operands(case)
    exact = expected_surprise(case, operands)
    rank = run_node(surprise_node(operands, case.window))["rank"].double()
    assert float(exact.min()) < 1e-6
    # z, a difference of means up to 30, is good to some 1e-5; e^z is so relative to itself.
    torch.testing.assert_close(rank, exact, rtol=2e-4, atol=1e-37)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_no_number_ends_with_its_window(poison: float) -> None:
    case = SurpriseCase(250, 64, 2, window=20)
    operands = surprise_operands(case)
    clean = run_node(surprise_node(operands, 20))["rank"]
    operands.delta[0, 30, 7] = poison
    found = run_node(surprise_node(operands, 20))["rank"]
    touched = torch.zeros(2, 250, dtype=torch.bool)
    touched[0, 30:50] = True
    assert torch.equal(found[~touched], clean[~touched])
    assert bool(found[0, 30].isnan())
    assert not bool((found == clean)[touched].any())


def test_threads_change_no_bit() -> None:
    surprise = surprise_node(surprise_operands(SurpriseCase(1500, 576, 2)), 100)
    _, scatter = move_nodes(move_operands(MoveCase(1500, 700, 2, (576,))))
    gather, _ = move_nodes(move_operands(MoveCase(3000, 2999, 2, (400,), torch.float16)))
    select = select_node(select_operands(SelectCase(2048, 1000, 40, "ties", "ragged")))
    for node in (surprise, scatter, gather, select):
        one, two, three = (run_node(node, threads=threads) for threads in (1, 2, 3))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(three[name], value, rtol=0, atol=0, equal_nan=True)


def every_node() -> list[RoutingNode]:
    operands = select_operands(SelectCase(12, 4, 2))
    moves = move_nodes(move_operands(MoveCase(12, 4, 2, (5,))))
    surprise = surprise_node(surprise_operands(SurpriseCase(12, 5)), 3)
    return [select_node(operands), budget_node(operands), *moves, surprise]


@pytest.mark.parametrize("node", every_node(), ids=lambda node: node.op_type)
def test_symbolic_axes(node: RoutingNode) -> None:
    fixed, dynamic = run_node(node), run_node(node, dynamic=True)
    for name, value in fixed.items():
        torch.testing.assert_close(dynamic[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("node", every_node(), ids=lambda node: node.op_type)
def test_the_kernel_runs_and_not_the_body(node: RoutingNode, tmp_path: Path) -> None:
    model = routing_model(node)
    wrong = [helper.make_node("Identity", [next(iter(node.inputs))], [name]) for name in node.outputs]
    casts = {"index": TensorProto.INT64, "taken": TensorProto.BOOL, "state_out": TensorProto.INT64}
    for body in wrong:
        if body.output[0] in casts:
            body.op_type = "Cast"
            body.attribute.append(helper.make_attribute("to", casts[body.output[0]]))
    opsets = [helper.make_opsetid("", 23)]
    names = list(node.inputs)
    model.functions.append(
        helper.make_function(DOMAIN, node.op_type, names, list(node.outputs), wrong, opsets, list(node.attributes))
    )
    session = session_of(model, profile=str(tmp_path / "kernel"))
    found = session.run(None, node.feeds())
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = {event["args"]["op_name"] for event in events if event.get("cat") == "Node"}
    assert node.op_type in ran
    assert not {"Identity", "Cast"} & ran
    for name, value in run_node(node).items():
        np.testing.assert_array_equal(found[node.outputs.index(name)], value.numpy())


def test_memory_that_is_used_again_changes_nothing() -> None:
    """A chain of scatters, each into the result before it, of which only the last is kept or all are."""
    cases = [move_operands(MoveCase(300, 120, 2, (64,)), seed=seed) for seed in range(5)]
    feeds = {"base": cases[0].base.numpy()}
    nodes = [helper.make_node("Concat", ["base"], ["out0"], axis=0)]
    for number, operands in enumerate(cases, 1):
        parts = {"index": operands.index, "taken": operands.taken, "rows": operands.rows}
        feeds |= {f"{name}{number}": value.numpy() for name, value in parts.items()}
        inputs = [f"out{number - 1}", *(f"{name}{number}" for name in parts)]
        nodes.append(helper.make_node("ScatterTokens", inputs, [f"out{number}"], domain=DOMAIN))
    kinds = {"int64": TensorProto.INT64, "bool": TensorProto.BOOL, "float32": TensorProto.FLOAT}
    values = [
        helper.make_tensor_value_info(name, kinds[str(array.dtype)], array.shape) for name, array in feeds.items()
    ]

    def run(names: list[str]) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
        graph = helper.make_graph(nodes, "chain", values, outputs)
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return dict(zip(names, session_of(model, threads=2).run(names, feeds), strict=True))

    every = run([f"out{number}" for number in range(6)])
    expected = cases[0].base
    for number, operands in enumerate(cases, 1):
        _, expected = expected_moves(dataclasses.replace(operands, base=expected))
        np.testing.assert_array_equal(every[f"out{number}"], expected.numpy())
    np.testing.assert_array_equal(run(["out5"])["out5"], expected.numpy())


@pytest.mark.parametrize("budget", [False, True], ids=["top-k", "budget"])
def test_an_exported_block_runs_its_kernels(*, budget: bool, tmp_path: Path) -> None:
    program = program_of(Routed(budget=budget))
    model = ir.to_proto(to_onnx(program))
    feeds = feed_of(program)
    session = session_of(model, threads=2, profile=str(tmp_path / "kernels"))
    fused = session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = {event["args"]["op_name"] for event in events if event.get("cat") == "Node"}
    assert {node.op_type for node in model.graph.node if node.domain == DOMAIN} <= ran
    assert not {"TopK", "ScatterND", "GatherND", "ReduceMean"} & ran
    with torch.no_grad():
        expected = program.exported.module()(**program.example_inputs)
    for found, value in zip(fused, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), value, rtol=1e-5, atol=1e-5)


def test_names_of_a_model() -> None:
    names = ["depthwire::SelectTokens_9", "SelectTokens_10", "GatherTokens", "SelectTokensBudget_3", "a::SurpriseScore"]
    assert ops_entry(names) == "SelectTokens_9-10,SelectTokensBudget_3,GatherTokens,SurpriseScore"
    assert ops_entry(["SelectTokens", "GatherTokens_3", "AttnResRead_2"]) == "AttnResRead_2"
