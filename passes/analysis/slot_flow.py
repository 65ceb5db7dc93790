"""Whether a routed block may have its slots in another order, and other rows in the slots that hold no token.

The operators put the selected tokens first, ascending, and real tokens into the slots that are left. A model may do
otherwise: padding in between, rows of zeros. Both compute the same for every selected token if the block treats each
slot by itself, and if attention, where slots meet, sees the same selected tokens and no other slot. The first is read
off the operations (``token_axes``), the second off the masks' values before and after.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthwire.passes._match import CASTS, argument, aten, is_call, value
from depthwire.passes.analysis.token_axes import RESHAPES, SOFTMAX, Axes, TokenAxisError, kept, moved, reshaped
from depthwire.passes.analysis.token_routing import Role, own_slots
from depthwire.passes.analysis.token_rules import Slots, points, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from depthwire.passes.analysis.token_routing import Finder, Routing

Node = torch.fx.Node
_SDPA = aten.scaled_dot_product_attention.default
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_JOINS = (aten.cat.default, aten.stack.default)
# Elementwise, but not tagged so.
_EACH = (aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten.clone.default, aten.contiguous.default)
_HIDDEN = -1e4  # what a mask of numbers adds where nothing is to be seen; the least that fp16 models use
_ENTRIES = (Role.INDEX, Role.TAKEN, Role.SCORES, Role.WIDE)


class SlotFlow:
    """Follows the slots from where rows are taken out to where they are put back.

    Attributes:
        wrong: Why the order of the slots matters and where; ``None`` if it does not.
    """

    def __init__(self, finder: Finder, routing: Routing, moves: Iterable[Node]) -> None:
        """Follow one routing.

        Args:
            finder: Evaluates masks.
            routing: What is looked at.
            moves: Where rows are taken out.
        """
        self._finder, self._routing = finder, routing
        self._axes: dict[Node, Axes] = {node: {1: 1} for node, role in routing.roles.items() if role in _ENTRIES}
        self._axes |= {node: {1: 1} for node in moves}
        entries = set(self._axes)
        self._slots, self._closure = routing.rule.slots, set(routing.closure)
        puts = {put.node: put for put in routing.puts}
        turned = {node for node, role in routing.roles.items() if role in (Role.TURNED, Role.MATRIX, Role.BITS)}
        self.wrong: tuple[str, Node] | None = None
        for node in finder.exported.graph.nodes:
            if node in entries or self._axes.keys().isdisjoint(node.all_input_nodes):
                continue
            if node in puts and not puts[node].matrix:
                if self._axes.get(puts[node].rows) != {1: 1}:
                    self.wrong = ("slots-mixed", node)
                continue
            if not turned.isdisjoint(node.all_input_nodes):
                continue  # a product that puts rows back
            try:
                self._axes[node] = self._through(node)
            except TokenAxisError:
                # A step of the choice itself matters only if something else reads it.
                self.wrong = None if node in self._closure else ("slots-mixed", node)
            except _AttentionError as error:
                self.wrong = (str(error), node)
            if self.wrong:
                return

    def _through(self, node: Node) -> Axes:
        if node.op != "call_function":
            raise TokenAxisError("leaves the block")
        mask = argument(node, 3, "attn_mask") if is_call(node, _SDPA) else None  # looked at by its values
        if any(part in self._closure and part not in self._axes and part is not mask for part in node.all_input_nodes):
            raise TokenAxisError("meets a value of the choice that is in another order")
        methods: dict[tuple[Any, ...], Callable[[Node], Axes]] = {
            (_SDPA,): self._attention,
            (aten.linear.default, *_PRODUCTS): self._product,
            (aten.einsum.default,): self._einsum,
            _JOINS: self._join,
            (aten.gather.default, aten.index.Tensor): self._looked_up,
        }
        for targets, method in methods.items():
            if is_call(node, *targets):
                return method(node)
        first: Any = node.args[0] if node.args else None
        found = self._along(node, first) if isinstance(first, Node) and first in self._axes else None
        if found is not None:
            return found
        if torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_call(node, *_EACH, *CASTS):
            return self._united(node.all_input_nodes, value(node).dim())
        raise TokenAxisError("is not known to keep slots apart")

    def _along(self, node: Node, source: Node) -> Axes | None:
        """Return where the slots are behind an operation that moves axes or works along others; else ``None``."""
        axes = self._axes[source]
        if is_call(node, operator.getitem):
            return axes
        if is_call(node, *RESHAPES):
            before, after = ([int(n) for n in value(end).shape] for end in (source, node))
            found = reshaped(before, after, axes, self._slots)
            if found is None:
                raise TokenAxisError("joins the slots with another axis")
            return found
        if is_call(node, *SOFTMAX):
            if int(argument(node, 1, "dim", -1)) % value(node).dim() in axes:
                raise TokenAxisError("normalises over slots")
            return axes
        if is_call(node, aten.expand.default):
            return {axis + value(node).dim() - value(source).dim(): lead for axis, lead in axes.items()}
        found = moved(node, axes)
        return kept(node, axes) if found is None else found

    def _united(self, operands: Iterable[Node], rank: int) -> Axes:
        found: Axes = {}
        for operand in operands:
            shift = rank - value(operand).dim()
            found |= {axis + shift: lead for axis, lead in self._axes.get(operand, {}).items()}
        return found

    def _looked_up(self, node: Node) -> Axes:
        """Take entries out of a table that is given, such as the padding mask, by each slot's index."""
        source: Any = node.args[0]
        gathers = is_call(node, aten.gather.default)
        index: Any = node.args[2] if gathers else node.args[1][-1]  # type: ignore[index]
        if source in self._axes or self._axes.get(index) != {1: 1} or (gathers and node.args[1] != 1):
            raise TokenAxisError("takes slots out of slots")
        return {1: 1}

    def _join(self, node: Node) -> Axes:
        parts: Any = node.args[0]
        stacks, rank = is_call(node, aten.stack.default), value(node).dim()
        axes = self._united(parts, rank - stacks)
        along = int(argument(node, 1, "dim", 0)) % rank
        if stacks:
            return {axis + (axis >= along): lead for axis, lead in axes.items()}
        if along in axes:
            raise TokenAxisError("joins slots with slots")
        return axes

    def _product(self, node: Node) -> Axes:
        """Multiply every slot's row by a weight; products of slots with slots are attention in other words."""
        first: Any = node.args[0]
        axes = self._axes.get(first, {})
        others = [operand for operand in node.all_input_nodes if operand is not first]
        if value(first).dim() - 1 in axes or any(operand in self._axes for operand in others):
            raise TokenAxisError("multiplies slots with slots")
        return dict(axes)

    def _einsum(self, node: Node) -> Axes:
        equation, operands = node.args[0], node.args[1]
        left, _, right = str(equation).replace(" ", "").partition("->")
        if "." in left or not right:
            raise TokenAxisError("is a product in another form")
        labels = set()
        for letters, operand in zip(left.split(","), operands, strict=True):  # type: ignore[arg-type]
            labels |= {(letters[axis], lead) for axis, lead in self._axes.get(operand, {}).items()}
        if any(letter not in right for letter, _ in labels):
            raise TokenAxisError("sums over slots")
        return {right.index(letter): lead for letter, lead in labels}

    def _attention(self, node: Node) -> Axes:
        operands: tuple[Any, ...] = node.args
        query, keys, values = operands[:3]
        rank = value(node).dim()
        slots = {rank - 2: 1}
        own, mask = self._axes.get(keys, {}), argument(node, 3, "attn_mask")
        if self._axes.get(query) != slots or own != self._axes.get(values, {}) or own not in ({}, slots):
            raise TokenAxisError("is attention in another layout")
        causal = bool(argument(node, 5, "is_causal", default=False))
        for before, after in self._tests(mask, node):
            if causal and not own:
                raise TokenAxisError("is causal attention of slots over tokens")
            if own and causal and not self._routing.rule.sorted:
                raise _AttentionError("unsorted")
            hidden = _is_prefix(before[0]) if causal else not own
            if mask is None and not hidden and not bool(before[0].taken.all()):
                raise _AttentionError("padding-visible")
            if mask is not None and value(mask).dim() != rank:
                raise TokenAxisError("has a mask of another rank")
            if mask is not None and not _same_view(before, after, slots=bool(own), hidden=hidden):
                raise _AttentionError("padding-visible" if own else "slots-mixed")
        return slots

    def _tests(self, mask: Node | None, attention: Node) -> list[tuple[tuple[Slots, Any], tuple[Slots, Any]]]:
        """Return the slots and the mask before and after, at every point."""
        routing, found = self._routing, []
        put = routing.puts[0]
        closure = self._closure
        if mask is not None and mask not in closure and mask not in self._finder.given.nodes:
            raise TokenAxisError(f"has a mask that depends on states: {attention.name}")
        for point in points(routing.core, routing.shape, padded=routing.mask is not None):
            wanted = reference(point, routing.rule.slots, routing.rule.budget)
            before = self._finder.closed(routing, point, {})
            own = own_slots(put, before, wanted, routing.shape[1])
            if own is None:  # every point has been looked at before
                raise TokenAxisError("is another rule")
            known = {
                node: _as_operator(role, wanted, value(node))
                for node, role in routing.roles.items()
                if role in _ENTRIES[:2]
            }
            after = self._finder.closed(routing, point, known)
            views = [None if mask is None else known.get(mask) for known in (before, after)]
            if mask is not None and mask not in closure:
                views = [self._finder.masked(routing, point, mask)] * 2
                if views[0] is None:
                    raise TokenAxisError("has a mask that depends on another input")
            found.append(((own, views[0]), (wanted, views[1])))
        return found


class _AttentionError(Exception):
    """Attention sees what it must not; the message is the reason."""


def _as_operator(role: Role, wanted: Slots, like: Tensor) -> Tensor:
    tensor = wanted.index if role is Role.INDEX else wanted.taken
    shape = (*tensor.shape, *([1] * (like.dim() - 2)))
    return tensor.reshape(shape).expand(like.shape).to(like.dtype)


def _is_prefix(slots: Slots) -> bool:
    return not bool((slots.taken[:, 1:] & ~slots.taken[:, :-1]).any())


def _same_view(before: tuple[Slots, Tensor], after: tuple[Slots, Tensor], *, slots: bool, hidden: bool) -> bool:
    """Tell whether every selected query sees the same selected keys, and no other slot.

    Args:
        before: The model's slots and mask.
        after: The operator's.
        slots: Whether keys are slots, too.
        hidden: Whether other slots are hidden by something else than the mask.
    """
    views = []
    for own, mask in (before, after):
        visible = mask if mask.dtype == torch.bool else mask > _HIDDEN
        batch, count = own.index.shape
        visible = visible.expand(batch, visible.shape[1], count, visible.shape[3])
        rows = []
        for row in range(batch):
            ids = own.index[row].masked_fill(~own.taken[row], int(own.index.max()) + 1).argsort()
            ids = ids[: int(own.taken[row].sum())]
            seen = visible[row][:, ids]
            if slots:
                if not hidden and bool(seen[:, :, ~own.taken[row]].any()):
                    return False
                seen = seen[:, :, ids]
            rows.append(seen)
        views.append(rows)
    return all(torch.equal(a, b) for a, b in zip(*views, strict=True))
