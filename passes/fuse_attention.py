"""fuse_attention: repeated keys and values, and masks that are causal, become options of the attention itself.

Before::  sdpa(q, repeat(k), repeat(v), lower triangle)        After::  sdpa(q, k, v, is_causal=True, enable_gqa=True)

Query head h of a grouped-query model reads key head h // groups. Models write the repetition out, as an expansion and
a reshape or with ``repeat_interleave``, and make a mask ``[…, T, T]``; the operator needs neither. A mask that hides
nothing goes altogether. Masks are judged by their values, so only those that depend on no input are changed: -inf, or
the lowest number of the dtype, counts as hidden, since every row of a triangle has something else to see.
Refused: keys and values with different numbers of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import VIEWS, argument, aten, constants_of, is_call, value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from depthwire.program import Program

_SDPA = aten.scaled_dot_product_attention.default
_COPIES = (aten.clone.default, aten.contiguous.default)


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Let attention repeat keys and values and hide the future by itself."""

    name: ClassVar[str] = "fuse_attention"

    def run(self, program: Program) -> PassResult:
        """Simplify every scaled dot-product attention."""
        masks = _Masks(constants_of(program))
        calls = [node for node in program.exported.graph.nodes if is_call(node, _SDPA)]
        verdicts = [(node, _match(node, masks)) for node in calls]
        declines = tuple(verdict for _, verdict in verdicts if isinstance(verdict, Decline))
        matches = [(node, verdict) for node, verdict in verdicts if isinstance(verdict, _Simpler)]
        if not matches:
            return PassResult(program, 0, declines)
        edit = GraphEditor(program, self.name)
        for node, match in matches:
            _rewrite(node, match, edit)
        return PassResult(edit.finish(), len(matches), declines)


@dataclass(frozen=True)
class _Simpler:
    """What an attention call becomes.

    Attributes:
        key: Keys ``[…, Hk, S, d]``.
        values: Values ``[…, Hk, S, dv]``.
        mask: The mask that stays.
        causal: Whether the future is hidden.
        grouped: Whether there are fewer key heads than query heads.
    """

    key: torch.fx.Node
    values: torch.fx.Node
    mask: torch.fx.Node | None
    causal: bool
    grouped: bool


def _match(node: torch.fx.Node, masks: _Masks) -> _Simpler | Decline | None:
    operands: Any = node.args[:3]
    query, key, values = operands
    mask, causal = argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", default=False))
    kind = None if mask is None else masks.kind(mask, value(query).shape[-2], value(key).shape[-2])
    if kind is not None:
        mask, causal = None, kind == "causal"
    own, theirs = _unrepeated(key), _unrepeated(values)
    if own is key and theirs is values and kind is None:
        return None
    heads = [int(value(tensor).shape[-3]) for tensor in (query, own, theirs) if value(tensor).dim() > 2]
    if len(heads) == 3 and heads[1] != heads[2]:
        if kind is None:
            return Decline("fuse-attention.heads", where(node), "as many key heads as value heads", f"{heads[1:]}")
        own, theirs = key, values
        heads = [int(value(tensor).shape[-3]) for tensor in (query, own, theirs)]
    return _Simpler(own, theirs, mask, causal, len(set(heads)) > 1)


def _unrepeated(node: torch.fx.Node) -> torch.fx.Node:
    """Return the heads that a tensor ``[…, H, S, d]`` repeats for their groups of query heads, else the tensor."""
    if value(node).dim() < 4:
        return node
    inner: Any = _uncopied(node)
    if is_call(inner, aten.repeat_interleave.self_int):
        source = inner.args[0]
        return source if argument(inner, 2, "dim") in (-3, value(source).dim() - 3) else node
    source = inner.args[0] if is_call(inner, aten.expand.default) else None
    if isinstance(source, torch.fx.Node) and value(source).dim() == value(inner).dim():  # one head for all
        same = [a == b for a, b in zip(value(source).shape, value(inner).shape, strict=True)]
        return source if same[-3:] == [False, True, True] and all(same[:-3]) else node
    wide: Any = _uncopied(inner.args[0]) if is_call(inner, aten.reshape.default, *VIEWS) else None
    apart: Any = wide.args[0] if is_call(wide, aten.expand.default) else None
    if not is_call(apart, aten.unsqueeze.default):
        return node
    source = apart.args[0]
    *batch, heads, length, width = value(source).shape
    groups = value(wide).shape[-3]
    repeats = (
        apart.args[1] in (-3, len(batch) + 1)
        and list(value(wide).shape) == [*batch, heads, groups, length, width]
        and list(value(node).shape) == [*batch, heads * groups, length, width]
    )
    return source if repeats else node


def _uncopied(node: Any) -> Any:
    while is_call(node, *_COPIES):
        node = node.args[0]
    return node


class _Masks:
    """What constant masks hide; layers share them, so each is looked at once."""

    def __init__(self, constants: Mapping[str, torch.Tensor]) -> None:
        self._constants = constants
        self._known: dict[str, Literal["causal", "nothing"] | None] = {}

    def kind(self, mask: torch.fx.Node, rows: int, columns: int) -> Literal["causal", "nothing"] | None:
        """Return ``causal`` or ``nothing`` for a constant mask of all heads that hides just that."""
        if mask.name not in self._known:
            known = self._constants.get(mask.name)
            self._known[mask.name] = None if known is None else _judge(known, rows, columns)
        return self._known[mask.name]


def _judge(mask: torch.Tensor, rows: int, columns: int) -> Literal["causal", "nothing"] | None:
    if mask.dtype == torch.bool:
        hidden = ~mask
    else:
        hidden = mask <= torch.finfo(mask.dtype).min
        if not bool((hidden | (mask == 0)).all()):
            return None
    if not bool(hidden.any()):
        return "nothing"
    # For unequal lengths torch and ONNX do not align the triangle alike in every version.
    if rows != columns or list(mask.shape[-2:]) != [rows, columns]:
        return None
    future = torch.ones(rows, columns, dtype=torch.bool, device=mask.device).triu(1)
    return "causal" if bool((hidden == future).all()) else None


def _rewrite(node: torch.fx.Node, match: _Simpler, edit: GraphEditor) -> None:
    output = edit.copy_of(node)
    mask = None if match.mask is None else edit.copy_of(match.mask)
    operands = (output.args[0], edit.copy_of(match.key), edit.copy_of(match.values), mask)
    options = {"scale": argument(node, 6, "scale"), "enable_gqa": match.grouped}
    options = {key: option for key, option in options.items() if option not in (None, False)}
    dropout = argument(node, 4, "dropout_p", 0.0)
    new = edit.call(_SDPA, (*operands, dropout, match.causal), options, before=output, like=output)
    edit.replace(output, new, keep_name=True)
