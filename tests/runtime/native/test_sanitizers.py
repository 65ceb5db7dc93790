"""The case table, and malformed calls, with the library built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from depthwire.runtime.native import ops_entry
from tests.attn_res_cases import CASES, TWO_PHASE_CASES, allowed, expected, operands, two_phase_operands
from tests.runtime.native.one_node import DOMAIN, Node, model_of, read_node, two_phase_nodes
from tests.runtime.native.test_malformed import CASE, READS

ROOT = Path(__file__).resolve().parents[3]
LIBRARY = ROOT / ".cache/native/asan/libdepthwire_ort.so"

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="not built: make native-asan")


def write(folder: Path, name: str, nodes: list[Node], *, dynamic: bool = False) -> None:
    model = model_of(nodes, dynamic=dynamic)
    feeds = {key: tensor.float().numpy() for node in nodes for key, tensor in node.inputs.items()}
    onnx.save(model, folder / f"{name}.onnx")
    np.savez(folder / f"{name}.npz", **{item.name: feeds[item.name] for item in model.graph.input})  # type: ignore[arg-type]
    ops = ops_entry(node.op_type for node in model.graph.node if node.domain == DOMAIN)
    (folder / f"{name}.ops").write_text(ops, encoding="utf-8")


def compilers_file(name: str) -> str:
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_folder(folder: Path) -> None:
    # The C++ runtime too: the sanitizer looks its exceptions up before Python has loaded it.
    preload = " ".join(map(compilers_file, ("libasan.so", "libstdc++.so.6")))
    # Leaks: Python and ONNX Runtime keep what they like until the process ends, and the operators live as long.
    options = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    script = Path(__file__).with_name("run_files.py")
    command = [sys.executable, str(script), str(LIBRARY), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **options})
    assert done.returncode == 0, done.stderr[-4000:]


def outputs(folder: Path, name: str) -> list[torch.Tensor]:
    with np.load(folder / f"{name}.out.npz") as found:
        return [torch.from_numpy(found[key]).double() for key in found.files]


def test_the_case_table_is_clean(tmp_path: Path) -> None:
    for number, case in enumerate(CASES):
        write(tmp_path, f"read{number}", [read_node(case, operands(case))])
    for number, phases in enumerate(TWO_PHASE_CASES):
        write(tmp_path, f"phases{number}", list(two_phase_nodes(phases, *two_phase_operands(phases))))
    run_folder(tmp_path)
    for number, case in enumerate(CASES):
        exact, _ = expected(case, operands(case))
        assert float((outputs(tmp_path, f"read{number}")[0] - exact).abs().max()) <= allowed(case, exact), case
    for number, phases in enumerate(TWO_PHASE_CASES):
        exact, _ = expected(phases.reads(), two_phase_operands(phases)[1])
        found = outputs(tmp_path, f"phases{number}")[2]
        assert float((found - exact).abs().max()) <= 2 * allowed(phases.reads(), exact), phases


def test_malformed_calls_are_clean(tmp_path: Path) -> None:
    for number, (place, tensor, _) in enumerate(READS.values()):
        node = read_node(CASE, operands(CASE))
        node.inputs[place] = tensor
        write(tmp_path, f"read{number}", [node], dynamic=True)
    poisoned = read_node(CASE, operands(CASE))
    poisoned.inputs["source_1"] = torch.full_like(poisoned.inputs["source_1"], float("nan"))
    write(tmp_path, "poisoned", [poisoned])
    run_folder(tmp_path)
    for number in range(len(READS)):
        assert "depthwire AttnResAddReadNorm_3: input" in (tmp_path / f"read{number}.error").read_text(encoding="utf-8")
    assert bool(outputs(tmp_path, "poisoned")[0].isnan().all())
