"""Which axes of which values run over the selected tokens of which routed unit.

``GatherTokens`` starts such an axis and ``ScatterTokens`` ends it; in between it is followed through every operation by
the operation's own meaning. An axis that a ``Reshape`` has merged with others stays marked: its length is a multiple of
K. The work of a product over marked axes is what a product over all T tokens would do, times K/T for each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from depthwire.runtime._onnx_shapes import DOMAIN, Graph, Shape, ints_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from onnx import NodeProto

Axes = dict[int, int]
"""Axis -> number of the selection whose tokens run along it."""

SELECT = "SelectTokens"
GATHER = "GatherTokens"
SCATTER = "ScatterTokens"


def is_own(node: NodeProto, stem: str) -> bool:
    """Tell whether a node is one of our operators, whatever number its name ends with."""
    return node.domain == DOMAIN and node.op_type.split("_")[0].startswith(stem)


def token_axes(graph: Graph, slots: Sequence[int]) -> Mapping[str, Axes]:
    """Return the marked axes of every value.

    Args:
        graph: The graph.
        slots: K of every selection, in the order of the graph.
    """
    axes: dict[str, Axes] = {}
    number = -1
    for node in graph.nodes:
        if is_own(node, SELECT):
            number += 1
            axes.update({name: {1: number} for name in node.output[:2]})
            continue
        for position, name in enumerate(node.output):
            if name:
                found = _axes_of(node, position, graph, axes, slots)
                axes[name] = {axis: of for axis, of in found.items() if graph.shapes[name][axis] % slots[of] == 0}
    return axes


def product_axes(node: NodeProto, graph: Graph, axes: Mapping[str, Axes]) -> list[int]:
    """Return the selections whose tokens a product runs over: one entry for each marked axis of its loops."""
    if node.op_type == "Attention" and not node.domain:
        tokens = _token_axis(graph.shapes[node.input[0]])
        return [axes[name][tokens] for name in node.input[:2] if tokens in axes.get(name, {})]
    loops = list(axes.get(node.output[0], {}).values())
    if node.op_type == "MatMul":
        left = node.input[0]
        inner = axes.get(left, {}).get(len(graph.shapes[left]) - 1)
        loops += [] if inner is None else [inner]
    return loops


def _token_axis(shape: Shape) -> int:
    """Return the axis of the tokens of an operand of Attention: ``[B, H, T, D]`` or ``[B, T, H·D]``."""
    return len(shape) - 2


@dataclass(frozen=True)
class _Call:
    """A node with what is known of its operands."""

    node: NodeProto
    shapes: tuple[Shape, ...]
    operands: tuple[Axes, ...]
    out: Shape
    slots: Sequence[int]


def _axes_of(node: NodeProto, position: int, graph: Graph, axes: Mapping[str, Axes], slots: Sequence[int]) -> Axes:
    operands = tuple(axes.get(name, {}) for name in node.input)
    if not any(operands) or (node.op_type == "Attention" and position > 0):
        return {}
    shapes = tuple(graph.shapes.get(name, ()) for name in node.input)
    call = _Call(node, shapes, operands, graph.shapes[node.output[position]], slots)
    if is_own(node, GATHER):
        return {**{axis: of for axis, of in operands[0].items() if axis != 1}, 1: operands[1][1]}
    if is_own(node, SCATTER):
        return dict(operands[0])
    return _RULES.get(node.op_type, _aligned)(call)


def _same(call: _Call) -> Axes:
    return dict(call.operands[0])


def _transposed(call: _Call) -> Axes:
    order = ints_of(call.node, "perm") or list(reversed(range(len(call.out))))
    return {order.index(axis): of for axis, of in call.operands[0].items()}


def _attended(call: _Call) -> Axes:
    at = _token_axis(call.out)
    return {at: call.operands[0][at]} if at in call.operands[0] else {}


def _aligned(call: _Call) -> Axes:
    """Return the axes of a result whose operands are broadcast to it.

    Of a reduction that drops axes too, where those that are left have not moved.
    """
    found: Axes = {}
    for shape, marked in zip(call.shapes, call.operands, strict=True):
        shift = len(call.out) - len(shape)
        for axis, of in marked.items():
            at = axis + shift
            if at >= 0 and call.out[at] == shape[axis]:
                found[at] = of
    return found


def _reshaped(call: _Call) -> Axes:
    """Follow axes through a reshape: what lies behind an axis, counted in elements, lies behind it still."""
    found: Axes = {}
    before, after = call.shapes[0], call.out
    for axis, of in call.operands[0].items():
        behind = math.prod(before[axis + 1 :])
        places = [
            at for at, size in enumerate(after) if size % call.slots[of] == 0 and math.prod(after[at + 1 :]) == behind
        ]
        # Axes of one element share their place with the tokens' own.
        place = max(places, key=lambda at: after[at], default=None)
        if place is not None:
            found[place] = of
    return found


def _gathered(call: _Call) -> Axes:
    axis = (ints_of(call.node, "axis") or [0])[0] % len(call.shapes[0])
    width = len(call.shapes[1])
    found = {at + axis: of for at, of in call.operands[1].items()}
    for at, of in call.operands[0].items():
        if at != axis:
            found[at if at < axis else at + width - 1] = of
    return found


def _gemm(call: _Call) -> Axes:
    swapped = [bool((ints_of(call.node, name) or [0])[0]) for name in ("transA", "transB")]
    left, right = call.operands[:2]
    rows, columns = left.get(int(swapped[0])), right.get(1 - int(swapped[1]))
    return {axis: of for axis, of in ((0, rows), (1, columns)) if of is not None}


def _product(call: _Call) -> Axes:
    left, right = call.operands[:2]
    rank, a, b = len(call.out), len(call.shapes[0]), len(call.shapes[1])
    found = {axis + rank - a: of for axis, of in left.items() if axis < a - 1}
    found.update({axis + rank - b: of for axis, of in right.items() if axis != b - 2})
    return found


_RULES: dict[str, Callable[[_Call], Axes]] = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "RMSNormalization", "LayerNormalization", "RotaryEmbedding"), _same),
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), _reshaped),
    "Transpose": _transposed,
    "Gather": _gathered,
    "Gemm": _gemm,
    "MatMul": _product,
    "Attention": _attended,
}
