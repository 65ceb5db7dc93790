"""A loaded transformers model becomes an exported program: its task, its inputs, its outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from depthwire.errors import CaptureError, UsageError
from depthwire.export._options import TASKS, CaptureOptions
from depthwire.export._torch_export import export_module

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_DEFAULT_SEQ_LEN = 512
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_MAIN_INPUT = {"causal-lm": "input_ids", "encoder": "input_ids", "vision": "pixel_values"}


def is_transformers_model(module: nn.Module) -> bool:
    """Tell whether a module is a transformers model, without importing transformers."""
    return any(cls.__module__ == "transformers.modeling_utils" for cls in type(module).__mro__)


def hf_program(
    model: nn.Module, options: CaptureOptions
) -> tuple[ExportedProgram, str, dict[str, Tensor], tuple[str, ...]]:
    """Export a transformers model.

    Args:
        model: Left unchanged.
        options: Task, sizes, or example inputs by name.

    Returns:
        The program, the task, the example inputs and the names of the outputs.

    Raises:
        UsageError: A size or the task does not fit the model.
        CaptureError: The model's input is neither tokens nor pixels, or it cannot be exported.
    """
    task = detect_task(model, options.task)
    if options.example_inputs is None:
        inputs = _pixels(model, options) if task == "vision" else _tokens(model, options, task)
    elif isinstance(options.example_inputs, Mapping):
        options.refuse(
            "a model with example inputs", ("batch", "seq_len", "image_size", "padding"), "The inputs fix the sizes."
        )
        inputs = dict(options.example_inputs)
    else:
        raise UsageError(
            "capture.example-inputs",
            "example inputs of a transformers model are given by name",
            at="example_inputs",
            want="a mapping such as {'input_ids': …}",
            got="a tuple",
        )
    fixed = _fixed(model, inputs)
    exported, names = export_module(model, inputs, fixed=fixed, select=_select)
    return exported, task, inputs, names


def detect_task(model: nn.Module, asked: str | None) -> str:
    """Return ``causal-lm``, ``encoder`` or ``vision``, from the class name and the main input.

    Raises:
        UsageError: The task that was asked for takes another input than the model.
        CaptureError: The model takes neither tokens nor pixels, or both.
    """
    config: Any = model.config
    refuse_encoder_decoder(config, type(model).__name__, at=type(model).__name__)
    main_input = str(getattr(model, "main_input_name", "input_ids"))
    name = type(model).__name__
    if asked is not None:
        if _MAIN_INPUT[asked] != main_input:
            raise UsageError(
                "capture.task",
                f"{name} is no {asked} model",
                at="task",
                want=f"a task whose input is {main_input}",
                got=f"{asked}, whose input is {_MAIN_INPUT[asked]}",
                todo="Leave the task out: it follows from the model's class.",
            )
        return asked
    mixed = getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None
    if main_input not in _MAIN_INPUT.values() or (mixed and not name.endswith("ForCausalLM")):
        raise CaptureError(
            "capture.unsupported-input",
            f"{name} is not a model of tokens or of pixels alone",
            at=name,
            want=", ".join(TASKS),
            got=f"main input {main_input}" + (" besides images or sound" if mixed else ""),
            todo="Capture the transformer inside it through package.module:factory, which returns (module, inputs).",
        )
    if main_input == "pixel_values":
        return "vision"
    return "causal-lm" if name.endswith(("ForCausalLM", "LMHeadModel")) else "encoder"


def refuse_encoder_decoder(config: Any, name: str, *, at: str) -> None:
    """Refuse models that run an encoder and a decoder.

    Raises:
        CaptureError: ``capture.encoder-decoder``.
    """
    if getattr(config, "is_encoder_decoder", False) and not name.endswith("EncoderModel"):
        raise CaptureError(
            "capture.encoder-decoder",
            "encoder-decoder models are not supported",
            at=at,
            want="a causal language model, an encoder or a vision model",
            got=name,
            todo="Capture the encoder alone through package.module:factory, returning its module and example inputs.",
        )


def _select(output: Any) -> Any:
    """Keep the logits, else the last hidden state, else every field."""
    for field in ("logits", "last_hidden_state"):
        if isinstance(output, Mapping) and output.get(field) is not None:
            return {field: output[field]}
    return output


def _fixed(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, object]:
    """Arguments of ``forward`` that do not become inputs of the graph."""
    parameters = inspect.signature(type(model).forward).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    fixed: dict[str, object] = {"return_dict": True}
    if "use_cache" in parameters or (anything and "input_ids" in inputs):
        fixed["use_cache"] = False
    pixels = inputs.get("pixel_values")
    if "interpolate_pos_encoding" in parameters and pixels is not None:
        fixed["interpolate_pos_encoding"] = tuple(pixels.shape[-2:]) != _native_size(model)
    return {name: value for name, value in fixed.items() if name in parameters or anything}


def _tokens(model: nn.Module, options: CaptureOptions, task: str) -> dict[str, Tensor]:
    options.refuse("a model of tokens", ("image_size",), "Use seq_len.")
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    limit = _positions(model, config)
    length = options.seq_len or min(_DEFAULT_SEQ_LEN, limit or _DEFAULT_SEQ_LEN)
    if limit is not None and length > limit:
        raise UsageError(
            "capture.seq-len",
            f"the model has positions for {limit} tokens",
            at="seq_len",
            want=f"1 to {limit}",
            got=str(length),
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(config.vocab_size), (options.batch, length), generator=generator)
    if task == "causal-lm" and not options.padding:
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _positions(model: nn.Module, config: Any) -> int | None:
    """Return the longest sequence that the model has positions for, or ``None`` where it sets no limit."""
    limits = [getattr(config, name, None) for name in _POSITIONS]
    limit = next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)
    if limit is None:
        return None
    for name, part in model.named_modules():
        # RoBERTa and its kin count positions from padding_idx + 1, so the first rows of the table are never used.
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            limit = min(limit, part.num_embeddings - part.padding_idx - 1)
    return limit


def _native_size(model: nn.Module) -> tuple[int, int] | None:
    size = getattr(model.config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _pixels(model: nn.Module, options: CaptureOptions) -> dict[str, Tensor]:
    options.refuse("a vision model", ("seq_len", "padding"), "Use image_size.")
    size = (options.image_size, options.image_size) if options.image_size else _native_size(model)
    if size is None:
        raise UsageError(
            "capture.size",
            "the model does not say which image size it wants",
            at="image_size",
            want="--image-size",
            got="no image_size in config.json",
        )
    channels = int(getattr(model.config, "num_channels", 3))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((options.batch, channels, *size), generator=generator)
    return {"pixel_values": pixels.to(_dtype(model))}


def _dtype(model: nn.Module) -> torch.dtype:
    return next((weight.dtype for weight in model.parameters() if weight.dtype.is_floating_point), torch.float32)
