"""What reading the depth by attention costs in ONNX Runtime on the CPU, against the same model with plain residuals.

The reference decoder is built three times with the same sizes: plain, Block (8 blocks) and Full AttnRes, with queries
far from zero; and the trained small checkpoints against plain models of their sizes. The plain one is exported by
Depthwire (native RMSNormalization and Attention) and run with every optimisation of ONNX Runtime. Against it, in
turn, in one process:

    block, full             recognised, fused, scheduled; run by the library of kernels
    body_block, body_full   the same files without the library: function bodies
    eager_block, eager_full the eager models by plain ``torch.onnx.export``

Each figure is a ratio of medians over paired rounds, with the upper bound of its 95 % bootstrap interval.
``export_ratio_*``: seconds of our capture, passes, translation and writing against ``torch.onnx.export`` of the eager
model with its saving, one run each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import depthwire
from benchmarks._latency import latencies, open_session, ratio
from benchmarks._report import report
from depthwire.models.attn_res import AttnResConfig, AttnResDecoder
from depthwire.stages import Stages

if TYPE_CHECKING:
    from torch import nn

VOCABULARY = 1024
SHAPE = AttnResConfig(VOCABULARY, width=64, layers=1, heads=1, kv_heads=1, head_dim=64, mlp_width=64)
SIZES: dict[str, dict[str, Any]] = {
    "d576": {"width": 576, "layers": 16, "heads": 9, "kv_heads": 3, "head_dim": 64, "mlp_width": 1536},
    "d2048": {"width": 2048, "layers": 4, "heads": 32, "kv_heads": 8, "head_dim": 64, "mlp_width": 5632},
}
_DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
TRAINED = {"trained_block": _DATA / "attn_res_small", "trained_full": _DATA / "attn_res_small_full"}


def decoder(size: str, residual: str, length: int) -> AttnResDecoder:
    """Return a decoder with random weights, its queries far from zero."""
    torch.manual_seed(0)
    fields = SIZES[size]
    config = replace(SHAPE, **fields, max_length=max(length, 8), residual=residual)
    model = AttnResDecoder(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "res_proj" in name:
                parameter.normal_(0, 2 / fields["width"] ** 0.5)
    return model


def forms(size: str, length: int) -> dict[str, AttnResDecoder]:
    """Return the models of one size: plain, and what is compared with it. Block has eight blocks, or one a layer."""
    if size in TRAINED:
        model = AttnResDecoder.load(TRAINED[size]).float()
        plain = AttnResDecoder(replace(model.config, residual="plain")).eval()
        return {"plain": plain, size.removeprefix("trained_"): model}
    per_block = max(1, SIZES[size]["layers"] // 8)
    residuals = {"plain": "plain", "block": f"block-layers:{per_block}", "full": "full"}
    return {form: decoder(size, residual, length) for form, residual in residuals.items()}


def export_ours(model: nn.Module, folder: Path, length: int) -> float:
    """Convert a model as a user does; return the seconds, without those of running the original for the goldens."""
    ids = torch.zeros(1, length, dtype=torch.int64)
    stages = Stages()
    depthwire.export(model, folder, example_inputs={"input_ids": ids}, stages=stages)
    return sum(float(stage["seconds"]) for stage in stages.as_list() if stage["name"] != "goldens")


def export_eager(model: nn.Module, folder: Path, length: int) -> float:
    """Export the eager model with torch.onnx alone; return the seconds."""
    folder.mkdir()
    started = time.perf_counter()
    ids = torch.zeros(1, length, dtype=torch.int64)
    path = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (ids,), str(path), input_names=["input_ids"], dynamo=True, verbose=False)
    return time.perf_counter() - started


def measure(size: str, length: int, runs: int, threads: int, *, eager: bool) -> None:
    """Print the figures of one size and length."""
    suffix = f"t{length}" if size == "d576" else f"{size}_t{length}"
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        sessions = {}
        models = forms(size, length)
        config = models["plain"].config
        for form, model in models.items():
            path = folder / form / "model.onnx"
            spent = export_ours(model, path.parent, length)
            sessions[form] = open_session(path, threads, kernels=form != "plain")
            if form != "plain":
                sessions[f"body_{form}"] = open_session(path, threads)
            if eager and form != "plain":
                eager_path = folder / f"eager_{form}" / "model.onnx"
                spent /= export_eager(model, eager_path.parent, length)
                report(f"export_ratio_{form}_{suffix}", spent, "ratio", "torch.onnx.export of the eager model", 1)
                sessions[f"eager_{form}"] = open_session(eager_path, threads)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
        seconds = latencies(sessions, {"input_ids": ids}, runs)
    shape = f"width {config.width}, {config.layers} layers, length {length}"
    how = f"plain residuals, {shape}, ORT CPU, {threads} threads"
    report(f"plain_{suffix}", float(np.median(seconds["plain"])), "s", how, runs)
    for name in sessions:
        if name != "plain":
            value, upper = ratio(seconds[name], seconds["plain"])
            report(f"{name}_{suffix}", value, "ratio", f"{how}; 95 % upper bound {upper:.4f}", runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=[*SIZES, *TRAINED], help="default: all")
    parser.add_argument("--length", action="append", type=int, help="default: 512 (the trained ones: 256) and 1")
    parser.add_argument("--runs", type=int, default=31, help="rounds; ten times as many at length 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-eager", dest="eager", action="store_false", help="leave the eager exports out")
    arguments = parser.parse_args()
    for size in arguments.size or (*SIZES, *TRAINED):
        for length in arguments.length or (256 if size in TRAINED else 512, 1):
            runs = arguments.runs * (10 if length == 1 else 1)
            measure(size, length, runs, arguments.threads, eager=arguments.eager and size == "d576")


if __name__ == "__main__":
    main()
