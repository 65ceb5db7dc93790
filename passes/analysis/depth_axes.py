"""Labelled axes: which index of the sources each dimension of a tensor runs over.

An atom is a part of one axis: with axis k, ``inner`` i and ``size`` s it contributes ``i · (0 … s-1)`` to the index of
that axis. A dimension is a sequence of atoms, the outermost first; a dimension of size 1 has none. So every reshape
and permutation of a stack of sources is a regrouping of the same atoms::

    stack of n sources [B, T, d], axis 0            (depth n) (0 B) (1 T) (2 d)
    … viewed as [n, B·T, d]                         (depth n) (0 B, 1 T) (2 d)

Axes: 0, 1, … are those of a source that are longer than 1; ``DEPTH`` runs over the sources; any other label is a
query axis or an axis along which the values repeat.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

DEPTH = "depth"
REPEAT = "repeat"


class Atom(NamedTuple):
    """A part of an axis.

    Attributes:
        axis: A source's axis (int), ``DEPTH``, or another label.
        inner: Step of the axis' index.
        size: How many steps.
    """

    axis: Hashable
    inner: int
    size: int


Dim = tuple[Atom, ...]
Dims = tuple[Dim, ...]


def whole(axis: Hashable, size: int) -> Dim:
    """Return a dimension that runs over all of an axis."""
    return (Atom(axis, 1, size),) if size > 1 else ()


def own_axes(shape: Sequence[int]) -> Dims:
    """Return the dimensions of a source itself: one axis each for those longer than 1."""
    dims: list[Dim] = []
    axis = 0
    for size in shape:
        dims.append(whole(axis, size))
        axis += size > 1
    return tuple(dims)


def long_dims(dims: Iterable[Dim]) -> Dims:
    """Return the dimensions longer than 1, the depth left out."""
    return tuple(dim for dim in dims if dim and dim[0].axis != DEPTH)


def is_identity(dims: Iterable[Dim], shape: Sequence[int]) -> bool:
    """Tell whether the dimensions are those of a source of some shape, up to depth and dimensions of size 1."""
    return long_dims(dims) == tuple(whole(axis, size) for axis, size in enumerate(shape))


def has_axis(dims: Iterable[Dim], axis: Hashable) -> bool:
    """Tell whether some dimension runs over (a part of) an axis."""
    return any(atom.axis == axis for dim in dims for atom in dim)


def sizes(dims: Iterable[Dim]) -> list[int]:
    """Return the sizes of the dimensions."""
    return [math.prod(atom.size for atom in dim) for dim in dims]


def reshaped(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """Regroup the atoms into other dimensions, in the same order of elements; ``None`` where an atom cannot be cut."""
    pending = [atom for dim in reversed(dims) for atom in reversed(dim)]
    result: list[Dim] = []
    for size in shape:
        dim: list[Atom] = []
        missing = size
        while missing > 1:
            if not pending:
                return None
            atom = pending.pop()
            if missing % atom.size == 0:
                dim.append(atom)
                missing //= atom.size
            elif atom.size % missing == 0:
                rest = atom.size // missing
                dim.append(Atom(atom.axis, atom.inner * rest, missing))
                pending.append(Atom(atom.axis, atom.inner, rest))
                missing = 1
            else:
                return None
        result.append(fused(dim))
    return None if pending else tuple(result)


def fused(atoms: Iterable[Atom]) -> Dim:
    """Join neighbours that are parts of one axis, in order."""
    result: list[Atom] = []
    for atom in atoms:
        last = result[-1] if result else None
        if last is not None and last.axis == atom.axis and last.inner == atom.inner * atom.size:
            result[-1] = Atom(atom.axis, atom.inner, last.size * atom.size)
        else:
            result.append(atom)
    return tuple(result)


def order_of(node: torch.fx.Node, rank: int) -> list[int]:
    """Return the permutation that a call does to its first argument, found by doing it to a small tensor."""
    probe = torch.empty([2] * rank, device="meta")
    strides = list(probe.stride())
    moved = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return [strides.index(stride) for stride in moved.stride()]


class Layout(NamedTuple):
    """How to get from a source ``[…]`` to some dimensions: reshape, permute, reshape; a step may be left out.

    Attributes:
        split: Shape that cuts the axes into atoms.
        order: Permutation of these.
        shape: The result's shape.
    """

    split: list[int]
    order: list[int]
    shape: list[int]

    @property
    def permutes(self) -> bool:
        """Whether the order of elements changes."""
        return self.order != sorted(self.order)


def layout_to(dims: Dims, shape: Sequence[int], target: Sequence[int]) -> Layout | None:
    """Return how to bring a tensor with a source's own axes into the layout of ``dims``.

    Args:
        dims: Wanted; without depth and other foreign axes.
        shape: Sizes of the axes of a source that are longer than 1.
        target: Wanted shape; ``dims`` with its dimensions of size 1.
    """
    atoms = [atom for dim in dims for atom in dim]
    natural = sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].inner))
    counts = [1] * len(shape)
    for atom in atoms:
        if not isinstance(atom.axis, int):
            return None
        counts[atom.axis] *= atom.size
    if counts != list(shape):
        return None
    split = [atoms[i].size for i in natural]
    return Layout(split, [natural.index(i) for i in range(len(atoms))], list(target))
