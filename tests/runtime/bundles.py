"""Tiny artefacts to make bundles of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from depthwire.export.goldens import make_goldens
from depthwire.export.to_onnx import to_onnx
from depthwire.export.write import write_artifact
from depthwire.passes.standard import standard_pipeline
from tests.export.tiny import captured

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire.artifact import Artifact


def write_reads(out: Path, *, dtype: torch.dtype = torch.float32) -> Artifact:
    """Write a decoder of three layers with Block AttnRes, random queries, and one window of goldens."""
    original = captured(dtype=dtype)
    program = standard_pipeline(attn_res="block:3", attention="decomposed").run(original)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.nn.Parameter((torch.randn(tensor.shape, generator=generator) * 0.5).to(tensor.dtype))
        if name.startswith("attn_res.query.")
        else tensor
        for name, tensor in program.exported.state_dict.items()
    }
    program = program.with_state(state)
    ids = original.example_inputs["input_ids"].numpy()
    artifact = write_artifact(
        out,
        original=original,
        rewritten=program,
        model=to_onnx(program),
        goldens=make_goldens(program, [{"input_ids": ids}]),
        recipe={},
        checkpoints=[],
    )
    artifact.manifest.source.task = "causal-lm"
    artifact.write_manifest()
    return artifact
