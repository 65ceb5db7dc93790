"""What meets the selected tokens from outside: tables and masks gathered at their positions, and masks of the slots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import aten, value
from depthwire.passes.analysis.routing_ops import GATHER
from depthwire.passes.analysis.token_axes import TokenAxisError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from depthwire.passes._edit import GraphEditor
    from depthwire.passes.analysis.token_axes import Place

FRONT: Place = (0, 1)


@dataclass(frozen=True)
class Selection:
    """Which tokens are computed.

    Attributes:
        index: ``[B, K]`` int64.
        taken: ``[B, K]`` bool; ``None`` if every slot is known to hold a selected token.
        tokens: T.
        slots: K.
        all_keys: Whether all tokens are keys and values.
    """

    index: torch.fx.Node
    taken: torch.fx.Node | None
    tokens: int
    slots: int
    all_keys: bool

    @property
    def batch(self) -> int:
        """B."""
        return int(value(self.index).shape[0])


@dataclass
class TokenTables:
    """Tables and masks of one selection, each made once.

    Attributes:
        edit: The graph.
        selection: Which tokens.
        constants: The program's constants, by the names of their nodes.
        place: Before which node new ones are inserted.
    """

    edit: GraphEditor
    selection: Selection
    constants: Mapping[str, torch.Tensor]
    place: torch.fx.Node
    _made: dict[object, torch.fx.Node] = field(default_factory=dict)

    def call(self, target: Any, args: Any, like: torch.fx.Node, kwargs: Any = None) -> torch.fx.Node:
        """Insert a call that stands for ``like``, whose name it takes if it is the same operator."""
        name = f"{like.name}_routed" if target is like.target else None
        if like.op != "call_function":
            like = self.place  # an input has no provenance
        return self.edit.call(target, args, kwargs, before=self.place, like=like, name=name)

    def rows(self, node: torch.fx.Node) -> torch.fx.Node:
        """Return the selected rows of a value ``[B, T, …]``."""
        key = ("rows", node)
        if key not in self._made:
            self._made[key] = self.call(GATHER, (node, self.selection.index), node)
        return self._made[key]

    def take(self, node: torch.fx.Node, axes: tuple[int, ...], rank: int, batch: Place | None) -> torch.fx.Node:
        """Return a table or mask at the selected tokens' positions.

        Args:
            node: The table.
            axes: Along which axes tokens are selected, counted in the value that the table is broadcast to.
            rank: Rank of that value.
            batch: Where that value has its batch.

        Raises:
            TokenAxisError: The table has another number of tokens, or the value's batch is not its first axis.
        """
        key = (node, axes, rank)
        if key not in self._made:
            self._made[key] = self._taken(node, axes, rank, batch)
        return self._made[key]

    def _taken(self, node: torch.fx.Node, axes: tuple[int, ...], rank: int, batch: Place | None) -> torch.fx.Node:
        shape = [int(size) for size in value(node).shape]
        shift = rank - len(shape)
        for axis in axes:
            if shape[axis - shift] != self.selection.tokens:
                raise TokenAxisError(f"meets {node.name}, which has {shape[axis - shift]} along the axis of the tokens")
        table = node
        if self.selection.batch == 1:
            for axis in axes:
                table = self.call(aten.index_select.default, (table, axis - shift, self._flat_index(node)), node)
            return table
        if batch != FRONT or 0 in axes:
            raise TokenAxisError(f"meets {node.name} in a value whose first axis is not the batch")
        if shift:
            shape = [1] * shift + shape
            table = self.call(aten.reshape.default, (table, shape), node)
        if shape[0] == 1:
            table = self.call(aten.expand.default, (table, [self.selection.batch, *shape[1:]]), node)
        for axis in axes:
            front = table if axis == 1 else self.call(aten.transpose.int, (table, 1, axis), node)
            front = self.call(GATHER, (front, self.selection.index), node)
            table = front if axis == 1 else self.call(aten.transpose.int, (front, 1, axis), node)
        return table

    def _flat_index(self, like: torch.fx.Node) -> torch.fx.Node:
        if "flat" not in self._made:
            self._made["flat"] = self.call(aten.reshape.default, (self.selection.index, [-1]), like)
        return self._made["flat"]

    def visible_keys(self, like: torch.fx.Node, batch: Place | None = FRONT) -> torch.fx.Node:
        """Return ``[B, 1, K, K]``: the taken slots; each slot sees itself, so that no row of a softmax is empty.

        For scores of another rank, or with batch and heads in one axis, the mask has their layout.

        Raises:
            TokenAxisError: It is not known where the scores have their batch.
        """
        slots, rank = self.selection.slots, value(like).dim()
        if "visible" not in self._made:
            own = self._constant("route_own_slot", torch.eye(slots, dtype=torch.bool))
            taken = self.call(aten.reshape.default, (self.selection.taken, [self.selection.batch, 1, 1, slots]), like)
            self._made["visible"] = self.call(aten.logical_or.default, (taken, own), like)
        if rank == 4 and batch == FRONT:
            return self._made["visible"]
        if batch is None or batch[0] > rank - 3:
            raise TokenAxisError("is attention whose batch cannot be told from its heads")
        key = ("visible", rank, batch)
        if key not in self._made:
            axis, inner = batch
            shape = [1] * (rank - 2) + [slots, slots]
            shape[axis] = self.selection.batch * inner
            spread = (self._made["visible"], [self.selection.batch, inner, slots, slots])
            self._made[key] = self.call(
                aten.reshape.default, (self.call(aten.expand.default, spread, like), shape), like
            )
        return self._made[key]

    def triangle(self, operand: torch.fx.Node) -> torch.fx.Node | None:
        """Return the K x K corner of a constant causal mask, which is the mask of the slots; else ``None``."""
        if not self.is_causal(operand):
            return None
        slots = self.selection.slots
        corner = self.constants[operand.name][..., :slots, :slots].contiguous()
        return self._constant(f"route_{operand.name}", corner)

    def is_causal(self, operand: torch.fx.Node) -> bool:
        """Tell whether a value is the constant causal mask over all tokens."""
        known = self.constants.get(operand.name)
        return known is not None and is_causal(known, self.selection.tokens)

    def past(self, node: torch.fx.Node) -> torch.fx.Node:
        """Return ``[B, 1, K, T]``: for every selected query, the tokens up to its own position."""
        if "past" not in self._made:
            positions = self._constant("route_positions", torch.arange(self.selection.tokens))
            own = self.call(aten.reshape.default, (self.selection.index, [self.selection.batch, 1, -1, 1]), node)
            self._made["past"] = self.call(aten.ge.Tensor, (own, positions), node)
        return self._made["past"]

    def mask_of(self, mask: torch.fx.Node | None, node: torch.fx.Node, *, causal: bool) -> tuple[Any, bool]:
        """Return the mask of a routed attention ``[B, heads, tokens, width]``, and whether it is the causal one.

        Args:
            mask: The mask over all tokens.
            node: The attention.
            causal: Whether it is causal, by its flag or its mask.
        """
        if self.selection.all_keys:
            if causal:
                return self.past(node), False
            return (None if mask is None else self._mask_rows(mask, (2,))), False
        if causal:
            return None, True  # slots are in the order of the tokens, and what no token has taken comes last
        rows = None if mask is None else self._mask_rows(mask, (2, 3))
        if self.selection.taken is None:
            return rows, False
        key = ("mask", mask)
        if key not in self._made:
            visible = self.visible_keys(node)
            self._made[key] = visible if rows is None else self._joined(rows, visible, node)
        return self._made[key], False

    def _mask_rows(self, mask: torch.fx.Node, axes: tuple[int, ...]) -> torch.fx.Node:
        shape = value(mask).shape
        wide = tuple(axis for axis in axes if axis - 4 >= -len(shape) and shape[axis - 4] != 1)
        return self.take(mask, wide, 4, FRONT) if wide else mask

    def _joined(self, rows: torch.fx.Node, visible: torch.fx.Node, node: torch.fx.Node) -> torch.fx.Node:
        if value(rows).dtype == torch.bool:
            return self.call(aten.logical_and.default, (rows, visible), node)
        return self.masked(rows, visible, node)

    def masked(self, scores: torch.fx.Node, visible: torch.fx.Node, node: torch.fx.Node) -> torch.fx.Node:
        """Return scores that are as low as can be where nothing is visible."""
        hidden = self.call(aten.logical_not.default, (visible,), node)
        lowest = torch.finfo(value(scores).dtype).min
        shape = [max(sizes) for sizes in zip(value(scores).shape, value(hidden).shape, strict=True)]
        if shape != list(value(scores).shape):
            scores = self.call(aten.expand.default, (scores, shape), node)
        return self.call(aten.masked_fill.Scalar, (scores, hidden, lowest), node)

    def _constant(self, stem: str, tensor: torch.Tensor) -> torch.fx.Node:
        key = ("constant", stem)
        if key not in self._made:
            self._made[key] = self.edit.add_constant(self.edit.free_constant_name(stem), tensor)
        return self._made[key]


def is_causal(mask: torch.Tensor, tokens: int) -> bool:
    """Tell whether a constant is the causal mask of so many tokens: boolean, or zero and very negative."""
    if mask.dim() < 2 or tuple(mask.shape[-2:]) != (tokens, tokens) or mask.numel() != tokens**2:
        return False
    square = mask.reshape(tokens, tokens)
    past = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        return torch.equal(square, past)
    if not mask.dtype.is_floating_point:
        return False
    return bool((square[past] == 0).all()) and bool((square[~past] <= torch.finfo(mask.dtype).min).all())
