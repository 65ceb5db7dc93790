"""The routing case table, and malformed calls, with the library built with the sanitizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch

from depthwire.runtime.native import ops_entry
from tests.routing_cases import (
    BUDGET_CASES,
    MOVE_CASES,
    SELECT_CASES,
    SURPRISE_CASES,
    WINDOW_CASES,
    expected_budget,
    expected_moves,
    expected_top_k,
    move_operands,
    select_operands,
    surprise_operands,
)
from tests.runtime.native.routing_node import (
    RoutingNode,
    budget_node,
    move_nodes,
    routing_model,
    run_node,
    select_node,
    surprise_node,
)
from tests.runtime.native.test_routing_malformed import SPOILED, good
from tests.runtime.native.test_sanitizers import outputs, pytestmark, run_folder

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["pytestmark"]  # skipped where the sanitized library is not built


def write(folder: Path, name: str, node: RoutingNode, **model: bool) -> None:
    onnx.save(routing_model(node, **model), folder / f"{name}.onnx")
    np.savez(folder / f"{name}.npz", **node.feeds())  # type: ignore[arg-type]
    (folder / f"{name}.ops").write_text(ops_entry([node.op_type]), encoding="utf-8")


def test_the_case_table_is_clean(tmp_path: Path) -> None:
    nodes: list[tuple[RoutingNode, tuple[Tensor, ...]]] = []
    for case in (*SELECT_CASES[::2], *WINDOW_CASES[::2]):
        selection = select_operands(case)
        chosen = expected_top_k(selection.score, selection.valid, case.slots, case.window)
        nodes.append((select_node(selection, window=case.window), chosen))
    for case in BUDGET_CASES[::2]:
        selection = select_operands(case)
        nodes.append((budget_node(selection), expected_budget(selection)))
    for move in MOVE_CASES[::2]:
        moved = move_operands(move)
        nodes += [(node, (value,)) for node, value in zip(move_nodes(moved), expected_moves(moved), strict=True)]
    for surprise in SURPRISE_CASES:
        node = surprise_node(surprise_operands(surprise), surprise.window)
        nodes.append((node, tuple(run_node(node).values())))
    for number, (node, _) in enumerate(nodes):
        write(tmp_path, f"case{number}", node, owned=number % 2 == 0)
    run_folder(tmp_path)
    for number, (node, wanted) in enumerate(nodes):
        for found, value in zip(outputs(tmp_path, f"case{number}"), wanted, strict=True):
            # The sanitized build may contract other products than the optimised one.
            rtol = 1e-5 if node.op_type == "SurpriseScore" else 0
            torch.testing.assert_close(found, value.double(), rtol=rtol, atol=rtol * 1e-2, equal_nan=True)


def test_malformed_calls_are_clean(tmp_path: Path) -> None:
    for number, spoiled in enumerate(SPOILED):
        node = good(spoiled.op_type)
        node.inputs[spoiled.place] = spoiled.tensor
        write(tmp_path, f"call{number}", node, dynamic=True)
    run_folder(tmp_path)
    for number, spoiled in enumerate(SPOILED):
        error = (tmp_path / f"call{number}.error").read_text(encoding="utf-8")
        assert f"depthwire {good(spoiled.op_type).op_type}: input" in error
