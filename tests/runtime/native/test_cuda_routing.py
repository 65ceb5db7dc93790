"""The CUDA provider's routing kernels as far as they go without a GPU: the file's kernels, and their launches.

No kernel runs here: as in ``test_cuda``, a stand-in for the driver writes down what it was given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch
from onnx import TensorProto

from depthwire.errors import BuildError, UsageError
from depthwire.runtime.triton.bundle import Entry, kernels_of, write_bundle
from depthwire.runtime.triton.spec import KernelSpec
from tests.conftest import ROOT
from tests.runtime.native.cuda_routing_session import BATCH, SLOTS, TOKENS, node_of
from tests.runtime.native.routing_node import RoutingNode, routing_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux only")

# The first bytes of what a launch points to; a launch for each kernel of a node.
VALID, TAKEN, TWO, FOUR, INDEX = "01010001", "00010101", "40004000", "44004400", "00000007"
NODES: dict[str, dict[str, str]] = {
    "SelectTokens_6": {"SelectTokens-b64-w0": f"3fc00000 {VALID} out0 out1 #40 #20 null null"},
    "SelectTokensBudget_6": {
        "SelectTokensBudget-b64": f"3fc00000 {VALID} 3e800000 00000003 00000009 out0 out1 out2 #40 #20 null null"
    },
    "GatherTokens": {"GatherTokens-r24": f"{TWO} {INDEX} out0 #40 #20 null null"},
    "ScatterTokens": {"ScatterTokens-r24": f"40000000 {INDEX} {TAKEN} 40800000 out0 #40 #20 null null"},
    # What the first launch leaves is what the second begins with.
    "SurpriseScore": {
        "SurpriseScore-sums-d24-fp16": f"{TWO} {FOUR} {VALID} out0 #40 null null",
        "SurpriseScore-rank-w8-fp32": f"42280000 3f000000 {VALID} out0 #40 null null",
    },
}
SHAPES = {
    "SelectTokens_6": [[BATCH, SLOTS]] * 2,
    "SelectTokensBudget_6": [[BATCH, SLOTS], [BATCH, SLOTS], [BATCH, 2]],
    "GatherTokens": [[BATCH, SLOTS, 3, 4]],
    "ScatterTokens": [[BATCH, TOKENS, 6]],
    "SurpriseScore": [[BATCH, TOKENS]],
}
ITEMS = {"GatherTokens": SLOTS, "ScatterTokens": TOKENS, "SurpriseScore": TOKENS}


def saved(node: RoutingNode, path: Path) -> Path:
    """Write a model of a node."""
    onnx.save(routing_model(node), str(path))
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Entry]]:
    """The kernels of all nodes, as their files ask for them."""
    folder = tmp_path_factory.mktemp("routing")
    specs = [spec for op_type in NODES for spec in kernels_of(saved(node_of(op_type), folder / f"{op_type}.onnx"))]
    assert [spec.key for spec in specs] == [key for keys in NODES.values() for key in keys]
    return folder / "kernels", write_bundle(specs, ["8.6"], folder / "kernels")


def session(probe: Path, folder: Path, op_type: str, **environment: str) -> Any:
    """Run a node in a process of its own."""
    command = [sys.executable, "-m", "tests.runtime.native.cuda_routing_session", str(probe / "probe.so"), str(folder)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": str(probe), "PROBE_OPS": op_type}
    done = subprocess.run(
        [*command, op_type], cwd=ROOT, env={**variables, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("op_type", NODES)
def test_a_launch_gets_the_nodes_tensors_and_numbers(
    op_type: str, probe: Path, bundle: tuple[Path, list[Entry]], tmp_path: Path
) -> None:
    folder, entries = bundle
    by_key = {entry.key: entry for entry in entries}
    first = by_key[next(iter(NODES[op_type]))]
    found = session(
        probe,
        folder,
        op_type,
        PROBE_CC="86",
        PROBE_LOG=str(tmp_path / "log"),
        PROBE_PARAMETERS=str(first.parameters),
        PROBE_OUTPUTS=str(len(SHAPES[op_type])),
        PROBE_NUMBERS="1" if op_type == "SurpriseScore" else "2",
    )
    assert found == {"shapes": SHAPES[op_type]}
    lines = []
    for key, parameters in NODES[op_type].items():
        entry = by_key[key]
        blocks = BATCH * -(-ITEMS.get(op_type, 1) // entry.programs)
        lines.append(f"{entry.symbol} {blocks} 1 1 {entry.threads} {entry.shared} {parameters}")
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_without_a_cubin_that_fits_the_call_is_refused(probe: Path, bundle: tuple[Path, list[Entry]]) -> None:
    found = session(probe, bundle[0], "GatherTokens", PROBE_CC="90")
    assert "depthwire GatherTokens: 'GatherTokens-r24' was compiled for SM86, and this GPU is SM90" in found["error"]


def test_where_no_routing_kernels_are_the_bodies_run(probe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    write_bundle([KernelSpec("AttnResRead_2", 64, "float16", eps=1e-6)], ["8.6"], folder)
    # The operator is not registered; a file with a body would run it, and this one has none.
    assert "GatherTokens" in session(probe, folder, "GatherTokens", PROBE_CC="86")["error"]
    assert "no folder of kernels" not in session(probe, folder, "GatherTokens", PROBE_CC="86")["error"]


def test_rows_and_types_decide_the_kernels(tmp_path: Path) -> None:
    positions = RoutingNode(
        "GatherTokens", {"x": torch.zeros(1, 9, dtype=torch.int64), "index": torch.zeros(1, 3, dtype=torch.int64)}
    )
    windows = node_of("SelectTokens_6")
    windows.attributes["window"] = 20
    long = node_of("SelectTokensBudget_6")
    long.op_type = "SelectTokensBudget_12"
    keys = [[spec.key for spec in kernels_of(saved(node, tmp_path / "m.onnx"))] for node in (positions, windows, long)]
    assert keys == [["GatherTokens-r8"], ["SelectTokens-b32-w20"], ["SelectTokensBudget-b0"]]


def test_scores_in_fp64_have_no_kernel(tmp_path: Path) -> None:
    node = node_of("SelectTokens_6")
    node.inputs["score"] = node.inputs["score"].double()
    with pytest.raises(UsageError, match=r"triton\.bad-spec") as caught:
        kernels_of(saved(node, tmp_path / "m.onnx"))
    assert (caught.value.at, caught.value.got) == ("dtype", "'float64'")


def test_rows_of_an_unknown_width_are_refused(tmp_path: Path) -> None:
    path = saved(node_of("GatherTokens"), tmp_path / "m.onnx")
    model = onnx.load(str(path))
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "d"
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    onnx.save(model, str(path))
    with pytest.raises(BuildError, match=r"triton\.untyped"):
        kernels_of(path)
