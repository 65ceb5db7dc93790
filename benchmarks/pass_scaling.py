"""How compile time grows with depth: native Full AttnRes models of tiny width, 50 to 1,000 sublayers.

A read of sublayer l has l sources, so the work that cannot be avoided is reads times sources, l²/2. Prints for each
depth the seconds of all passes with the checks between them, of our export (capture, translation and writing), their
quotient, and the passes' microseconds per source of a read, which does not grow where the passes are linear. With
``--plain N`` the seconds of ``torch.onnx.export`` of the same eager model, and the passes' share of them; that side
is slow for deep models.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

import depthwire
from benchmarks._report import report
from depthwire.models.attn_res import AttnResConfig, AttnResDecoder
from depthwire.stages import Stages

SHAPE = AttnResConfig(
    vocab_size=64, width=16, layers=1, heads=1, kv_heads=1, head_dim=16, mlp_width=16, max_length=8, residual="full"
)
LENGTH = 4


def decoder(sublayers: int) -> AttnResDecoder:
    """Return a Full AttnRes decoder with random weights, its queries far from zero."""
    torch.manual_seed(0)
    model = AttnResDecoder(replace(SHAPE, layers=sublayers // 2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "res_proj" in name:
                parameter.normal_(0, 0.5)
    return model


def compile_once(sublayers: int) -> tuple[float, float]:
    """Return the seconds of the passes and of everything else up to the written artefact."""
    model = decoder(sublayers)
    stages = Stages()
    with tempfile.TemporaryDirectory() as folder:
        ids = torch.zeros(1, LENGTH, dtype=torch.int64)
        depthwire.export(model, Path(folder) / "out", example_inputs={"input_ids": ids}, stages=stages)
    seconds = {str(stage["name"]): float(stage["seconds"]) for stage in stages.as_list()}
    passes = seconds.pop("rewrite")
    return passes, seconds["capture"] + seconds["export"]


def export_plainly(sublayers: int) -> float:
    """Return the seconds of ``torch.onnx.export`` with its saving."""
    model = decoder(sublayers)
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        torch.onnx.export(model, (ids,), str(Path(folder) / "model.onnx"), dynamo=True, verbose=False)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sublayers", type=int, action="append", help="default: 50, 100, 200, 400 and 1000")
    parser.add_argument("--plain", type=int, action="append", default=[], help="depths to export with torch.onnx too")
    arguments = parser.parse_args()
    for sublayers in arguments.sublayers or (50, 100, 200, 400, 1000):
        passes, export = compile_once(sublayers)
        edges = sublayers * (sublayers + 3) // 2  # 1 to sublayers + 1 sources, the first read of a single one aside
        how = f"native Full AttnRes, {sublayers} sublayers, {edges} sources of reads"
        report(f"passes_seconds_{sublayers}", passes, "s", how, 1)
        report(f"export_seconds_{sublayers}", export, "s", how, 1)
        report(f"passes_share_{sublayers}", passes / export, "ratio", f"passes against export, {how}", 1)
        report(f"passes_per_source_{sublayers}", passes / edges * 1e6, "us", how, 1)
        if sublayers in arguments.plain:
            plain = export_plainly(sublayers)
            report(f"plain_export_seconds_{sublayers}", plain, "s", f"torch.onnx.export, {how}", 1)
            report(f"passes_share_of_plain_{sublayers}", passes / plain, "ratio", f"torch.onnx.export, {how}", 1)


if __name__ == "__main__":
    main()
