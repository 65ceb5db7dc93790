"""A checkpoint's ``config.json`` as the shape of the reference decoder, for the naming schemes that ship."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Mapping

_FORMER = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "model_max_length": "max_position_embeddings",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "attnres_block_size": "attn_res_block_size",
}
"""Spelling of flash-linear-attention or of transformers -> the one used below."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "attn": (None,),
    "first_layer_dense": (None,),
    "hidden_act": ("silu", "swish"),
    "kv_lora_rank": (None,),
    "linear_attn_config": (None,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "moe_renormalize": (True,),
    "num_expert_group": (1, None),
    "num_nextn_predict_layers": (0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "q_lora_rank": (None,),
    "qk_norm": (False,),
    "qkv_bias": (False,),
    "rope_scaling": (None,),
    "routed_expert_hidden_size": (None,),
    "sliding_window": (None,),
    "topk_group": (1, None),
    "window_size": (None,),
}
"""What would change the function and that the reference decoder does not have -> the values that change nothing."""


def config_fields(kind: str, config: Mapping[str, Any], *, at: str) -> dict[str, Any]:
    """Translate a configuration into fields of ``AttnResConfig``.

    Args:
        kind: ``kimi-k3`` (blocks count transformer layers), ``fla`` or ``paper`` (blocks count sublayers).
        config: The parsed ``config.json``; a multimodal one's ``text_config`` is taken.
        at: The file, for errors.

    Raises:
        CaptureError: ``checkpoint.config``: a field is missing, or asks for what the decoder does not have.
    """
    text = config.get("text_config")
    given = {_FORMER.get(name, name): value for name, value in (text if isinstance(text, dict) else config).items()}
    for name, values in _NEUTRAL.items():
        if name in given and given[name] not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise _refused(at, f"{name} = {wanted}, which is all the reference decoder has", f"{given[name]!r}")
    reader = _Fields(given, at)
    width, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    mlp_width = given.get("intermediate_size") or _gated_width(width, given.get("hidden_ratio"))
    if mlp_width is None:
        raise _refused(at, "intermediate_size", "no such field")
    return {
        "vocab_size": reader.integer("vocab_size"),
        "width": width,
        "layers": reader.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": given.get("num_key_value_heads") or heads,
        "head_dim": given.get("head_dim") or width // heads,
        "mlp_width": mlp_width,
        "max_length": reader.integer("max_position_embeddings"),
        "rope_theta": _rope_theta(given, at),
        "residual": _residual(kind, given, at),
        "eps": float(reader.value("rms_norm_eps")),
        "tied_embeddings": bool(given.get("tie_word_embeddings", False)),
        "moe": _moe(reader) if given.get("num_experts") else None,
    }


def _residual(kind: str, given: Mapping[str, Any], at: str) -> str:
    size = given.get("attn_res_block_size")
    if kind == "kimi-k3":
        if isinstance(size, int) and size >= 1:
            return f"block-layers:{size}"
        raise _refused(at, "attn_res_block_size, the transformer layers of a block", repr(size))
    if size is None:
        if kind == "paper":
            return "full"
        raise _refused(at, "attnres_block_size; without it the model has an ordinary residual", repr(size))
    if size == 1:
        return "full"
    if not isinstance(size, int) or size < 1 or size % 2:
        raise _refused(at, "1 or an even number of sublayers per block", repr(size))
    return f"block-layers:{size // 2}"


def _moe(reader: _Fields) -> dict[str, Any]:
    width = reader.integer("moe_intermediate_size")
    return {
        "experts": reader.integer("num_experts"),
        "top_k": reader.integer("num_experts_per_token"),
        "width": width,
        "shared_width": width * int(reader.given.get("num_shared_experts") or 0),
        "router": reader.given.get("moe_router_activation_func", "softmax"),
        "scale": float(reader.given.get("routed_scaling_factor", 1.0)),
        "dense_layers": reader.given.get("first_k_dense_replace", 0),
    }


def _gated_width(width: int, ratio: object) -> int | None:
    """Return the hidden width that flash-linear-attention derives: 2/3 of the ratio, rounded up to 256."""
    if not isinstance(ratio, (int, float)):
        return None
    return 256 * ((int(width * ratio * 2 / 3) + 255) // 256)


def _rope_theta(given: Mapping[str, Any], at: str) -> float:
    rope = given.get("rope_parameters")
    parameters = rope if isinstance(rope, dict) else {}
    if parameters.get("rope_type", "default") != "default":
        raise _refused(at, "rope_type = 'default'", repr(parameters["rope_type"]))
    theta = parameters.get("rope_theta", given.get("rope_theta", 10000.0))
    if not isinstance(theta, (int, float)):
        raise _refused(at, "rope_theta, a number: the reference decoder has rotary positions", repr(theta))
    return float(theta)


class _Fields:
    """The fields of a configuration, asked for by name."""

    def __init__(self, given: Mapping[str, Any], at: str) -> None:
        self.given, self._at = given, at

    def value(self, name: str) -> Any:
        """Return a field that must be there."""
        if self.given.get(name) is None:
            raise _refused(self._at, name, "no such field")
        return self.given[name]

    def integer(self, name: str) -> int:
        """Return a field that must be an integer."""
        value = self.value(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise _refused(self._at, f"{name}, an integer", repr(value))
        return value


def _refused(at: str, want: str, got: str) -> CaptureError:
    return CaptureError(
        "checkpoint.config",
        "the configuration does not describe an AttnRes decoder",
        at=at,
        want=want,
        got=got,
        todo="Give the fields under 'config' in a map of your own (docs/models.md), if the weights allow it.",
    )
