"""Tiny transformers models with random weights, saved as checkpoints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from depthwire.errors import CaptureError
from depthwire.export.capture import capture

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire.program import Program

LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "tie_word_embeddings": True,
}
GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
NEOX: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
BERT: dict[str, Any] = {**NEOX, "num_labels": 3}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}


def make(directory: Path, config: str, cls: str, **options: Any) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**options))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory)
    transformers.utils.logging.enable_progress_bar()
    return directory


def refused(source: Path | str, code: str, **options: Any) -> CaptureError:
    with pytest.raises(CaptureError) as raised:
        capture(source, **options)
    error = raised.value
    assert error.code == code
    assert error.at is not None
    assert error.want is not None
    assert error.got is not None
    assert error.todo is not None
    return error


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def run(program: Program) -> torch.Tensor:
    output = program.module()(*program.example_inputs.values())
    assert isinstance(output, torch.Tensor)
    return output
