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
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from depthwire.errors import PassError
from depthwire.passes._base import where
from depthwire.passes._match import CASTS, argument, aten, constants_of, is_call, value
from depthwire.passes._token_tables import FRONT, Selection, TokenTables
from depthwire.passes.analysis.reach import descendants
from depthwire.passes.analysis.token_axes import (
    RESHAPES,
    SOFTMAX,
    Axes,
    Place,
    TokenAxisError,
    batch_place,
    kept,
    moved,
    reshaped,
    routed_shape,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from depthwire.passes._edit import GraphEditor
    from depthwire.program import Program

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


@dataclass
class TokenRegion:
    """The operations between gathered states and a sublayer's results.

    Attributes:
        edit: The graph.
        program: What the graph was made from; its constants are looked at.
        boundary: States ``[B, T, d]`` at which tokens are gathered.
        selection: Which tokens.
        place: Before which node new ones are inserted.
    """

    edit: GraphEditor
    program: Program
    boundary: frozenset[torch.fx.Node]
    selection: Selection
    place: InitVar[torch.fx.Node]
    _known: dict[torch.fx.Node, Rows] = field(default_factory=dict)
    _batch: dict[torch.fx.Node, Place | None] = field(default_factory=dict)

    def __post_init__(self, place: torch.fx.Node) -> None:
        """Find what depends on the boundary."""
        self._inside = descendants(self.boundary)
        self._tables = TokenTables(self.edit, self.selection, constants_of(self.program), place)

    def move_to(self, place: torch.fx.Node) -> None:
        """Insert what follows before another node."""
        self._tables.place = place

    def rows(self, node: torch.fx.Node) -> Rows:
        """Return a node's value for the selected tokens.

        Raises:
            PassError: ``route.operation``: an operation in between does not keep tokens apart.
        """
        for step in self._order(node):
            if step not in self._known:
                try:
                    self._batch[step] = self._batch_of(step)
                    self._known[step] = self._emit(step)
                except TokenAxisError as error:
                    raise _refusal(step, str(error)) from error
        return self._known[node]

    def gather(self, node: torch.fx.Node) -> torch.fx.Node:
        """Return the selected rows of a value ``[B, T, …]``."""
        return self._tables.rows(node)

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
        own = {"depthwire": self._own, "onnx": self._rotary}.get(getattr(node.target, "namespace", ""))
        return (own(node) if own else self._along(node)) or self._pointwise(node)

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
        return self._tables.call(target, args, like, kwargs)

    def _batch_of(self, node: torch.fx.Node) -> Place | None:
        """Return where a value has its batch; ``None`` if that is not known."""
        if node in self.boundary:
            return FRONT
        first = next(operand for operand in node.all_input_nodes if operand in self._known)
        found = self._batch[first]
        if found is None or is_call(node, operator.getitem):
            return found
        before, after = value(first), value(node)
        if is_call(node, *RESHAPES):
            old, new = ([int(n) for n in tensor.shape] for tensor in (before, after))
            return batch_place(old, new, found, self.selection.batch)
        if first is node.args[0]:
            axes = moved(node, dict([found]))
            axes = kept(node, dict([found])) if axes is None else axes
            if axes is not None:
                return next(iter(axes.items()))
        stacks = is_call(node, aten.stack.default)
        if not isinstance(after, torch.Tensor):
            return None
        axis = found[0] + after.dim() - before.dim() - stacks
        along = int(argument(node, 1, "dim", 0)) % after.dim() if stacks else after.dim()
        return axis + (axis >= along), found[1]

    def _rotary(self, node: torch.fx.Node) -> Rows:
        """Repeat a rotary embedding with the rows of its tables ``[B, T, pairs]`` that belong to the tokens."""
        operands: Any = node.args
        source, *tables = operands
        rows = self._rows_of(source)
        if rows.axes != {value(source).dim() - 2: 1} or len(tables) != 2 or "Rotary" not in str(node.target):
            raise TokenAxisError("is not a rotary embedding of the tokens by tables of all positions")
        args = (rows.node, *(self.gather(table) for table in tables))
        return Rows(self._call(node.target, args, node, node.kwargs), dict(rows.axes))

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
        routed = [self._aligned(part, axes, node, int(stacks)) for part in parts]
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
            routed[operand] = self._aligned(operand, axes, node) if triangle is None else triangle

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
            return self._aligned(operand, axes, node) if value(operand).dim() == rank else self._routed(operand)

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

    def _aligned(self, operand: torch.fx.Node, axes: Axes, node: torch.fx.Node, shift: int = 0) -> torch.fx.Node:
        """Return an operand of a node with the selected tokens along every axis that it is not broadcast over.

        Args:
            operand: What is broadcast.
            axes: The routed axes of what it is broadcast to.
            node: What is computed.
            shift: By how much the node's rank exceeds that of what its operands are broadcast to.
        """
        rows = self._known.get(operand, Rows(operand, {}))
        rank = value(node).dim() - shift
        offset = rank - value(operand).dim()
        missing = [axis for axis in sorted(axes) if axis >= offset and axis - offset not in rows.axes]
        missing = [axis for axis in missing if value(operand).shape[axis - offset] != 1]
        if any(axes[axis] != 1 for axis in missing):
            raise TokenAxisError("meets a table of tokens whose batch is flattened")
        if not missing:
            return rows.node
        if operand in self._known:
            raise TokenAxisError(f"meets {operand.name}, which has selected tokens along another axis")
        return self._tables.take(operand, tuple(missing), rank, self._batch[node])

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
        visible = self._tables.visible_keys(node, self._batch[node])
        masked = self._tables.masked(rows.node, visible, node)
        return Rows(self._call(node.target, (masked, *node.args[1:]), node, node.kwargs), axes)

    def _triangle(self, operand: torch.fx.Node) -> torch.fx.Node | None:
        return None if operand in self._known else self._tables.triangle(operand)

    def _attention(self, node: torch.fx.Node) -> Rows:
        query, key, values = node.args[:3]
        rank = value(node).dim()
        routed = [self._known.get(operand, Rows(operand, {})) for operand in (query, key, values)]  # type: ignore[arg-type]
        wanted = [{rank - 2: 1}] + [{} if self.selection.all_keys else {rank - 2: 1}] * 2
        if rank != 4 or [rows.axes for rows in routed] != wanted or self._batch[node] != FRONT:
            raise TokenAxisError("is attention whose operands are not [batch, heads, tokens, width]")
        mask = argument(node, 3, "attn_mask")
        causal = bool(argument(node, 5, "is_causal", default=False))
        causal = causal or (mask is not None and self._tables.is_causal(mask))
        if mask is not None and mask in self._known:
            raise TokenAxisError("is attention whose mask depends on the tokens")
        kwargs = {name: value for name, value in node.kwargs.items() if name not in ("attn_mask", "is_causal")}
        for position, name in ((6, "scale"), (7, "enable_gqa")):
            if len(node.args) > position:
                kwargs[name] = node.args[position]
        mask, causal = self._tables.mask_of(mask, node, causal=causal)
        operands = [rows.node for rows in routed]
        dropout = argument(node, 4, "dropout_p", 0.0)
        return Rows(self._call(_SDPA, (*operands, mask, dropout, causal), node, kwargs), {rank - 2: 1})


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
