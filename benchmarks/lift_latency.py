"""What reading the depth by attention costs in ONNX Runtime on the CPU, against the same model with plain residuals.

Both files come from ``depthwire convert`` with the same passes but the lift, and run in turn in one process. The reads
run as ONNX function bodies: no kernel of ours is involved.

Prints ``lift_latency_ratio`` for Block (8 blocks) and Full AttnRes, with the plain model's own latency.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

import depthwire
from benchmarks._report import common_arguments, report

_FORMS = {"plain": None, "block:8": "block:8", "full": "full"}


def session(model: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a model on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle sessions would otherwise keep the cores busy that the one being timed needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = common_arguments(__doc__, runs=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    ids = np.random.default_rng(0).integers(0, 1000, (1, arguments.seq_len))
    seconds: dict[str, list[float]] = {name: [] for name in _FORMS}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, attn_res in _FORMS.items():
            out = Path(folder) / name.replace(":", "-")
            depthwire.export(arguments.model, out, attn_res=attn_res, seq_len=arguments.seq_len)
            sessions[name] = session(out / "model.onnx", arguments.threads)
        for number in range(arguments.runs + 2):
            for name, opened in sessions.items():
                started = time.perf_counter()
                opened.run(None, {"input_ids": ids})
                if number >= 2:  # the first two runs warm up
                    seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    how = f"ONNX Runtime CPU, {arguments.threads} threads, {arguments.model.name}, length {arguments.seq_len}"
    report("plain_latency", median["plain"], "s", how, arguments.runs)
    for name in ("block:8", "full"):
        report(
            "lift_latency_ratio",
            median[name] / median["plain"],
            "ratio",
            f"{name} against plain, {how}",
            arguments.runs,
        )


if __name__ == "__main__":
    main()
