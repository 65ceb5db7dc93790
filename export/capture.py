"""Capture: a trained model from wherever it lies becomes a ``Program`` with static shapes.

Nothing is downloaded, no pickle is opened, and no code of a checkpoint runs unless ``trust_remote_code`` says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from depthwire.errors import CaptureError, UsageError
from depthwire.export._options import CaptureOptions, ExampleInputs

if TYPE_CHECKING:
    from depthwire.program import Program

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_LOCAL_ONLY = ("revision",)
_MAPPED_ONLY = ("checkpoint_map",)
_WHY_MAPPED = "A map of names belongs to a directory of safetensors weights, or to a hub id."


def capture(
    source: str | Path | nn.Module,
    *,
    batch: int = 1,
    seq_len: int | None = None,
    task: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    image_size: int | None = None,
    example_inputs: ExampleInputs | None = None,
    checkpoint_map: str | None = None,
    padding: bool = False,
) -> Program:
    """Load a model and export it.

    Args:
        source: A Hugging Face directory or cached hub id, a ``.gguf`` file, ``package.module:factory``, a ``.pt2``
            file, or an ``nn.Module``.
        batch: Rows of the example inputs of a transformers model; the graph has this batch size.
        seq_len: Tokens per row; at most 512 of the model's positions by default.
        task: ``causal-lm``, ``encoder`` or ``vision``; by default it follows from the model's class.
        dtype: ``fp32``, ``bf16`` or ``fp16``; by default the checkpoint's (fp32 for GGUF).
        revision: Commit or branch of a hub id.
        trust_remote_code: Run Python code that a checkpoint brings along.
        image_size: Height and width in pixels, for vision models; by default the configuration's.
        example_inputs: Tensors by the names of ``forward``'s parameters, or in its order; a plain module needs them.
        checkpoint_map: Load AttnRes weights into the reference decoder by their names: ``kimi-k3``, ``fla``,
            ``paper``, or a YAML file; for directories and hub ids.
        padding: Give a causal language model an ``attention_mask [batch, seq_len]`` input, 0 for padding.

    Returns:
        The program: functional, static, in eval mode, every node with its ``nn_module_stack``, weights in their
        stored dtype under the model's own names and with their ties.

    Raises:
        UsageError: An option cannot be meant, or has no effect on this source.
        CaptureError: The source is missing, unsafe, not whole or not supported, or ``torch.export`` refuses it.
    """
    options = CaptureOptions(
        batch, seq_len, task, dtype, revision, trust_remote_code, image_size, example_inputs, checkpoint_map, padding
    )
    options.check()
    if isinstance(source, nn.Module):
        options.refuse("an nn.Module", _MAPPED_ONLY, _WHY_MAPPED)
        from depthwire.export._capture_factory import capture_module

        return capture_module(source, options)
    if not isinstance(source, (str, Path)) or not str(source):
        raise UsageError(
            "capture.source",
            "the source is neither a name nor a module",
            at="source",
            want="str, Path or nn.Module",
            got=repr(source) if isinstance(source, str) else type(source).__name__,
        )
    return _capture_name(str(source), options)


def _capture_name(reference: str, options: CaptureOptions) -> Program:
    path = Path(reference).expanduser()
    if path.is_dir():
        return _capture_directory(path, options, reference)
    if path.is_file():
        return _capture_file(path, options, reference)
    if _FACTORY.fullmatch(reference):
        options.refuse("package.module:factory", _MAPPED_ONLY, _WHY_MAPPED)
        from depthwire.export._capture_factory import capture_factory

        return capture_factory(reference, options)
    if options.checkpoint_map is not None:
        from depthwire.export._capture_attn_res import capture_attn_res
        from depthwire.export._hf_files import cached_snapshot

        directory, commit = cached_snapshot(reference, options.revision)
        return capture_attn_res(directory, options, reference=reference, revision=commit)
    from depthwire.export._capture_hf import capture_hub_id

    return capture_hub_id(reference, options)


def _capture_directory(directory: Path, options: CaptureOptions, reference: str) -> Program:
    options.refuse("a local directory", _LOCAL_ONLY, "A revision belongs to a hub id.")
    files = sorted(directory.glob("*.gguf"))
    if len(files) == 1 and not (directory / "config.json").exists():
        return _capture_file(files[0], options, reference)
    from depthwire.export._capture_attn_res import capture_attn_res, is_attn_res

    if options.checkpoint_map is not None or is_attn_res(directory):
        return capture_attn_res(directory, options, reference=reference)
    from depthwire.export._capture_hf import capture_directory

    return capture_directory(directory, options, reference=reference)


def _capture_file(file: Path, options: CaptureOptions, reference: str) -> Program:
    options.refuse("a local file", _LOCAL_ONLY, "A revision belongs to a hub id.")
    options.refuse("a local file", _MAPPED_ONLY, _WHY_MAPPED)
    suffix = file.suffix.lower()
    if suffix == ".gguf":
        from depthwire.export._capture_gguf import capture_gguf

        return capture_gguf(file, options, reference=reference)
    if suffix == ".pt2":
        from depthwire.export._capture_pt2 import capture_pt2

        return capture_pt2(file, options, reference=reference)
    from depthwire.export._hf_files import PICKLES, pickle_refused

    if suffix in PICKLES:
        raise pickle_refused(file)
    raise CaptureError(
        "capture.unsupported-file",
        "this kind of file is not a model that can be captured",
        at=reference,
        want="a .gguf or .pt2 file, or a Hugging Face directory",
        got=file.name,
        todo="For safetensors weights, name the directory that holds them beside their config.json.",
    )
