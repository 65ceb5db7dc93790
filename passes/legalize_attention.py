"""legalize_attention: scaled dot-product attention in elementary operations, for back ends without the fused one.

Before::  sdpa(q, k, v, mask, scale)       After::  p = softmax(masked_fill((q·scale) @ kᵀ, ¬mask, lowest));  p @ v

TensorRT-RTX 1.7 ends the process when it builds the ONNX ``Attention`` operator ahead of time; matrix products and a
softmax build everywhere. Causal masks become one shared constant per shape, and each mask is inverted once. A row that
is masked out entirely gives zeros, as in torch: where such a row cannot be ruled out, the weights are masked again
behind the softmax.
Refused: dropout in attention, which inference does not have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import argument, aten, is_call, value

if TYPE_CHECKING:
    from depthwire.program import Program

_SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class LegalizeAttention(Pass):
    """Spell attention out in matrix products and a softmax."""

    name: ClassVar[str] = "legalize_attention"
    adds_constants: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """Rewrite every scaled dot-product attention."""
        verdicts = [(node, _match(node)) for node in program.exported.graph.nodes if is_call(node, _SDPA)]
        declines = tuple(verdict for _, verdict in verdicts if isinstance(verdict, Decline))
        matches = [(node, verdict) for node, verdict in verdicts if isinstance(verdict, _Attention)]
        if not matches:
            return PassResult(program, 0, declines)
        edit = GraphEditor(program, self.name)
        rewriter = _Rewriter(edit, program)
        for node, match in matches:
            rewriter.rewrite(edit.copy_of(node), match)
        return PassResult(edit.finish(), len(matches), declines)


@dataclass(frozen=True)
class _Attention:
    """What one attention call means.

    Attributes:
        scale: Factor on the logits.
        causal: Whether the mask is the lower triangle.
        key_groups: Query heads per key head (1 unless grouped-query attention is left to the operator).
        value_groups: Query heads per value head.
    """

    scale: float
    causal: bool
    key_groups: int
    value_groups: int


def _match(node: torch.fx.Node) -> _Attention | Decline:
    if argument(node, 4, "dropout_p", 0.0):
        return Decline("legalize-attention.dropout", where(node), "dropout_p = 0", str(argument(node, 4, "dropout_p")))
    operands: Any = node.args[:3]
    query, key, values = (value(operand).shape for operand in operands)
    scale = argument(node, 6, "scale")
    grouped = argument(node, 7, "enable_gqa", default=False)
    key_groups, value_groups = (query[-3] // key[-3], query[-3] // values[-3]) if grouped else (1, 1)
    factor = 1 / math.sqrt(query[-1]) if scale is None else float(scale)
    return _Attention(factor, bool(argument(node, 5, "is_causal", default=False)), int(key_groups), int(value_groups))


class _Rewriter:
    def __init__(self, edit: GraphEditor, program: Program) -> None:
        self._edit = edit
        self._hidden: dict[object, torch.fx.Node] = {}
        specs = program.exported.graph_signature.input_specs
        self._constants = {
            spec.arg.name: program.exported.constants[str(spec.target)]
            for spec in specs
            if str(spec.target) in program.exported.constants
        }

    def rewrite(self, node: torch.fx.Node, match: _Attention) -> None:
        query, key, values = node.args[:3]
        key, values = self._repeat(key, match.key_groups, node), self._repeat(values, match.value_groups, node)
        scaled = self._call(aten.mul.Tensor, (query, match.scale), node)
        transposed = self._call(aten.transpose.int, (key, -2, -1), node)
        scores = self._call(aten.matmul.default, (scaled, transposed), node)
        if match.causal:
            weights = self._masked(scores, self._causal(scores), node, empty_rows=False)
        else:
            weights = self._softmax(scores, argument(node, 3, "attn_mask"), node)
        out = self._call(aten.matmul.default, (weights, values), node)
        self._edit.replace(node, out, keep_name=True)

    def _call(self, target: Any, args: tuple[Any, ...], node: torch.fx.Node) -> torch.fx.Node:
        return self._edit.call(target, args, before=node, like=node)

    def _repeat(self, tensor: Any, groups: int, node: torch.fx.Node) -> torch.fx.Node:
        """Repeat every key head for its group of query heads: ``[..., Hk, T, d]`` -> ``[..., Hk·groups, T, d]``."""
        if groups == 1:
            return tensor  # type: ignore[no-any-return]
        *batch, heads, length, width = (int(dim) for dim in value(tensor).shape)
        wide = self._call(aten.unsqueeze.default, (tensor, -3), node)
        wide = self._call(aten.expand.default, (wide, [*batch, heads, groups, length, width]), node)
        return self._call(aten.reshape.default, (wide, [*batch, heads * groups, length, width]), node)

    def _causal(self, scores: torch.fx.Node) -> torch.fx.Node:
        """Return what a causal mask hides, aligned to the upper left as torch defines it for unequal lengths."""
        rows, columns = (int(dim) for dim in value(scores).shape[-2:])
        if (rows, columns) not in self._hidden:
            hidden = torch.ones(rows, columns, dtype=torch.bool).triu(1)
            name = self._edit.free_constant_name("causal_hidden")
            self._hidden[rows, columns] = self._edit.add_constant(name, hidden)
        return self._hidden[rows, columns]

    def _inverted(self, mask: torch.fx.Node, node: torch.fx.Node) -> torch.fx.Node:
        """Return what a boolean mask hides; attention calls come in graph order, so all may read the first one's."""
        if mask not in self._hidden:
            known = self._known(mask)
            if known is None:
                self._hidden[mask] = self._call(aten.logical_not.default, (mask,), node)
            else:
                name = self._edit.free_constant_name("hidden")
                self._hidden[mask] = self._edit.add_constant(name, known.logical_not())
        return self._hidden[mask]

    def _softmax(self, scores: torch.fx.Node, mask: torch.fx.Node | None, node: torch.fx.Node) -> torch.fx.Node:
        if mask is None:
            return self._call(aten.softmax.int, (scores, -1), node)
        empty_rows = self._may_hide_rows(mask)
        if value(mask).dtype == torch.bool:
            return self._masked(scores, self._inverted(mask, node), node, empty_rows=empty_rows)
        masked = self._call(aten.add.Tensor, (scores, mask), node)
        weights = self._call(aten.softmax.int, (masked, -1), node)
        if not empty_rows:
            return weights
        best = self._call(aten.amax.default, (masked, [-1], True), node)
        empty = self._call(aten.eq.Scalar, (best, -math.inf), node)
        return self._call(aten.masked_fill.Scalar, (weights, empty, 0.0), node)

    def _masked(
        self, scores: torch.fx.Node, hidden: torch.fx.Node, node: torch.fx.Node, *, empty_rows: bool
    ) -> torch.fx.Node:
        # A finite fill keeps a row that is masked out entirely free of NaN; the second mask makes it zero.
        lowest = torch.finfo(value(scores).dtype).min
        masked = self._call(aten.masked_fill.Scalar, (scores, hidden, lowest), node)
        weights = self._call(aten.softmax.int, (masked, -1), node)
        return self._call(aten.masked_fill.Scalar, (weights, hidden, 0.0), node) if empty_rows else weights

    def _known(self, mask: torch.fx.Node) -> torch.Tensor | None:
        known = self._constants.get(mask.name)
        return known if isinstance(known, torch.Tensor) else None

    def _may_hide_rows(self, mask: torch.fx.Node) -> bool:
        """Tell whether a mask may leave some row nothing to attend to."""
        known = self._known(mask)
        if known is None:
            return True
        visible = known if known.dtype == torch.bool else known != -math.inf
        return not bool(visible.any(-1).all())
