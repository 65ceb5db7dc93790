"""How compile time grows with depth: native Full AttnRes models of tiny width, 50 to 1,000 sublayers.

A read of sublayer l has l sources, so the work that cannot be avoided is reads times sources, l²/2. Prints for each
depth the seconds of all passes with the checks between them, of the export (capture, translation and writing),
their quotient, and the passes' microseconds per source of a read, which stays level where the passes are linear.
"""

from __future__ import annotations

import argparse
import tempfile
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


def compile_once(sublayers: int) -> tuple[float, float]:
    """Return the seconds of the passes and of everything else up to the written artefact."""
    torch.manual_seed(0)
    model = AttnResDecoder(replace(SHAPE, layers=sublayers // 2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "res_proj" in name:
                parameter.normal_(0, 0.5)
    stages = Stages()
    with tempfile.TemporaryDirectory() as folder:
        ids = torch.zeros(1, LENGTH, dtype=torch.int64)
        depthwire.export(model, Path(folder) / "out", example_inputs={"input_ids": ids}, stages=stages)
    seconds = {str(stage["name"]): float(stage["seconds"]) for stage in stages.as_list()}
    passes = seconds.pop("rewrite")
    return passes, seconds["capture"] + seconds["export"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sublayers", type=int, action="append", help="default: 50, 100, 200, 400 and 1000")
    arguments = parser.parse_args()
    for sublayers in arguments.sublayers or (50, 100, 200, 400, 1000):
        passes, export = compile_once(sublayers)
        edges = sublayers * (sublayers + 3) // 2  # 1 to sublayers + 1 sources, the first read of a single one aside
        how = f"native Full AttnRes, {sublayers} sublayers, {edges} sources of reads"
        report(f"passes_seconds_{sublayers}", passes, "s", how, 1)
        report(f"export_seconds_{sublayers}", export, "s", how, 1)
        report(f"passes_share_{sublayers}", passes / export, "ratio", f"passes against export, {how}", 1)
        report(f"passes_per_source_{sublayers}", passes / edges * 1e6, "us", how, 1)


if __name__ == "__main__":
    main()
