"""Every Triton kernel against the shared case table, computed by Triton's interpreter on the CPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from depthwire.runtime.triton.spec import KernelSpec
from depthwire.runtime.triton.traffic import Traffic, traffic
from tests.attn_res_cases import CASES, TWO_PHASE_CASES, Case, TwoPhaseCase
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux only")


@functools.cache
def results() -> dict[str, dict[str, Any]]:
    """Run all cases in one process, which triton interprets; one JSON object a case."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.runtime.triton.interpret"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_read(case: Case) -> None:
    result = results()[str(case)]
    assert result["error"] <= result["allowed"]
    assert result["sum"]


@pytest.mark.parametrize("case", TWO_PHASE_CASES, ids=str)
def test_two_phases(case: TwoPhaseCase) -> None:
    result = results()[str(case)]
    assert result["inter_error"] <= result["inter_allowed"]
    assert result["lse_error"] <= result["lse_allowed"]
    # Phase 1's mean is rounded to the dtype on its way, once more than in a single read.
    assert result["error"] <= 2 * result["allowed"]
    assert result["sum"]


@pytest.mark.parametrize("attribute", ["scale", "last_bias", "eps", "norm_eps"])
def test_a_slightly_wrong_kernel_is_found_out(attribute: str) -> None:
    result = results()[f"wrong {attribute}"]
    assert result["error"] > 10 * result["allowed"]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("n9-d576-float32-norm", KernelSpec("AttnResReadNorm_9", 576, "float32")),
        ("n20-d77-float16-add", KernelSpec("AttnResAddRead_20", 77, "float16")),
        ("n1-d64-float32", KernelSpec("AttnResRead_1", 64, "float32")),
        ("n33-d2048-bfloat16", KernelSpec("AttnResRead_33", 2048, "bfloat16")),
        ("inter", KernelSpec("AttnResInter_7", 2048, "float16", queries=11)),
        ("merge", KernelSpec("AttnResMergeNorm_7", 2048, "float16")),
    ],
)
def test_the_bytes_that_a_kernel_moves_are_those_that_are_stated(name: str, spec: KernelSpec) -> None:
    counted, stated, rows = results()[f"bytes {name}"], traffic(spec), 3
    assert counted["rows"] == rows * stated.sources
    assert counted["stores"] == rows * stated.stores
    assert counted["parameters"] == rows * stated.parameters
    assert counted["most"] == spec.launch.programs


def test_every_read_and_merge_loads_each_source_once() -> None:
    for op_type in ("AttnResRead_129", "AttnResAddUnitReadNorm_9", "AttnResAddMergeNorm_3", "AttnResMerge_0"):
        for width in (64, 77, 576, 7168, 8192):
            assert traffic(KernelSpec(op_type, width, "float16")).ratio == 1
    inter = KernelSpec("AttnResInter_9", 7168, "float16", queries=24)
    row = 7168 * 2
    assert traffic(inter) == Traffic(12 * 9 * row, 24 * 7168 * 4, 24 * (row + 4), 9 * row + 24 * (row + 4))
