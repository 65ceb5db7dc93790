"""What routing saves in ONNX Runtime on the CPU, against the floating-point operations that it saves.

The reference decoder with plain residuals (d = 576, 16 layers) is converted as it is and with every other layer
routed, at capacities .5, .25 and .125:

    routed   Mixture-of-Depths: linear score of the stream, running budget, keys and values of the selected tokens
    sdt      the surprise of the layer before (with its prior network computed), and its gate
    dense_kv keys and values of all tokens, queries of the selected ones; a linear prior for the others

Each latency figure is the ratio of medians to the dense model over paired rounds, with the upper bound of its 95 %
bootstrap interval; beside it stands the ratio of the operations of the two graphs (``torch.utils.flop_counter``), and
the latency ratio over that. ``surprise_share`` is what the prior network and the score cost: the time of the routed
model with them over the time with a linear score.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import depthwire
from benchmarks._latency import latencies, open_session, ratio
from benchmarks._report import report
from benchmarks.attn_res_overhead import SHAPE, SIZES
from depthwire.models.attn_res import AttnResDecoder

if TYPE_CHECKING:
    from depthwire.program import Program

CAPACITIES = (0.5, 0.25, 0.125)
FORMS: dict[str, dict[str, Any]] = {
    "routed": {"route_score": "mod"},
    "sdt": {"route_score": "surprise", "route_gate": "surprise"},
    "dense_kv": {"route_score": "linear", "route_keys_values": "all", "route_fallback": "linear"},
}


def capture(length: int) -> Program:
    """Return the plain decoder with random weights, captured for one sequence of a length."""
    torch.manual_seed(0)
    config = replace(SHAPE, **SIZES["d576"], max_length=length, residual="plain")
    ids = torch.zeros(1, length, dtype=torch.int64)
    return depthwire.capture(AttnResDecoder(config).eval(), example_inputs={"input_ids": ids})


def operations(program: Program) -> int:
    """Return the floating-point operations of one run: matrix products and attention, causal or not in full."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - an operator's name
    with FlopCounterMode(display=False, custom_mapping={flash: _attention}) as counter, torch.no_grad():
        program.module()(*program.example_inputs.values())
    return int(counter.get_total_flops())


def _attention(query: list[int], key: list[int], *_: object, **__: object) -> int:
    batch, heads, rows, width = query
    return 4 * batch * heads * rows * key[2] * width


def measure(length: int, runs: int, threads: int, forms: list[str], rule: str) -> None:
    """Print the figures of one length."""
    dense = capture(length)
    base = operations(dense)
    sessions, saved = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        depthwire.export(dense, folder / "dense")
        sessions["dense"] = open_session(folder / "dense" / "model.onnx", threads)
        for form in forms:
            for capacity in CAPACITIES:
                name = f"{form}_c{round(capacity * 100)}"
                options = {
                    **FORMS[form],
                    "route_layers": "every:2",
                    "capacity": capacity,
                    "route_seed": 0,
                    "route_rule": rule,
                }
                saved[name] = operations(depthwire.rewrite(dense, **options)) / base
                depthwire.export(dense, folder / name, **options)
                sessions[name] = open_session(folder / name / "model.onnx", threads, kernels=True)
        ids = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (1, length))
        seconds = latencies(sessions, {"input_ids": ids}, runs)
    shape = f"width 576, 16 layers, every other one routed, length {length}, rule {rule}"
    how = f"dense model, {shape}, ORT CPU, {threads} threads"
    report(f"dense_t{length}", float(np.median(seconds["dense"])), "s", how, runs)
    for name, share in saved.items():
        value, upper = ratio(seconds[name], seconds["dense"])
        report(f"{name}_t{length}", value, "ratio", f"{how}; 95 % upper bound {upper:.4f}", runs)
        report(f"{name}_t{length}_flops", share, "ratio", "operations of the dense model", 1)
        bound = f"95 % upper bound {upper / share:.4f}"
        report(f"{name}_t{length}_over_flops", value / share, "ratio", bound, runs)
    for capacity in CAPACITIES:
        surprise, plain = f"sdt_c{round(capacity * 100)}", f"routed_c{round(capacity * 100)}"
        if surprise in seconds and plain in seconds:
            cost = float(np.median(seconds[surprise] - seconds[plain]) / np.median(seconds[surprise]))
            report(f"surprise_share_c{round(capacity * 100)}_t{length}", cost, "ratio", "the routed model's time", runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", action="append", type=int, help="default: 512 and 2048")
    parser.add_argument("--form", action="append", choices=[*FORMS], help="default: all")
    parser.add_argument("--rule", choices=["budget", "top-k"], default="budget")
    parser.add_argument("--runs", type=int, default=21, help="rounds")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    for length in arguments.length or (512, 2048):
        measure(length, arguments.runs, arguments.threads, arguments.form or [*FORMS], arguments.rule)


if __name__ == "__main__":
    main()
