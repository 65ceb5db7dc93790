"""Routed decoders from files: their own, and those of dense models that are to be routed.

A dense checkpoint is accounted for without a rest: every tensor of it has its place, and every weight of the model
either comes from it or belongs to a part that the dense model does not have (router, prior, gate, threshold). Anything
else is one error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from depthwire.errors import CaptureError
from depthwire.models._checkpoint_config import config_fields
from depthwire.models._checkpoint_files import common_dtype, list_tensors, read_config, read_tensor
from depthwire.models.attn_res_config import CONFIG, AttnResConfig
from depthwire.models.attn_res_config import MODEL_TYPE as ATTN_RES
from depthwire.models.mixture_of_depths import MixtureOfDepthsDecoder
from depthwire.models.routed_attn_res import RoutedAttnResDecoder
from depthwire.models.routing_config import MODEL_TYPE, RoutedConfig, RoutingConfig
from depthwire.models.subjective_depth import SubjectiveDepthDecoder
from depthwire.models.subjective_timescale import SubjectiveTimescaleDecoder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from depthwire.models._checkpoint_files import Stored
    from depthwire.models.routed_decoder import RoutedDecoder
    from depthwire.models.routing_config import Kind

_CLASSES: tuple[type[RoutedDecoder], ...] = (
    MixtureOfDepthsDecoder,
    SubjectiveDepthDecoder,
    SubjectiveTimescaleDecoder,
    RoutedAttnResDecoder,
)
_TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Converted:
    """A routed model and the account of its weights.

    Attributes:
        model: In eval mode; at capacity 1 it computes what the dense model computes.
        loaded: Names of the weights that the checkpoint gave.
        new: Names of those that it could not have: routers, priors, gates, thresholds.
    """

    model: RoutedDecoder
    loaded: tuple[str, ...]
    new: tuple[str, ...]


def build(config: RoutedConfig) -> RoutedDecoder:
    """Return an untrained model of this configuration."""
    (kind,) = (kind for kind in _CLASSES if kind.kind == config.kind)
    return kind(config)


def load_routed(directory: str | Path) -> RoutedDecoder:
    """Load what ``RoutedDecoder.save`` wrote, in eval mode and in the stored dtypes.

    Raises:
        CaptureError: ``checkpoint.*``: a file is missing or damaged, or names or shapes do not fit.
    """
    directory = Path(directory)
    tensors, given = list_tensors(directory), read_config(directory) or {}
    if given.get("model_type") != MODEL_TYPE:
        raise _not_this(directory, MODEL_TYPE, given)
    model = build(RoutedConfig.from_dict(given, at=str(directory / CONFIG)))
    expected = model.state_dict()
    left_over, missing = set(tensors) - set(expected), set(expected) - set(tensors)
    if left_over or missing:
        raise _unaccounted(directory, left_over, missing)
    state = {name: _read(name, stored, expected[name], directory) for name, stored in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def from_pretrained(
    directory: str | Path, kind: Kind, routing: RoutingConfig | None = None, *, dtype: torch.dtype | None = None
) -> Converted:
    """Give a trained dense model routers, without changing its function at capacity 1.

    Args:
        directory: A Hugging Face directory of the Llama family, or what ``AttnResDecoder.save`` wrote (``attn_res``
            needs one with AttnRes, the other kinds one with a plain residual).
        kind: What to make of it.
        routing: What to route, and how.
        dtype: Of the weights; when absent, the one in which the checkpoint stores most of them.

    Returns:
        The model and the account of its weights. What is new is drawn from torch's generator.

    Raises:
        CaptureError: ``checkpoint.*``: the model is of another family or has a part that the decoder lacks, a file is
            missing or damaged, or a tensor is left over, missing or of another shape.
        UsageError: ``routed-model.config``: the routing does not fit the model.
    """
    directory = Path(directory)
    tensors, given = list_tensors(directory), read_config(directory) or {}
    config = RoutedConfig(kind, _decoder(directory, given), routing or RoutingConfig())
    model = build(config)
    expected, new = model.state_dict(), model.new_weights()
    names: dict[str, str] = {}
    for stored in tensors:
        name = stored.removeprefix("model.")
        if name in names:
            raise CaptureError(
                "checkpoint.twice",
                "two tensors of the checkpoint are the same weight",
                at=str(directory),
                want=f"one tensor for {name}",
                got=f"{names[name]} and {stored}",
                todo="Leave one of them out of the checkpoint.",
            )
        names[name] = stored
    tied = names.pop("lm_head.weight", None) if config.decoder.tied_embeddings else None
    left_over = {names[name] for name in set(names) - (set(expected) - new)}
    missing = set(expected) - new - set(names)
    if left_over or missing:
        raise _unaccounted(directory, left_over, missing)
    loaded = {name: _read(stored, tensors[stored], expected[name], directory) for name, stored in names.items()}
    if tied is not None and not torch.equal(read_tensor(tied, tensors[tied]), loaded["embed_tokens.weight"]):
        raise CaptureError(
            "checkpoint.tied",
            "the configuration ties the output matrix to the embedding, and the checkpoint holds two",
            at=f"{directory}: {tied}",
            want="equal values, or tie_word_embeddings false",
            got=f"{tied} differs from the embedding",
            todo="Set tie_word_embeddings to false in config.json, if the matrix was trained.",
        )
    model.load_state_dict({**expected, **loaded}, strict=True)
    model.cast(dtype or _TORCH[common_dtype(tensors, at=str(directory))])
    return Converted(model.eval(), tuple(sorted(loaded)), tuple(sorted(new)))


def _decoder(directory: Path, given: Mapping[str, Any]) -> AttnResConfig:
    at = str(directory / CONFIG)
    if given.get("model_type") == ATTN_RES:
        return AttnResConfig.from_dict(given, at=at)
    if given.get("model_type") != "llama":
        raise _not_this(directory, f"llama' or '{ATTN_RES}", given)
    fields = config_fields("paper", given, at=at)
    return AttnResConfig.from_dict({**fields, "residual": "plain"}, at=at)


def _read(name: str, stored: Stored, like: Tensor, directory: Path) -> Tensor:
    if stored.shape != tuple(like.shape):
        raise CaptureError(
            "checkpoint.shape",
            "a weight of the checkpoint has another shape than the configuration says",
            at=f"{directory}: {name}",
            want=str(list(like.shape)),
            got=str(list(stored.shape)),
            todo="Correct the configuration.",
        )
    return read_tensor(name, stored)


def _unaccounted(directory: Path, left_over: set[str], missing: set[str]) -> CaptureError:
    names, what = (left_over, "have no place in the decoder") if left_over else (missing, "are missing")
    shown = ", ".join(sorted(names)[:6]) + (", …" if len(names) > 6 else "")
    return CaptureError(
        "checkpoint.left-over" if left_over else "checkpoint.missing",
        f"{len(names)} weights {what}",
        at=str(directory),
        want="every tensor in its place and every place filled",
        got=shown,
        todo="Check the configuration (layers, biases, tied embeddings, routing.layers).",
    )


def _not_this(directory: Path, want: str, given: Mapping[str, Any]) -> CaptureError:
    return CaptureError(
        "checkpoint.config",
        "the checkpoint is of another kind of model",
        at=str(directory / CONFIG),
        want=f"model_type '{want}'",
        got=f"model_type {given.get('model_type')!r}",
        todo="docs/models.md says what can be loaded as a routed decoder.",
    )
