"""A directory of weights becomes a reference decoder: its own format, routed or not, or another's through a map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from depthwire._hash import sha256_file
from depthwire.errors import UsageError
from depthwire.export._hf_files import CONFIG, read_checkpoint
from depthwire.export._options import DTYPES, CaptureOptions
from depthwire.export._torch_export import export_module
from depthwire.program import Program, Source

if TYPE_CHECKING:
    from torch import Tensor

    from depthwire.models.attn_res import AttnResDecoder
    from depthwire.models.attn_res_config import AttnResConfig
    from depthwire.models.routed_decoder import RoutedDecoder

_DEFAULT_SEQ_LEN = 512
_TOKENIZER = "tokenizer_config.json"


def is_attn_res(directory: Path) -> bool:
    """Tell whether a directory holds what ``AttnResDecoder.save`` or ``RoutedDecoder.save`` wrote."""
    from depthwire.models.attn_res_config import MODEL_TYPE

    return _model_type(directory) in (MODEL_TYPE, _routed_type())


def _routed_type() -> str:
    from depthwire.models.routing_config import MODEL_TYPE

    return MODEL_TYPE


def _model_type(directory: Path) -> object:
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever reads the directory next says what is wrong with it
    return config.get("model_type") if isinstance(config, dict) else None


def capture_attn_res(
    directory: Path, options: CaptureOptions, *, reference: str, revision: str | None = None
) -> Program:
    """Capture a checkpoint in the reference decoder.

    Args:
        directory: Holds ``config.json`` and safetensors weights.
        options: The user's choices; ``checkpoint_map`` names the tensors.
        reference: What the user named.
        revision: Commit, for a hub snapshot.

    Raises:
        UsageError: An option has no effect, the map cannot be read, or ``seq_len`` is beyond the model's positions.
        CaptureError: The checkpoint is not whole, or does not fit the decoder.
    """
    without_effect = ("image_size", "trust_remote_code", "padding")
    options.refuse("an AttnRes checkpoint", without_effect, "The reference decoder reads tokens.")
    # A map may give the whole configuration; what a config.json rules out (adapters, quantisation) is checked first.
    files = read_checkpoint(directory) if (directory / CONFIG).is_file() else None
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    model, shape = _load(directory, options, dtype)
    inputs = {"input_ids": _tokens(options, shape.vocab_size, shape.max_length)}
    exported, names = export_module(model, inputs, select=lambda logits: {"logits": logits})
    hashes = _weights_sha256(directory) if files is None else files.sha256()
    if options.checkpoint_map is not None and Path(options.checkpoint_map).is_file():
        hashes["checkpoint-map"] = sha256_file(Path(options.checkpoint_map))
    source = Source(
        "attn-res",
        reference,
        revision=revision,
        sha256=hashes,
        task="causal-lm",
        model=type(model).__name__,
        tokenizer=str(directory) if (directory / _TOKENIZER).is_file() else None,
    )
    return Program(exported, source, inputs, names)


def _load(
    directory: Path, options: CaptureOptions, dtype: torch.dtype | None
) -> tuple[AttnResDecoder | RoutedDecoder, AttnResConfig]:
    """Return the model and the shape of its decoder."""
    if options.checkpoint_map is None and _model_type(directory) == _routed_type():
        from depthwire.models.routed_checkpoints import load_routed

        routed = load_routed(directory)
        return (routed if dtype is None else routed.cast(dtype)), routed.config.decoder
    from depthwire.models.checkpoints import load_checkpoint

    dense = load_checkpoint(directory, options.checkpoint_map, dtype=dtype)
    return dense, dense.config


def _weights_sha256(directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(directory.glob("*.safetensors*"))}


def _tokens(options: CaptureOptions, vocab_size: int, limit: int) -> Tensor:
    if options.task not in (None, "causal-lm"):
        raise UsageError(
            "capture.task",
            f"the reference decoder is no {options.task} model",
            at="task",
            want="causal-lm",
            got=str(options.task),
            todo="Leave the task out.",
        )
    if options.example_inputs is not None:
        raise UsageError(
            "capture.option-without-effect",
            "example_inputs has no effect on an AttnRes checkpoint",
            at="example_inputs",
            want="the option left out",
            got="given",
            todo="Use batch and seq_len.",
        )
    length = options.seq_len or min(_DEFAULT_SEQ_LEN, limit)
    if length > limit:
        raise UsageError(
            "capture.seq-len",
            f"the model has positions for {limit} tokens",
            at="seq_len",
            want=f"1 to {limit}",
            got=str(length),
        )
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (options.batch, length), generator=generator)
