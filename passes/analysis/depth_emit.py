"""Writes a recognised read back into a graph: the query folded, the sources as they were before they were stacked."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from depthwire.ops import attn_res_read  # noqa: F401 - registers the operator
from depthwire.passes._match import aten, is_call, value
from depthwire.passes.analysis.depth_axes import Atom, Dims, layout_to, own_axes, sizes
from depthwire.passes.analysis.depth_layout import RESHAPES
from depthwire.passes.analysis.depth_merge import folded
from depthwire.passes.analysis.depth_softmax import last_bias
from depthwire.passes.analysis.depth_values import Bank, Const, Logits, Mix, Read, Source, Term
from depthwire.passes.queries import QUERY_PREFIX

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from depthwire.passes._edit import GraphEditor
    from depthwire.passes.analysis.depth_constants import Constants

READ = torch.ops.depthwire.attn_res_read.default
Fixed = dict["Hashable", int]


class Emitter:
    """Makes the nodes of reads; equal queries, views of sources and reads are made once.

    Attributes:
        reads: How many reads were made.
    """

    def __init__(self, edit: GraphEditor, constants: Constants) -> None:
        """Write into ``edit``; constants are those of the original graph."""
        self._edit = edit
        self._constants = constants
        self._queries: dict[object, torch.fx.Node] = {}
        self._views: dict[object, torch.fx.Node] = {}
        self._made: dict[object, torch.fx.Node] = {}
        self._named: set[torch.fx.Node] = set()
        self.reads = 0

    def emit(self, node: torch.fx.Node, read: Read) -> None:
        """Let a read (or several, stacked) stand in the place of a node of the original graph."""
        term, mix = read
        place = self._edit.copy_of(node)
        fixed: Fixed = dict(term.fixed | mix.logits.fixed)
        free = [atom for dim in term.dims for atom in dim if not isinstance(atom.axis, int)]
        dtype = self._dtype(mix.logits, value(node).dtype)
        reads = [
            self._read(place, mix, {**fixed, **dict(zip((a.axis for a in free), chosen, strict=True))}, dtype)
            for chosen in itertools.product(*(range(atom.size) for atom in free))
        ]
        new, dims, shape = reads[0], term.dims, list(value(reads[0]).shape)
        if free:
            new = self._edit.call(aten.stack.default, (reads, 0), before=place, like=place)
            shape = [*(atom.size for atom in free), *shape]
            if len(free) > 1:
                new = self._reshaped(place, new, shape)
            dims = _numbered(term.dims, [atom.axis for atom in free])
        new = self._scale(place, new, term, mix)
        order = self._order(mix.logits)
        if order is not None:
            back = [*range(len(free)), *(len(free) + order.index(axis) for axis in range(len(order)))]
            new = self._edit.call(aten.permute.default, (new, back), before=place, like=place)
        new = self._laid_out(place, new, dims, list(value(node).shape))
        new = self._cast(place, new, value(node).dtype)
        # One read may stand for two views of it; it takes the first one's name.
        self._edit.replace(place, new, keep_name=new not in self._named)
        self._named.add(new)

    def forward(self, node: torch.fx.Node, source: Source) -> None:
        """Let a source stand in the place of a node that takes it out of a stack again."""
        place = self._edit.copy_of(node)
        new = self._edit.copy_of(source.node)
        if source.dims is not None:
            new = self._laid_out(place, new, source.dims, sizes(source.dims))
        if value(new).shape != value(node).shape:
            new = self._reshaped(place, new, list(value(node).shape))
        new = self._cast(place, new, value(node).dtype)
        self._edit.replace(place, new)

    def _dtype(self, logits: Logits, wanted: torch.dtype) -> torch.dtype:
        """Return the dtype to read in: the sources', or a wider one if the result is wanted in it."""
        dtype = wanted
        for found in {value(source.node).dtype for source in logits.bank.sources}:
            dtype = torch.promote_types(dtype, found)
        return dtype

    def _read(self, place: torch.fx.Node, mix: Mix, fixed: Fixed, dtype: torch.dtype) -> torch.fx.Node:
        logits = mix.logits
        axes = {atom.axis for const, _ in logits.query for dim in const.dims for atom in dim}
        fixed = {axis: index for axis, index in fixed.items() if axis in axes}
        key = (mix, frozenset(fixed.items()), dtype)
        if key not in self._made:
            sources = self._sources(place, logits, dtype)
            query = self._query(logits, fixed, dtype)
            scale = 1.0 if abs(logits.scale - 1.0) < 1e-12 else logits.scale
            bias = last_bias(logits) or 0.0
            more = (mix.unit, bias) if mix.unit or bias else ()
            arguments = (query, sources, logits.eps, scale, *more)
            read = self._edit.call(READ, arguments, before=place, like=place)
            self._made[key] = (
                read if self._order(logits) else self._reshaped(place, read, self._common_shape(logits.bank))
            )
            self.reads += 1
        return self._made[key]

    def _query(self, logits: Logits, fixed: Fixed, dtype: torch.dtype) -> torch.fx.Node:
        """Return the parameter that holds the folded query; reads with the same query share it."""
        key = (logits.query, logits.axis, frozenset(fixed.items()), dtype == torch.float64)
        if key not in self._queries:
            vector = folded(self._constants, logits, fixed)
            vector = vector if dtype == torch.float64 else vector.float()
            self._queries[key] = self._edit.add_parameter(f"{QUERY_PREFIX}{self.reads}", vector)
        return self._queries[key]

    def _sources(self, place: torch.fx.Node, logits: Logits, dtype: torch.dtype) -> list[torch.fx.Node]:
        bank, order = logits.bank, self._order(logits)
        shape = self._common_shape(bank)
        if order is None:
            shape = self._unflattened(bank, shape)
        sources = [self._source(place, source, shape, dtype) for source in bank.sources]
        return sources if order is None else [self._permuted(place, source, order) for source in sources]

    def _common_shape(self, bank: Bank) -> tuple[int, ...]:
        return Counter(self._shape(source) for source in bank.sources).most_common(1)[0][0]

    def _unflattened(self, bank: Bank, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in which the most sources are there before they are reshaped into ``shape``."""
        free = Counter(shape for source in bank.sources for shape in self._before_views(source)[-1:])
        best, count = max(free.items(), key=lambda each: (each[1], each[0] == shape), default=(shape, 0))
        return best if best[-1:] == shape[-1:] and count > free[shape] else shape

    def _before_views(self, source: Source) -> list[tuple[int, ...]]:
        """Return the shapes of a source, back to the one that no reshape has made."""
        if source.dims is not None:
            return []
        node = self._edit.copy_of(source.node)
        return [tuple(map(int, value(each).shape)) for each in _reshapes(node)]

    def _order(self, logits: Logits) -> list[int] | None:
        """Return the permutation that brings the features of a source to its end; ``None`` if they are there."""
        shape = self._common_shape(logits.bank)
        features = [axis for axis, size in enumerate(shape) if size > 1][logits.axis]
        if features == len(shape) - 1:
            return None
        return [*(axis for axis in range(len(shape)) if axis != features), features]

    def _permuted(self, place: torch.fx.Node, node: torch.fx.Node, order: list[int]) -> torch.fx.Node:
        key = (node, tuple(order))
        if key not in self._views:
            self._views[key] = self._edit.call(aten.permute.default, (node, order), before=place, like=place)
        return self._views[key]

    def _reshaped(self, place: torch.fx.Node, node: torch.fx.Node, shape: Sequence[int]) -> torch.fx.Node:
        """Reshape what a node was before any reshape."""
        same = [each for each in _reshapes(node) if list(value(each).shape) == list(shape)]
        if same:
            return same[-1]
        return self._edit.call(aten.reshape.default, (_reshapes(node)[-1], list(shape)), before=place, like=place)

    def _shape(self, source: Source) -> tuple[int, ...]:
        return tuple(sizes(source.dims)) if source.dims is not None else tuple(map(int, value(source.node).shape))

    def _source(
        self, place: torch.fx.Node, source: Source, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.fx.Node:
        node = self._edit.copy_of(source.node)
        if source.dims is None and value(node).dtype == dtype and tuple(value(node).shape) == shape:
            return node
        key = (source, shape, dtype)
        if key not in self._views:
            if source.dims is not None:
                node = self._laid_out(place, node, source.dims, list(shape))
            elif tuple(value(node).shape) != shape:
                node = self._reshaped(place, node, list(shape))
            self._views[key] = self._cast(place, node, dtype)
        return self._views[key]

    def _scale(self, place: torch.fx.Node, new: torch.fx.Node, term: Term, mix: Mix) -> torch.fx.Node:
        """Multiply by what stands before the mix: a number, a gain of the values."""
        if abs(term.scalar - 1.0) > 1e-12:
            new = self._edit.call(aten.mul.Tensor, (new, term.scalar), before=place, like=place)
        gains = [(factor, e) for factor, e in term.factors if isinstance(factor, Const)]
        for gain, exponent in sorted(gains, key=lambda each: each[0].node.name):
            shape = [mix.logits.bank.shape[mix.logits.axis]]
            vector: torch.fx.Node = self._edit.copy_of(gain.node)
            for position, dim in reversed(list(enumerate(gain.dims))):
                if not dim:
                    vector = self._edit.call(aten.select.int, (vector, position, 0), before=place, like=place)
            if list(value(vector).shape) != shape:
                vector = self._reshaped(place, vector, shape)
            vector = self._cast(place, vector, value(new).dtype)
            target = aten.mul.Tensor if exponent > 0 else aten.div.Tensor
            new = self._edit.call(target, (new, vector), before=place, like=place)
        return new

    def _laid_out(self, place: torch.fx.Node, new: torch.fx.Node, dims: Dims, shape: list[int]) -> torch.fx.Node:
        own = [int(size) for size in value(new).shape]
        if own == shape and _same_order(dims, own):
            return new
        layout = layout_to(dims, [size for size in own if size > 1], shape)
        if layout is None:
            raise AssertionError(dims, own)
        if layout.permutes:
            new = self._reshaped(place, new, layout.split)
            new = self._edit.call(aten.permute.default, (new, layout.order), before=place, like=place)
        if list(value(new).shape) == shape:
            return new
        return self._reshaped(place, new, shape)

    def _cast(self, place: torch.fx.Node, node: torch.fx.Node, dtype: torch.dtype) -> torch.fx.Node:
        if value(node).dtype == dtype:
            return node
        return self._edit.call(aten.to.dtype, (node, dtype), before=place, like=place)


def _reshapes(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return a node and what it is a reshape of, each with the same elements in the same order."""
    chain = [node]
    while is_call(chain[-1], *RESHAPES):
        source: Any = chain[-1].args[0]
        chain.append(source)
    return chain


def _same_order(dims: Dims, shape: list[int]) -> bool:
    return dims == own_axes(shape)


def _numbered(dims: Dims, queries: list[Hashable]) -> Dims:
    """Number query axes before those of the sources, as they stand in a stack of reads."""

    def renamed(atom: Atom) -> Atom:
        axis: Any = queries.index(atom.axis) if atom.axis in queries else None
        return atom._replace(axis=atom.axis + len(queries) if axis is None else axis)  # type: ignore[operator]

    return tuple(tuple(renamed(atom) for atom in dim) for dim in dims)
