"""The shape of an AttnRes decoder, checked when it is made."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from depthwire.errors import UsageError
from depthwire.models._config_json import read_config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG = "config.json"
MODEL_TYPE = "depthwire_attn_res"
_BLOCK = re.compile(r"block-layers:([1-9][0-9]*)")


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in place of the MLP.

    Attributes:
        experts: Experts per layer.
        top_k: Experts per token.
        width: Hidden width of one expert.
        shared_width: Hidden width of the expert that every token takes; 0 for none.
        router: Scores of the experts: ``softmax`` over all of them, or a ``sigmoid`` of each.
        selection_bias: Whether a learned bias is added to the scores for the choice alone, not for the weights
            (``e_score_correction_bias`` of Kimi K3).
        scale: Factor on the weights, which sum to 1 before it.
        dense_layers: The first so many layers keep a plain MLP.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    experts: int
    top_k: int
    width: int
    shared_width: int = 0
    router: Literal["softmax", "sigmoid"] = "softmax"
    selection_bias: bool = False
    scale: float = 1.0
    dense_layers: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that make no mixture."""
        _at_least("moe", self, {"experts": 1, "top_k": 1, "width": 1, "shared_width": 0, "dense_layers": 0})
        if self.top_k > self.experts:
            raise _refused("moe.top_k", f"1 to {self.experts}, the number of experts", str(self.top_k))


@dataclass(frozen=True)
class AttnResConfig:
    """A decoder-only transformer whose sublayers read the depth.

    Attributes:
        vocab_size: Rows of the embedding.
        width: d, features of the residual stream.
        layers: Transformer layers; each is one attention and one MLP sublayer.
        heads: Query heads.
        kv_heads: Key and value heads; divides ``heads``.
        head_dim: Features per head; even.
        mlp_width: Hidden width of the SwiGLU MLP.
        max_length: Longest sequence, in tokens.
        rope_theta: Base of the rotary positions.
        residual: ``full`` (every sublayer's output is a source), ``block-layers:K`` (a source per K transformer
            layers, boundaries before attention: Kimi K3's rule) or ``plain`` (an ordinary residual sum).
        norm: Kind of the norms before the sublayers and of the final one. The key norm of a read is an RMSNorm always.
        eps: Of every norm, the key norms among them.
        key_norm_gain: Whether the key norms have a gain.
        tied_embeddings: Whether the embedding is the output matrix as well.
        moe: Experts in place of the MLP, ``None`` for none.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_length: int = 512
    rope_theta: float = 10000.0
    residual: str = "full"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    eps: float = 1e-5
    key_norm_gain: bool = True
    tied_embeddings: bool = True
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that make no decoder."""
        sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width", "max_length")
        _at_least("config", self, dict.fromkeys(sizes, 1))
        if self.heads % self.kv_heads:
            raise _refused("kv_heads", f"a divisor of heads = {self.heads}", str(self.kv_heads))
        if self.head_dim % 2:
            raise _refused("head_dim", "an even number, for rotary positions", str(self.head_dim))
        if self.residual not in ("full", "plain") and not _BLOCK.fullmatch(self.residual):
            raise _refused("residual", "full, block-layers:K or plain", repr(self.residual))
        if self.norm not in ("rmsnorm", "layernorm"):
            raise _refused("norm", "rmsnorm or layernorm", repr(self.norm))
        if not self.eps > 0:
            raise _refused("eps", "a positive number", str(self.eps))

    @property
    def block_layers(self) -> int | None:
        """Transformer layers per block; ``None`` unless the residual is a block's."""
        match = _BLOCK.fullmatch(self.residual)
        return int(match[1]) if match else None

    def save(self, file: Path) -> None:
        """Write the configuration as JSON."""
        fields = {"model_type": MODEL_TYPE, **asdict(self)}
        file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, at: str) -> AttnResConfig:
        """Read a configuration that ``save`` wrote.

        Args:
            fields: The parsed JSON.
            at: Where it came from, for the error.

        Raises:
            CaptureError: ``checkpoint.config``: a field is unknown, missing, of another type or out of range.
        """
        return read_config(cls, fields, what="an AttnRes decoder", at=at)


def _at_least(where: str, config: object, lowest: Mapping[str, int]) -> None:
    for name, least in lowest.items():
        size = getattr(config, name)
        if size < least:
            raise _refused(name if where == "config" else f"{where}.{name}", f"at least {least}", str(size))


def _refused(field: str, want: str, got: str) -> UsageError:
    return UsageError(
        "attn-res.config",
        f"an AttnRes decoder cannot have this {field}",
        at=field,
        want=want,
        got=got,
        todo="docs/models.md describes every field.",
    )
