"""AttnRes checkpoints of other code bases, loaded into the reference decoder by their tensor names alone.

No code of theirs is needed: neither flash-linear-attention nor Triton nor CUDA. Every tensor must have its place and
every place its tensor, in the right shape; what does not fit is an error, never a warning.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from depthwire.errors import CaptureError
from depthwire.models._checkpoint_config import config_fields
from depthwire.models._checkpoint_files import common_dtype, list_tensors, read_config, read_tensor
from depthwire.models._checkpoint_map import MAPS, CheckpointMap, Placed, Rule, place, read_map
from depthwire.models.attn_res import AttnResDecoder
from depthwire.models.attn_res_config import CONFIG, MODEL_TYPE, AttnResConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from depthwire.models._checkpoint_files import Stored

__all__ = ["MAPS", "CheckpointMap", "load_checkpoint", "read_map"]

_TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"
_IN_FP32 = ("_res_proj.weight", "_res_norm.weight", ".gate.weight", "e_score_correction_bias")
"""Weights that the decoder casts to fp32 where it uses them: they keep their stored dtype."""


def load_checkpoint(
    directory: str | Path, scheme: str | Path | None = None, *, dtype: torch.dtype | None = None
) -> AttnResDecoder:
    """Load a checkpoint into the reference decoder.

    Args:
        directory: Holds ``config.json`` and ``model.safetensors``, or an index with its shards.
        scheme: How its tensors are called: ``kimi-k3``, ``fla``, ``paper``, or a YAML file; ``None`` for what
            ``AttnResDecoder.save`` wrote.
        dtype: Of every weight; when absent, the dtype in which the checkpoint stores most of them, and queries, key
            norms and routers in their own.

    Returns:
        The decoder, in eval mode.

    Raises:
        UsageError: ``checkpoint.map``: the scheme cannot be read.
        CaptureError: ``checkpoint.*``: a file is missing or damaged, the configuration cannot be meant, a tensor is
            left over or missing, or a shape differs.
    """
    directory = Path(directory)
    tensors = list_tensors(directory)
    given = read_config(directory)
    if scheme is None:
        fields = _own_fields(directory, given)
        placed = [Placed(name, name, Rule.model_validate({"from": name})) for name in tensors]
    else:
        names = read_map(scheme)
        placed = place(names, tensors, at=str(directory))
        fields = _mapped_fields(names, given, placed, directory)
        tensors = {item.stored: tensors[item.stored] for item in placed}  # what the map ignores decides nothing
    config = AttnResConfig.from_dict(fields, at=str(directory / CONFIG))
    with torch.device("meta"):
        model = AttnResDecoder(config)
    default = dtype or _TORCH[common_dtype(tensors, at=str(directory))]
    state = _state(model, placed, tensors, directory)
    for name, tensor in state.items():
        kept = dtype is None and name.endswith(_IN_FP32)
        state[name] = (tensor if kept else tensor.to(default)).contiguous()
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _own_fields(directory: Path, given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given is None or given.get("model_type") != MODEL_TYPE:
        raise CaptureError(
            "checkpoint.config",
            "the checkpoint is not one of the reference decoder's own",
            at=str(directory / CONFIG),
            want=f"model_type {MODEL_TYPE!r}, or the name of a map",
            got="no config.json" if given is None else f"model_type {given.get('model_type')!r}",
            todo=f"Name its map: {', '.join(MAPS)}, or a YAML file (--checkpoint-map).",
        )
    return dict(given)


def _mapped_fields(
    names: CheckpointMap, given: Mapping[str, Any] | None, placed: list[Placed], directory: Path
) -> dict[str, Any]:
    """Return the fields of the configuration; what the tensors' presence decides is read off them."""
    fields: dict[str, Any] = {}
    if names.config_like is not None and given is not None:
        fields = config_fields(names.config_like, given, at=str(directory / CONFIG))
    present = {item.name for item in placed}
    fields["key_norm_gain"] = any(name.endswith("_res_norm.weight") for name in present)
    fields = {**fields, **names.config}
    moe = fields.get("moe")
    if isinstance(moe, dict) and "selection_bias" not in moe:
        bias = any(name.endswith("e_score_correction_bias") for name in present)
        fields["moe"] = {**moe, "selection_bias": bias}
    return fields


def _state(
    model: AttnResDecoder, placed: list[Placed], tensors: Mapping[str, Stored], directory: Path
) -> dict[str, Tensor]:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    by_name = {item.name: item for item in placed}
    tied = by_name.pop(_HEAD, None) if model.config.tied_embeddings else None
    left_over = [item.stored for name, item in sorted(by_name.items()) if name not in expected]
    if left_over:
        raise _counted(
            "checkpoint.left-over", "have no place in the decoder of this configuration", left_over, directory
        )
    missing = [name for name in sorted(expected) if name not in by_name]
    if missing:
        raise _counted("checkpoint.missing", "are missing from the checkpoint", missing, directory)
    state = {}
    for name, item in by_name.items():
        tensor = item.rule.lay_out(read_tensor(item.stored, tensors[item.stored]), item.stored)
        if tuple(tensor.shape) != expected[name]:
            raise CaptureError(
                "checkpoint.shape",
                "a weight of the checkpoint has another shape than the configuration says",
                at=f"{directory}: {item.stored}",
                want=f"{list(expected[name])} for {name}",
                got=str(list(tensor.shape)),
                todo="Correct the configuration, or give the rule of the map 'transpose' or 'reshape'.",
            )
        state[name] = tensor
    if tied is not None:
        head = tied.rule.lay_out(read_tensor(tied.stored, tensors[tied.stored]), tied.stored)
        if not torch.equal(head, state[_EMBEDDING]):
            raise CaptureError(
                "checkpoint.tied",
                "the configuration ties the output matrix to the embedding, and the checkpoint holds two",
                at=f"{directory}: {tied.stored}",
                want="equal values, or tie_word_embeddings false",
                got=f"{tied.stored} differs from {by_name[_EMBEDDING].stored}",
                todo="Set tied_embeddings: false under 'config' in a map of your own, if the matrix was trained.",
            )
    return state


def _counted(code: str, what: str, names: list[str], directory: Path) -> CaptureError:
    shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    return CaptureError(
        code,
        f"{len(names)} weights {what}",
        at=str(directory),
        want="every tensor in its place and every place filled",
        got=shown,
        todo="Check the configuration (layers, experts, tied embeddings) and the map; docs/models.md has the names.",
    )
