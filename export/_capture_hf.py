"""A Hugging Face directory or cached hub id becomes a model: class, dtype and completeness of its weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from depthwire.errors import CaptureError
from depthwire.export._hf_files import CONFIG, Checkpoint, cached_snapshot, read_checkpoint
from depthwire.export._hf_program import hf_program, refuse_encoder_decoder
from depthwire.export._options import DTYPES, CaptureOptions
from depthwire.export._transformers import quiet, require_transformers
from depthwire.program import Program, Source

if TYPE_CHECKING:
    from pathlib import Path

_STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Buffers that older checkpoints carry and that models compute for themselves.
_COMPUTED = re.compile(r"(.*\.)?(inv_freq|position_ids|masked_bias|num_batches_tracked)")


def capture_hub_id(reference: str, options: CaptureOptions) -> Program:
    """Capture a model from the local Hugging Face cache."""
    directory, commit = cached_snapshot(reference, options.revision)
    return capture_directory(directory, options, reference=reference, revision=commit)


def capture_directory(
    directory: Path, options: CaptureOptions, *, reference: str, revision: str | None = None
) -> Program:
    """Capture a Hugging Face directory.

    Args:
        directory: Holds ``config.json`` and safetensors weights.
        options: The user's choices.
        reference: What the user named.
        revision: Commit, for a hub snapshot.

    Raises:
        CaptureError: The checkpoint is not whole or not supported, or cannot be exported.
        UsageError: An option does not fit the model.
    """
    require_transformers(reference)
    checkpoint = read_checkpoint(directory)
    with quiet():
        cls, config = _class_and_config(checkpoint, trust_remote_code=options.trust_remote_code)
        dtype = DTYPES[options.dtype] if options.dtype else _STORED[checkpoint.dtype]
        model = load_model(
            cls,
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=_attention(cls),
            trust_remote_code=options.trust_remote_code,
        )
        exported, task, example_inputs, names = hf_program(model, options)
    source = Source(
        "huggingface", reference, revision=revision, sha256=checkpoint.sha256(), task=task, model=type(model).__name__
    )
    return Program(exported, source, example_inputs, names)


def load_model(cls: Any, directory: Path, **options: object) -> nn.Module:
    """Load a model and judge what transformers only logs: absent, misshapen and unused weights.

    Args:
        cls: A model class or auto class of transformers.
        directory: The checkpoint.
        options: Further arguments of ``from_pretrained``.

    Raises:
        CaptureError: ``capture.load-failed``, ``capture.missing-weights`` or ``capture.unused-weights``.
    """
    try:
        model, info = cls.from_pretrained(str(directory), local_files_only=True, output_loading_info=True, **options)
    except Exception as error:
        raise _load_failed(directory, error) from error
    if not isinstance(model, nn.Module):
        raise _load_failed(directory, TypeError(f"{cls.__name__}.from_pretrained returned {type(model).__name__}"))
    absent = sorted(str(key) for key in info["missing_keys"])
    absent += sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    if absent:
        raise CaptureError(
            "capture.missing-weights",
            f"{len(absent)} weights of {type(model).__name__} are not in the checkpoint, or have another shape there",
            at=str(directory),
            want="a checkpoint of this very class",
            got="no usable " + ", ".join(absent[:4]) + (", …" if len(absent) > 4 else ""),
            todo="Correct 'architectures' in config.json, or save the model again: "
            "transformers would fill these weights with random numbers.",
        )
    _refuse_unused(model, directory, info["unexpected_keys"])
    return model


def _refuse_unused(model: nn.Module, directory: Path, unexpected: Any) -> None:
    """Refuse trained weights inside a layer that the model does not use; whole parts it lacks (a pooler) are fine."""
    modules = dict(model.named_modules())
    unused = []
    for key in sorted(str(key) for key in unexpected):
        parent = key
        while parent not in modules:
            parent = parent.rpartition(".")[0]
        if re.search(r"(^|\.)\d+(\.|$)", parent) and not _COMPUTED.fullmatch(key):
            unused.append(key)
    if unused:
        raise CaptureError(
            "capture.unused-weights",
            f"the layers of {type(model).__name__} do not use {len(unused)} of the checkpoint's weights",
            at=str(directory),
            want="a checkpoint of this very class",
            got=", ".join(unused[:4]) + (", …" if len(unused) > 4 else ""),
            todo="Correct 'architectures' and the options in config.json, or merge adapters before saving: "
            "without these weights the model computes something else.",
        )


def _load_failed(directory: Path, error: Exception) -> CaptureError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return CaptureError(
        "capture.load-failed",
        "transformers cannot load the model",
        at=str(directory),
        want="a model that from_pretrained loads offline",
        got=f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}",
        todo="Check that the installed transformers knows this model, and that config.json and the weights agree.",
    )


def _attention(cls: Any) -> str:
    return "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"


def _class_and_config(checkpoint: Checkpoint, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return the class that ``architectures[0]`` names and the parsed configuration."""
    import transformers

    architectures = checkpoint.config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise _unknown_architecture(checkpoint, repr(architectures), "Write the model's class into config.json.")
    name = architectures[0]
    cls = getattr(transformers, name, None)
    own_code = checkpoint.config.get("auto_map")
    if cls is None and isinstance(own_code, Mapping):
        return _remote_class(checkpoint, name, own_code, trust_remote_code=trust_remote_code)
    if not isinstance(cls, type) or not hasattr(cls, "config_class") or not hasattr(cls, "from_pretrained"):
        close = difflib.get_close_matches(name, dir(transformers), n=1)
        todo = f"Did you mean {close[0]}? " if close else ""
        raise _unknown_architecture(checkpoint, name, f"{todo}A newer transformers may know it.")
    try:
        config = cls.config_class.from_pretrained(str(checkpoint.directory), local_files_only=True)
    except Exception as error:
        raise _load_failed(checkpoint.directory, error) from error
    refuse_encoder_decoder(config, name, at=str(checkpoint.directory / CONFIG))
    return cls, config


def _remote_class(
    checkpoint: Checkpoint, name: str, auto_map: Mapping[str, Any], *, trust_remote_code: bool
) -> tuple[Any, Any]:
    import transformers

    if not trust_remote_code:
        raise CaptureError(
            "capture.remote-code",
            "the model's class is Python code inside the checkpoint, which is not run unless you say so",
            at=str(checkpoint.directory / CONFIG),
            want="a class of transformers",
            got=f"{name}, defined by auto_map",
            todo="Read that code; if you trust it, pass --trust-remote-code (trust_remote_code=True).",
        )
    autos = [auto for auto, target in auto_map.items() if str(target).endswith(f".{name}")]
    auto = getattr(transformers, autos[0], None) if autos else None
    if auto is None:
        raise _unknown_architecture(checkpoint, name, "auto_map in config.json must map an Auto class to it.")
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(checkpoint.directory), local_files_only=True, trust_remote_code=True
        )
    except Exception as error:
        raise _load_failed(checkpoint.directory, error) from error
    return auto, config


def _unknown_architecture(checkpoint: Checkpoint, got: str, todo: str) -> CaptureError:
    return CaptureError(
        "capture.unknown-architecture",
        "config.json does not name a model class that transformers knows",
        at=str(checkpoint.directory / CONFIG),
        want="architectures: [a class of transformers]",
        got=got,
        todo=todo,
    )
