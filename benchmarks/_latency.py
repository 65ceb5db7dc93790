"""Latencies of several ONNX Runtime sessions, run in turn in one process, and their ratios with bootstrap bounds."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime

from depthwire.runtime import native

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

WARM_UP = 3
RESAMPLES = 10_000


def open_session(model: Path, threads: int, *, kernels: bool = False) -> onnxruntime.InferenceSession:
    """Open a model on the CPU with every optimisation of ONNX Runtime; with ``kernels`` our library is registered."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    # A pool spins for a moment after its work; here that would take the cores from the next side.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if kernels:
        proto = onnx.load(str(model), load_external_data=False)
        options.add_session_config_entry(
            native.OPS_ENTRY, native.ops_entry({node.op_type for node in proto.graph.node})
        )
        options.register_custom_ops_library(native.custom_ops_library())
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def timed(calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, NDArray[np.float64]]:
    """Make every call once a round, in an order that turns; return seconds ``[runs]`` by name."""
    names = list(calls)
    seconds = {name: np.zeros(runs) for name in names}
    for number in range(-WARM_UP, runs):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            calls[name]()
            if number >= 0:
                seconds[name][number] = time.perf_counter() - started
    return seconds


def latencies(
    sessions: Mapping[str, onnxruntime.InferenceSession], feeds: Mapping[str, NDArray[Any]], runs: int
) -> dict[str, NDArray[np.float64]]:
    """Run every session on the same feeds, as ``timed`` does; return seconds ``[runs]`` by name."""
    calls = {name: partial(session.run, None, dict(feeds)) for name, session in sessions.items()}
    return timed(calls, runs)


def ratio(side: NDArray[np.float64], base: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ratio of medians, and the upper bound of its one-sided 95 % bootstrap interval over paired rounds."""
    drawn = np.random.default_rng(0).integers(0, len(side), (RESAMPLES, len(side)))
    resampled = np.median(side[drawn], axis=1) / np.median(base[drawn], axis=1)
    return float(np.median(side) / np.median(base)), float(np.quantile(resampled, 0.95))
