"""What a lifted SmolLM2 costs in ONNX Runtime on the CPU, against the same model with plain residuals.

All files come from ``depthwire export`` with the same passes but the lift, and run in turn in one process: by the
library of kernels, and (``body``) by the function bodies in the same files.

Prints ``lift_latency_ratio`` for Block (8 blocks) and Full AttnRes, with the plain model's own latency.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import depthwire
from benchmarks._latency import latencies, open_session, ratio
from benchmarks._report import common_arguments, report

_FORMS = {"plain": None, "block:8": "block:8", "full": "full"}


def main() -> None:
    parser = common_arguments(__doc__, runs=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    ids = np.random.default_rng(0).integers(0, 1000, (1, arguments.seq_len))
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, attn_res in _FORMS.items():
            out = Path(folder) / name.replace(":", "-")
            depthwire.export(arguments.model, out, attn_res=attn_res, seq_len=arguments.seq_len)
            model = out / "model.onnx"
            sessions[name] = open_session(model, arguments.threads, kernels=attn_res is not None)
            if attn_res is not None:
                sessions[f"body {name}"] = open_session(model, arguments.threads)
        seconds = latencies(sessions, {"input_ids": ids}, arguments.runs)
    how = f"ONNX Runtime CPU, {arguments.threads} threads, {arguments.model.name}, length {arguments.seq_len}"
    report("plain_latency", float(np.median(seconds["plain"])), "s", how, arguments.runs)
    for name in sessions:
        if name != "plain":
            value, upper = ratio(seconds[name], seconds["plain"])
            against = f"{name} against plain, {how}; 95 % upper bound {upper:.4f}"
            report("lift_latency_ratio", value, "ratio", against, arguments.runs)


if __name__ == "__main__":
    main()
