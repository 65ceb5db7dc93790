"""The routing operators of an ONNX file: which kernels each of them launches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from depthwire.runtime.triton.routing_spec import RoutingSpec, budget_block, select_block

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx import NodeProto

# ONNX element types; of those that are moved, the bytes.
_FLOATS: Final = {1: "float32", 10: "float16", 16: "bfloat16", 11: "float64"}
_BYTES: Final = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_WINDOW: Final = 100  # of a SurpriseScore that does not say
_KINDS: Final = ("SelectTokens", "SelectTokensBudget", "GatherTokens", "ScatterTokens", "SurpriseScore")


def is_routing(op_type: str) -> bool:
    """Whether an operator of domain ``depthwire`` is one of token routing."""
    return op_type.partition("_")[0] in _KINDS


def described_inputs(node: NodeProto) -> tuple[str, ...]:
    """Return the inputs whose dtype and shape the kernels follow from."""
    kind = node.op_type.partition("_")[0]
    return (node.input[0], node.input[2]) if kind == "SurpriseScore" else (node.input[0],)


def routing_kernels(node: NodeProto, types: Mapping[str, tuple[int, tuple[int, ...]]]) -> list[RoutingSpec] | None:
    """Return the kernels that a node launches, in their order; ``None`` if the file does not tell.

    Args:
        node: A routing operator.
        types: Element type and dimensions by value, 0 for an unknown dimension. T, K and B are not asked for.

    Raises:
        UsageError: ``triton.bad-spec`` for what no kernel computes, such as fp64 scores.
    """
    import onnx

    kind, _, levels = node.op_type.partition("_")
    known = [types[name] for name in described_inputs(node) if name in types]
    if len(known) != len(described_inputs(node)):
        return None
    (element, shape), last = known[0], known[-1]
    window = next((onnx.helper.get_attribute_value(item) for item in node.attribute if item.name == "window"), None)
    if kind.startswith("SelectTokens"):
        return [_selection(kind, int(levels), window or 0, _float(element))]
    if len(shape) < 2 or 0 in shape[2:]:
        return None
    if kind == "SurpriseScore":
        sums = RoutingSpec("sums", width=shape[2], dtype=_float(element))
        return [sums, RoutingSpec("rank", window=_WINDOW if window is None else window, dtype=_float(last[0]))]
    size = _BYTES.get(element, 0) * math.prod(shape[2:])
    return [RoutingSpec("gather" if kind == "GatherTokens" else "scatter", row_bytes=size)]


def plugin_kernel(node: NodeProto, types: Mapping[str, tuple[int, tuple[int, ...]]]) -> RoutingSpec | None:
    """Return the one kernel that computes all of a node; ``None`` if the file does not tell.

    A TensorRT plugin is a single launch without memory of its own, so a ``SurpriseScore`` is not computed in two.

    Args:
        node: A routing operator.
        types: As in ``routing_kernels``.

    Raises:
        UsageError: ``triton.bad-spec``.
    """
    found = routing_kernels(node, types)
    if found is None or len(found) == 1:
        return found[0] if found else None
    sums, rank = found
    return RoutingSpec("surprise", width=sums.width, window=rank.window, dtype=sums.dtype, criteria=rank.dtype)


def _selection(kind: str, levels: int, window: int, dtype: str) -> RoutingSpec:
    if kind == "SelectTokens":
        return RoutingSpec("select", block=select_block(levels, window), window=window, dtype=dtype)
    return RoutingSpec("budget", block=budget_block(levels), dtype=dtype)


def _float(element: int) -> str:
    return _FLOATS.get(element, f"ONNX element type {element}")
