"""A GGUF file becomes a model: transformers dequantises it into plain linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from depthwire._hash import sha256_file
from depthwire.errors import CaptureError
from depthwire.export._capture_hf import load_model
from depthwire.export._hf_program import hf_program
from depthwire.export._options import DTYPES, CaptureOptions
from depthwire.export._transformers import quiet, require_transformers
from depthwire.program import Program, Source

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC = b"GGUF"


def capture_gguf(file: Path, options: CaptureOptions, *, reference: str) -> Program:
    """Capture a ``.gguf`` file; its weights are dequantised to fp32 unless ``dtype`` says otherwise.

    Args:
        file: The file; its directory needs nothing else.
        options: The user's choices.
        reference: What the user named.

    Raises:
        CaptureError: The file is no GGUF file, its architecture is unknown, or a package is missing.
    """
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic != _MAGIC:
        raise CaptureError(
            "capture.corrupt-checkpoint",
            "the file is not a GGUF file",
            at=str(file),
            want=f"a file that begins with {_MAGIC!r}",
            got=f"{magic!r} ({file.stat().st_size} bytes)",
            todo="Copy or download the file again.",
        )
    require_transformers(reference, "gguf", "accelerate")
    from transformers import AutoModelForCausalLM

    with quiet():
        model = load_model(
            AutoModelForCausalLM,
            file.parent,
            gguf_file=file.name,
            dtype=DTYPES[options.dtype] if options.dtype else torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=False,
        )
        exported, task, example_inputs, names = hf_program(model, options)
    source = Source("gguf", reference, sha256={file.name: sha256_file(file)}, task=task, model=type(model).__name__)
    return Program(exported, source, example_inputs, names)
