"""What one depth-attention operator costs in ONNX Runtime's CPU provider with the library of kernels.

A model holds a row of equal nodes whose deltas differ, over sources of real size; its time is divided by their number.
Prints ``read_time`` for reads of several numbers of sources, at a whole prompt and at one token, ``inter_time`` for
phase 1 of the two-phase form, each with the bandwidth that it reaches if every source is fetched once and every result
written once, ``copy_bandwidth`` to compare it with, and ``registration`` of all operators and of one.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

import depthwire
from benchmarks._report import common_arguments, report
from depthwire.runtime.native import OPS_ENTRY, instruction_set, ops_entry

if TYPE_CHECKING:
    import onnx

_NODES = 8


@dataclass(frozen=True)
class Figure:
    """Reads of ``sources`` tensors ``[rows, width]``; with ``queries``, phase 1 for so many."""

    sources: int
    rows: int
    width: int
    queries: int = 0

    @property
    def op_type(self) -> str:
        """The operator."""
        return f"AttnResInter_{self.sources}" if self.queries else f"AttnResAddReadNorm_{self.sources}"

    @property
    def bytes(self) -> int:
        """Bytes of one node: sources and delta in, sum and result out; in phase 1 one result for each query."""
        tensors = self.sources + (self.queries or 3)
        return 4 * tensors * self.rows * self.width


def model_of(figure: Figure) -> onnx.ModelProto:
    """Return a model of ``_NODES`` independent nodes over the same sources."""
    names = [f"source_{i}" for i in range(figure.sources)]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [figure.rows, figure.width]) for name in names]
    vector = np.full(figure.width, 0.01, np.float32)
    weights = {"query": vector, "gain": vector, "queries": np.tile(vector, (figure.queries or 1, 1))}
    nodes, outputs = [], []
    for k in range(_NODES):
        if figure.queries:
            made = [f"out_{k}", f"lse_{k}"]
            node = helper.make_node(figure.op_type, ["queries", *names], made, domain="depthwire", eps=1e-6)
        else:
            inputs.append(helper.make_tensor_value_info(f"delta_{k}", TensorProto.FLOAT, [figure.rows, figure.width]))
            made = [f"out_{k}", f"sum_{k}"]
            operands = ["query", "gain", *names, f"delta_{k}"]
            node = helper.make_node(figure.op_type, operands, made, domain="depthwire", eps=1e-6, norm_eps=1e-6)
        nodes.append(node)
        outputs.append(helper.make_tensor_value_info(made[0], TensorProto.FLOAT, None))
    constants = [helper.make_tensor(name, TensorProto.FLOAT, value.shape, value) for name, value in weights.items()]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(nodes, "reads", inputs, outputs, [c for c in constants if c.name in used])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("depthwire", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session_of(model: onnx.ModelProto, threads: int, *, named: bool = True) -> onnxruntime.InferenceSession:
    """Open a model with the kernels; ``named`` registers its own operators alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if named:
        options.add_session_config_entry(OPS_ENTRY, ops_entry(node.op_type for node in model.graph.node))
    options.register_custom_ops_library(depthwire.custom_ops_library())
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def seconds_of(figure: Figure, threads: int, runs: int) -> float:
    """Return the median time of one node, inputs and outputs bound so that nothing is copied."""
    session = session_of(model_of(figure), threads)
    binding = session.io_binding()
    generator = np.random.default_rng(0)
    for item in session.get_inputs():
        value: Any = generator.standard_normal((figure.rows, figure.width)).astype(np.float32)
        binding.bind_ortvalue_input(item.name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    for item in session.get_outputs():
        binding.bind_output(item.name)
    found = []
    for number in range(runs + 2):
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        if number >= 2:  # the first two runs warm up
            found.append((time.perf_counter() - started) / _NODES)
    return statistics.median(found)


def main() -> None:
    parser = common_arguments(__doc__, runs=30)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    length, threads, runs = arguments.seq_len, arguments.threads, arguments.runs
    how = f"{instruction_set()}, {threads} threads, fp32"
    figures = [Figure(n, rows, 576) for rows in (length, 1) for n in (2, 9, 33)]
    figures += [Figure(9, length, 2048), Figure(129, 1, 7168)]
    figures += [Figure(8, length, 576, queries=8), Figure(24, length, 576, queries=8)]
    for figure in figures:
        seconds = seconds_of(figure, threads, runs)
        name = "inter_time" if figure.queries else "read_time"
        what = f"{figure.op_type} [{figure.rows}, {figure.width}]"
        if figure.queries:
            what += f", {figure.queries} queries"
        report(name, seconds * 1e6, "us", f"{what}, {how}", runs)
        report(name.replace("time", "bandwidth"), figure.bytes / seconds / 1e9, "GB/s", f"{what}, {how}", runs)
    source, target = np.ones(40 << 18, np.float32), np.empty(40 << 18, np.float32)
    copies = []
    for _ in range(runs):
        started = time.perf_counter()
        np.copyto(target, source)
        copies.append(time.perf_counter() - started)
    report(
        "copy_bandwidth", 2 * source.nbytes / statistics.median(copies) / 1e9, "GB/s", "40 MB by numpy, 1 thread", runs
    )
    small = model_of(Figure(2, 1, 8))
    for named in (True, False):
        opened = []
        for _ in range(3):
            started = time.perf_counter()
            session_of(small, 1, named=named)
            opened.append(time.perf_counter() - started)
        report("registration", statistics.median(opened) * 1e3, "ms", "one operator" if named else "all operators", 3)


if __name__ == "__main__":
    main()
