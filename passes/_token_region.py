"""A part of a graph once more, for K selected tokens instead of all T.

``TokenRegion.rows(node)`` returns the value of a node for the selected tokens. It goes back from the node to the
region's boundary, where the tokens are gathered, and repeats every operation in between on K tokens. What comes from
elsewhere (rotary tables, masks) is gathered where it meets the tokens. Attention is the only operation in which tokens
meet: its keys and values are the selected tokens, or all of them, and its masks are those of the tokens' own positions.

Slots hold the taken tokens first, in ascending order (``depthwire::select_tokens``): a causal mask over T tokens is
the causal mask over K slots.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from depthwire.errors import PassError
from depthwire.ops import gather_tokens  # noqa: F401 - registers the operator
from depthwire.passes._base import where
from depthwire.passes._match import CASTS, argument, aten, constants_of, is_call, value
from depthwire.passes.analysis.token_axes import (
    RESHAPES,
    SOFTMAX,
    Axes,
    TokenAxisError,
    kept,
    moved,
    reshaped,
    routed_shape,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from depthwire.passes._edit import GraphEditor
    from depthwire.program import Program

GATHER = torch.ops.depthwire.gather_tokens.default
_SDPA = aten.scaled_dot_product_attention.default
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_JOINS = (aten.cat.default, aten.stack.default)


@dataclass(frozen=True)
class Rows:
    """A value for the selected tokens.

    Attributes:
        node: The value.
        axes: Its routed axes.
        causal: Whether a causal mask over both of its token axes has been applied.
    """

    node: torch.fx.Node
    axes: Axes
    causal: bool = False


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


@dataclass
class TokenRegion:
    """The operations between gathered states and a sublayer's results.

    Attributes:
        edit: The graph.
        program: What the graph was made from; its constants are looked at.
        boundary: States ``[B, T, d]`` at which tokens are gathered.
        selection: Which tokens.
        place: Before which node new ones are inserted; moves from one result to the next.
    """

    edit: GraphEditor
    program: Program
    boundary: frozenset[torch.fx.Node]
    selection: Selection
    place: torch.fx.Node
    _known: dict[torch.fx.Node, Rows] = field(default_factory=dict)
    _gathered: dict[object, torch.fx.Node] = field(default_factory=dict)
    _inside: set[torch.fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Find what depends on the boundary."""
        self._inside = descendants(self.boundary)
        self._constants = constants_of(self.program)

    def rows(self, node: torch.fx.Node) -> Rows:
        """Return a node's value for the selected tokens.

        Raises:
            PassError: ``route.operation``: an operation in between does not keep tokens apart.
        """
        for step in self._order(node):
            if step not in self._known:
                try:
                    self._known[step] = self._emit(step)
                except TokenAxisError as error:
                    raise _refusal(step, str(error)) from error
        return self._known[node]

    def gather(self, node: torch.fx.Node) -> torch.fx.Node:
        """Return the selected rows of a value ``[B, T, …]``."""
        key = ("rows", node)
        if key not in self._gathered:
            self._gathered[key] = self._call(GATHER, (node, self.selection.index), node)
        return self._gathered[key]

    def _order(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """Return the nodes that a value is made of, operands first (no recursion: graphs are deep)."""
        order: list[torch.fx.Node] = []
        stack = [(node, False)]
        seen: set[torch.fx.Node] = set()
        while stack:
            step, ready = stack.pop()
            if ready:
                order.append(step)
            elif step not in seen and step not in self._known:
                seen.add(step)
                stack.append((step, True))
                stack += [(operand, False) for operand in self._operands(step)]
        return order

    def _operands(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """Return the operands that are needed for the selected tokens."""
        if node in self.boundary:
            return []
        skipped: set[Any] = set()
        if self.selection.all_keys and is_call(node, _SDPA):
            skipped = set(node.args[1:3])
        elif self.selection.all_keys and is_call(node, *_PRODUCTS):
            skipped = {node.args[1]} & self._inside
        return [operand for operand in node.all_input_nodes if operand in self._inside and operand not in skipped]

    def _emit(self, node: torch.fx.Node) -> Rows:
        if node in self.boundary:
            if value(node).dim() != 3 or value(node).shape[1] != self.selection.tokens:
                raise TokenAxisError(f"is a state of shape {list(value(node).shape)}, not [batch, tokens, width]")
            return Rows(self.gather(node), {1: 1})
        for targets, method in self._methods().items():
            if is_call(node, *targets):
                return method(node)
        if getattr(node.target, "namespace", "") == "depthwire":
            return self._own(node)
        return self._along(node) or self._pointwise(node)

    def _methods(self) -> dict[tuple[Any, ...], Callable[[torch.fx.Node], Rows]]:
        return {
            (_SDPA,): self._attention,
            (*_PRODUCTS, aten.addmm.default, aten.linear.default): self._product,
            RESHAPES: self._reshape,
            (aten.expand.default,): self._expand,
            _JOINS: self._join,
            (operator.getitem,): lambda node: self._again(node, self._rows_of(node.args[0]).axes),
            SOFTMAX: self._softmax,
        }

    def _along(self, node: torch.fx.Node) -> Rows | None:
        """Repeat an operation that moves axes, or works along another axis than the tokens'."""
        first = node.args[0] if node.args else None
        if not isinstance(first, torch.fx.Node) or first not in self._known:
            return None
        axes = self._known[first].axes
        found = moved(node, axes)
        found = kept(node, axes) if found is None else found
        return None if found is None else self._again(node, found)

    def _rows_of(self, argument: Any) -> Rows:
        return self._known[argument]

    def _again(self, node: torch.fx.Node, axes: Axes, *, causal: bool = False) -> Rows:
        """Repeat an operation on the routed values of its operands."""
        args = torch.fx.node.map_arg(node.args, self._routed)
        kwargs = torch.fx.node.map_arg(node.kwargs, self._routed)
        return Rows(self._call(node.target, args, node, kwargs), axes, causal)

    def _routed(self, node: torch.fx.Node) -> torch.fx.Node:
        return self._known[node].node if node in self._known else node

    def _call(self, target: Any, args: Any, like: torch.fx.Node, kwargs: Any = None) -> torch.fx.Node:
        name = f"{like.name}_routed" if target is like.target else None
        if like.op != "call_function":
            like = self.place  # an input has no provenance
        return self.edit.call(target, args, kwargs, before=self.place, like=like, name=name)

    def _reshape(self, node: torch.fx.Node) -> Rows:
        source: Any = node.args[0]
        rows = self._rows_of(source)
        before, after = value(source).shape, value(node).shape
        axes = reshaped([int(n) for n in before], [int(n) for n in after], rows.axes, self.selection.tokens)
        if axes is None:
            raise TokenAxisError("joins the tokens with another axis")
        shape = routed_shape(after, axes, self.selection.slots, flexible=True)
        return Rows(self._call(aten.reshape.default, (rows.node, shape), node), axes, rows.causal)

    def _expand(self, node: torch.fx.Node) -> Rows:
        source: Any = node.args[0]
        rows = self._rows_of(source)
        shift = value(node).dim() - value(source).dim()
        axes = {axis + shift: lead for axis, lead in rows.axes.items()}
        sizes = [-1 if axis in axes else int(size) for axis, size in enumerate(value(node).shape)]
        return Rows(self._call(aten.expand.default, (rows.node, sizes), node), axes, rows.causal)

    def _join(self, node: torch.fx.Node) -> Rows:
        parts: Any = node.args[0]
        stacks = is_call(node, aten.stack.default)
        rank = value(node).dim()
        along = int(argument(node, 1, "dim", 0)) % rank
        axes = self._united(parts, rank - stacks)
        if along in axes and not stacks:
            raise TokenAxisError("joins tokens with tokens")
        routed = [self._aligned(part, axes, rank - stacks) for part in parts]
        if stacks:
            axes = {axis + (axis >= along): lead for axis, lead in axes.items()}
        return Rows(self._call(node.target, (routed, along), node), axes)

    def _pointwise(self, node: torch.fx.Node) -> Rows:
        if not _is_pointwise(node):
            raise TokenAxisError("is not known to keep tokens apart")
        rank = value(node).dim()
        tensors = [operand for operand in node.all_input_nodes if isinstance(value(operand), torch.Tensor)]
        axes = self._united(tensors, rank)
        causal = any(self._known[operand].causal for operand in tensors if operand in self._known)
        routed = {}
        for operand in tensors:
            triangle = self._triangle(operand) if len(axes) == 2 else None
            causal = causal or triangle is not None
            routed[operand] = self._aligned(operand, axes, rank) if triangle is None else triangle

        def replaced(operand: torch.fx.Node) -> torch.fx.Node:
            return routed.get(operand, operand)

        args = torch.fx.node.map_arg(node.args, replaced)
        kwargs = torch.fx.node.map_arg(node.kwargs, replaced)
        return Rows(self._call(node.target, args, node, kwargs), axes, causal)

    def _own(self, node: torch.fx.Node) -> Rows:
        """Repeat a read: every token reads its own sources."""
        first = next(operand for operand in node.all_input_nodes if operand in self._known)
        axes, rank = self._known[first].axes, value(first).dim()

        def replaced(operand: torch.fx.Node) -> torch.fx.Node:
            return self._aligned(operand, axes, rank) if value(operand).dim() == rank else self._routed(operand)

        args = torch.fx.node.map_arg(node.args, replaced)
        return Rows(self._call(node.target, args, node, node.kwargs), axes)

    def _united(self, operands: Iterable[Any], rank: int) -> Axes:
        """Return the routed axes of operands that are broadcast to one rank."""
        axes: Axes = {}
        for operand in operands:
            if operand in self._known:
                shift = rank - value(operand).dim()
                axes.update({axis + shift: lead for axis, lead in self._known[operand].axes.items()})
        return axes

    def _aligned(self, operand: torch.fx.Node, axes: Axes, rank: int) -> torch.fx.Node:
        """Return an operand with the selected tokens along every routed axis that it is not broadcast over."""
        rows = self._known.get(operand, Rows(operand, {}))
        shift = rank - value(operand).dim()
        node = rows.node
        for axis, lead in axes.items():
            own = axis - shift
            if own < 0 or own in rows.axes or value(operand).shape[own] == 1:
                continue
            if lead != 1:
                raise TokenAxisError("meets a table of tokens whose batch is flattened")
            node = self._take(node, own, operand, rank)
        return node

    def _take(self, node: torch.fx.Node, axis: int, like: torch.fx.Node, rank: int) -> torch.fx.Node:
        """Select tokens along an axis of a value from elsewhere: a table or a mask."""
        key = (node, axis, rank)
        if key in self._gathered:
            return self._gathered[key]
        shape = [int(size) for size in value(node).shape]
        index = self.selection.index
        batch = int(value(index).shape[0])
        if shape[axis] != self.selection.tokens:
            raise TokenAxisError(f"meets {like.name}, which has {shape[axis]} along the axis of the tokens")
        if batch == 1:
            flat = self._flat_index(like)
            taken = self._call(aten.index_select.default, (node, axis, flat), like)
        else:
            if len(shape) < rank:
                node = self._call(aten.reshape.default, (node, [1] * (rank - len(shape)) + shape), like)
                axis, shape = axis + rank - len(shape), [1] * (rank - len(shape)) + shape
            if shape[0] == 1:
                node = self._call(aten.expand.default, (node, [batch, *shape[1:]]), like)
            elif shape[0] != batch:
                raise TokenAxisError(f"meets {like.name}, whose first axis is not the batch")
            front = node if axis == 1 else self._call(aten.transpose.int, (node, 1, axis), like)
            front = self._call(GATHER, (front, index), like)
            taken = front if axis == 1 else self._call(aten.transpose.int, (front, 1, axis), like)
        self._gathered[key] = taken
        return taken

    def _flat_index(self, like: torch.fx.Node) -> torch.fx.Node:
        if "flat" not in self._gathered:
            self._gathered["flat"] = self._call(aten.reshape.default, (self.selection.index, [-1]), like)
        return self._gathered["flat"]

    def _product(self, node: torch.fx.Node) -> Rows:
        """Repeat a matrix product; the tokens may be summed over, by attention's second product."""
        if is_call(node, aten.linear.default, aten.addmm.default):
            position = int(is_call(node, aten.addmm.default))
            source: Any = node.args[position]
            others = [argument for argument in node.args if argument is not source]
            if any(argument in self._known for argument in others):
                raise TokenAxisError("multiplies tokens by a weight that depends on tokens")
            axes = self._rows_of(source).axes
            if value(source).dim() - 1 in axes:
                raise TokenAxisError("multiplies along the tokens")
            return self._again(node, dict(axes))
        left, right = (self._known.get(operand, Rows(operand, {})) for operand in node.args)  # type: ignore[arg-type]
        rank = value(node).dim()
        ranks = [value(operand).dim() for operand in node.args]  # type: ignore[arg-type]
        if min(ranks) < 2:
            raise TokenAxisError("multiplies a vector")
        a = {axis + rank - ranks[0]: lead for axis, lead in left.axes.items()}
        b = {axis + rank - ranks[1]: lead for axis, lead in right.axes.items()}
        summed = (a.pop(rank - 1, None), b.pop(rank - 2, None))
        if (summed[0] is None) != (summed[1] is None):
            raise TokenAxisError("sums over tokens that only one of its operands has selected")
        return self._again(node, {**a, **b})

    def _softmax(self, node: torch.fx.Node) -> Rows:
        """Repeat a softmax; over keys, slots that hold no selected token must have no weight."""
        source: Any = node.args[0]
        rows = self._known[source]
        axes = dict(rows.axes)
        along = int(argument(node, 1, "dim", -1)) % value(node).dim()
        if along not in axes or self.selection.taken is None or rows.causal:
            return self._again(node, axes)
        if along != value(node).dim() - 1 or value(node).dim() - 2 not in axes:
            raise TokenAxisError("normalises over tokens that are not the keys of an attention")
        hidden = self._call(aten.logical_not.default, (self._visible_keys(node),), node)
        lowest = torch.finfo(value(rows.node).dtype).min
        masked = self._call(aten.masked_fill.Scalar, (rows.node, hidden, lowest), node)
        return Rows(self._call(node.target, (masked, *node.args[1:]), node, node.kwargs), axes)

    def _visible_keys(self, like: torch.fx.Node) -> torch.fx.Node:
        """Return ``[B, 1, K, K]``: the taken slots; each slot sees itself, so that no row of a softmax is empty."""
        if "visible" not in self._gathered:
            slots = self.selection.slots
            batch = int(value(self.selection.index).shape[0])
            own = self._constant("route_own_slot", torch.eye(slots, dtype=torch.bool))
            taken = self._call(aten.reshape.default, (self.selection.taken, [batch, 1, 1, slots]), like)
            self._gathered["visible"] = self._call(aten.logical_or.default, (taken, own), like)
        return self._gathered["visible"]

    def _constant(self, stem: str, tensor: torch.Tensor) -> torch.fx.Node:
        key = ("constant", stem)
        if key not in self._gathered:
            self._gathered[key] = self.edit.add_constant(self.edit.free_constant_name(stem), tensor)
        return self._gathered[key]

    def _triangle(self, operand: torch.fx.Node) -> torch.fx.Node | None:
        """Return the K x K corner of a constant causal mask, which is the mask of the slots; else ``None``."""
        known = self._constants.get(operand.name) if operand not in self._known else None
        if known is None or not is_causal(known, self.selection.tokens):
            return None
        slots = self.selection.slots
        return self._constant(f"route_{operand.name}", known[..., :slots, :slots].contiguous())

    def _attention(self, node: torch.fx.Node) -> Rows:
        query, key, values = node.args[:3]
        rank = value(node).dim()
        routed = [self._known.get(operand, Rows(operand, {})) for operand in (query, key, values)]  # type: ignore[arg-type]
        wanted = [{rank - 2: 1}] + [{} if self.selection.all_keys else {rank - 2: 1}] * 2
        if rank != 4 or [rows.axes for rows in routed] != wanted:
            raise TokenAxisError("is attention whose operands are not [batch, heads, tokens, width]")
        mask = argument(node, 3, "attn_mask")
        causal = bool(argument(node, 5, "is_causal", default=False))
        known = None if mask is None else self._constants.get(mask.name)
        causal = causal or (known is not None and is_causal(known, self.selection.tokens))
        if mask is not None and mask in self._known:
            raise TokenAxisError("is attention whose mask depends on the tokens")
        kwargs = {name: value for name, value in node.kwargs.items() if name not in ("attn_mask", "is_causal")}
        for position, name in ((6, "scale"), (7, "enable_gqa")):
            if len(node.args) > position:
                kwargs[name] = node.args[position]
        mask, causal = self._mask(mask, node, causal=causal)
        operands = [rows.node for rows in routed]
        dropout = argument(node, 4, "dropout_p", 0.0)
        return Rows(self._call(_SDPA, (*operands, mask, dropout, causal), node, kwargs), {rank - 2: 1})

    def _mask(
        self, mask: torch.fx.Node | None, node: torch.fx.Node, *, causal: bool
    ) -> tuple[torch.fx.Node | None, bool]:
        """Return the mask of the routed attention, and whether it is the causal one."""
        rank = value(node).dim()
        if self.selection.all_keys:
            if causal:
                return self._past(node), False
            return (None if mask is None else self._aligned(mask, {rank - 2: 1}, rank)), False
        if causal:
            return None, True  # slots are in the order of the tokens, and what no token has taken comes last
        both = {rank - 2: 1, rank - 1: 1}
        rows = None if mask is None else self._aligned(mask, both, rank)
        if self.selection.taken is None:
            return rows, False
        key = ("mask", mask)
        if key not in self._gathered:
            visible = self._visible_keys(node)
            if rows is None:
                self._gathered[key] = visible
            elif value(rows).dtype == torch.bool:
                self._gathered[key] = self._call(aten.logical_and.default, (rows, visible), node)
            else:
                hidden = self._call(aten.logical_not.default, (visible,), node)
                lowest = torch.finfo(value(rows).dtype).min
                self._gathered[key] = self._call(aten.masked_fill.Scalar, (rows, hidden, lowest), node)
        return self._gathered[key], False

    def _past(self, node: torch.fx.Node) -> torch.fx.Node:
        """Return ``[B, 1, K, T]``: for every selected query, the tokens up to its own position."""
        if "past" not in self._gathered:
            batch = int(value(self.selection.index).shape[0])
            positions = self._constant("route_positions", torch.arange(self.selection.tokens))
            own = self._call(aten.reshape.default, (self.selection.index, [batch, 1, -1, 1]), node)
            self._gathered["past"] = self._call(aten.ge.Tensor, (own, positions), node)
        return self._gathered["past"]


def descendants(nodes: Iterable[torch.fx.Node]) -> set[torch.fx.Node]:
    """Return the nodes themselves and all that depend on them."""
    found: set[torch.fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.users)
    return found


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


def _is_pointwise(node: torch.fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_call(
        node, *CASTS, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default
    )


def _refusal(node: torch.fx.Node, detail: str) -> PassError:
    return PassError(
        "route.operation",
        "This part of the model cannot be routed",
        at=where(node),
        want="operations that compute each token apart, with attention between tokens",
        got=f"{node.target}, which {detail}",
        todo="Leave this layer out of --route-layers, or route another unit (attention or mlp).",
    )
