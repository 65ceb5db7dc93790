"""The routing kernels against the shared case table, computed by Triton's interpreter on the CPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from depthwire.errors import UsageError
from depthwire.runtime.triton.routing_launch import gather_tokens
from depthwire.runtime.triton.routing_spec import RoutingSpec, budget_block, select_block
from depthwire.runtime.triton.routing_traffic import routing_traffic
from tests.conftest import ROOT
from tests.runtime.triton import interpret_routing as interpreted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux only")


@functools.cache
def results() -> dict[str, dict[str, Any]]:
    """Run all cases in one process, which triton interprets; one JSON object a case."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.runtime.triton.interpret_routing"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = {line.pop("case"): line for line in lines}
    assert len(found) == len(lines)
    return found


def chosen(prefix: str, count: int) -> dict[str, dict[str, Any]]:
    """Return the results whose names begin so; there must be as many as that."""
    found = {name: result for name, result in results().items() if name.startswith(prefix)}
    assert len(found) == count
    return found


@pytest.mark.parametrize(
    ("prefix", "count"),
    [
        ("select ", len(interpreted.SELECT) + len(interpreted.WINDOWS)),
        ("budget ", len(interpreted.BUDGET) + 10),
        ("gather ", len(interpreted.MOVE) + 1),
        ("scatter ", len(interpreted.MOVE) + 1),
    ],
)
def test_indices_and_moves_are_exact(prefix: str, count: int) -> None:
    assert [name for name, result in chosen(prefix, count).items() if not result["same"]] == []


def test_a_scatter_leaves_its_base_alone_unless_told_otherwise() -> None:
    assert all(result.get("base kept", True) for result in chosen("scatter ", len(interpreted.MOVE) + 1).values())


@pytest.mark.parametrize(
    ("prefix", "count"), [("surprise ", len(interpreted.SURPRISE)), ("attention ", 8), ("slot attention ", 8)]
)
def test_numbers_stay_within_their_budget(prefix: str, count: int) -> None:
    found = chosen(prefix, count)
    assert {name: result for name, result in found.items() if not result["error"] <= result["allowed"]} == {}


@pytest.mark.parametrize(
    ("prefix", "count"),
    [("wrong window ", sum(case.tokens > case.window for case in interpreted.SURPRISE)), ("wrong attention ", 8)],
)
def test_slightly_wrong_kernels_are_found_out(prefix: str, count: int) -> None:
    assert count > 0
    assert all(result["error"] > 2 * result["allowed"] for result in chosen(prefix, count).values())


@pytest.mark.parametrize(
    ("name", "spec", "taken"),
    [
        ("gather", RoutingSpec("gather", row_bytes=96), None),
        ("scatter", RoutingSpec("scatter", row_bytes=96), None),
        ("in place", RoutingSpec("scatter", row_bytes=96), 15),
        ("surprise", RoutingSpec("surprise", width=24, window=8), None),
        ("sums", RoutingSpec("sums", width=24), None),
        ("rank", RoutingSpec("rank", window=8), None),
        ("select", RoutingSpec("select", block=64), None),
        ("attention", RoutingSpec("attention", width=32, dtype="float16", kv_heads=2, group=2), None),
    ],
)
def test_the_bytes_that_a_kernel_moves_are_those_that_are_stated(
    name: str, spec: RoutingSpec, taken: int | None
) -> None:
    counted, stated = results()[f"bytes {name}"], routing_traffic(spec, 40, 20, taken=taken)
    assert counted["stores"] == 2 * stated.stores
    if name != "rank":
        assert (counted["rows"], counted["parameters"]) == (2 * stated.sources, 2 * stated.parameters)
    else:  # the average's reads and the other ones are of the same tensor
        tile = spec.launch.tile
        per_row = stated.sources + stated.parameters + 4 * -(-40 // tile)  # the first token's, in each tile
        assert counted["rows"] == 2 * per_row


def test_what_is_moved_is_what_must_be() -> None:
    for spec in (
        RoutingSpec("gather", row_bytes=1152),
        RoutingSpec("scatter", row_bytes=4),
        RoutingSpec("sums", width=77),
    ):
        assert routing_traffic(spec, 2048, 512).ratio == 1
    # One launch of the surprise reads the window's ``delta`` again for each tile of 64 tokens.
    assert 1.7 < routing_traffic(RoutingSpec("surprise", width=576, window=100), 2048, 512).ratio < 1.8
    assert routing_traffic(RoutingSpec("budget"), 4096, 64).ratio > 1.9  # a long row is scanned twice


@pytest.mark.parametrize(
    ("levels", "window", "block", "budget"),
    [(1, 0, 32, 32), (9, 0, 512, 512), (11, 0, 2048, 2048), (12, 0, 4096, 0), (16, 4096, 4096, 0), (7, 100, 128, 128)],
)
def test_a_block_holds_the_row_or_the_window(levels: int, window: int, block: int, budget: int) -> None:
    assert (select_block(levels, window), budget_block(levels)) == (block, budget)


@pytest.mark.parametrize(
    ("wrong", "at"),
    [
        ({"kind": "select", "block": 48}, "block"),
        ({"kind": "select", "block": 32768}, "block"),
        ({"kind": "select", "block": 64, "window": 65}, "window"),
        ({"kind": "budget", "block": 4096}, "block"),
        ({"kind": "rank"}, "window"),
        ({"kind": "gather"}, "row_bytes"),
        ({"kind": "sums"}, "width"),
        ({"kind": "sums", "width": 8, "dtype": "float64"}, "dtype"),
        ({"kind": "attention", "width": 129, "kv_heads": 1, "group": 1}, "width"),
        ({"kind": "attention", "width": 64, "kv_heads": 1}, "group"),
    ],
)
def test_what_no_kernel_computes_is_refused(wrong: dict[str, Any], at: str) -> None:
    with pytest.raises(UsageError) as caught:
        RoutingSpec(**wrong)
    assert (caught.value.code, caught.value.at) == ("triton.bad-spec", at)


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"triton\.bad-operands") as caught:
        gather_tokens(torch.ones(2, 4, 8), torch.zeros(2, 4, dtype=torch.int64)[:, ::2])
    assert caught.value.at == "index"
    with pytest.raises(UsageError, match=r"triton\.bad-operands"):
        gather_tokens(torch.ones(1, 4, 8), torch.zeros(1, 2, dtype=torch.int32))
