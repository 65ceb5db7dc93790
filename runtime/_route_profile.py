"""One network for every capacity of an artefact: K becomes the length of an input.

The graphs of two capacities differ in three ways: in the slots, whose length is K; in constants over K x K slots, such
as causal masks, of which the narrower graph's is the first corner of the wider one's; and in budgets, which are inputs
anyway. So the widest graph serves all if its slots are an input and each such constant is cut to K.
Anything else that differs is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from onnx import ModelProto, NodeProto, TensorProto

    from depthwire.artifact import Artifact, RouteGraph

SLOTS = "route_slots"
_TABLES = ("route_thresholds", "route_budgets", "route_states")
_STATIC = "route.slots_"


def profiled_model(
    artifact: Artifact, read: Callable[[Path], ModelProto] | None = None
) -> tuple[ModelProto, tuple[int, ...]]:
    """Return a graph whose input ``route_slots [K]`` (0 … K-1) decides how many tokens are computed, and every K.

    Args:
        artifact: A routed model with two capacities or more.
        read: Reads the narrowest and then the widest graph, in which it may leave the batch open.

    Raises:
        UsageError: ``build.one-capacity``: there are no two, a layer has a capacity of its own, or the graphs differ in
            more than K.
    """
    route = artifact.manifest.route
    graphs = sorted([] if route is None else route.graphs, key=_slots)
    if len(graphs) < 2 or any(len({unit.slots for unit in graph.units}) != 1 for graph in graphs):
        raise _refusal(artifact, f"{len(graphs)} graphs" if len(graphs) < 2 else "layers with a K of their own")
    narrow, wide = ((read or _load)(artifact.path(graph.file)) for graph in (graphs[0], graphs[-1]))
    uses = _cut_uses(artifact, narrow, wide, _slots(graphs[0]))
    return _rewritten(wide, uses), tuple(_slots(graph) for graph in graphs)


def _cut_uses(artifact: Artifact, narrow: ModelProto, wide: ModelProto, k: int) -> dict[tuple[int, int], str]:
    """Return which operand (node, position) is a constant over slots that must be cut to K, by its name."""
    import numpy as np
    from onnx import numpy_helper

    ours, theirs = ({t.name: t for t in model.graph.initializer} for model in (wide, narrow))
    kinds: dict[tuple[str, str], bool] = {}

    def is_cut(name: str, twin: str) -> bool:
        if _same_place(ours[name], theirs[twin]):
            return False
        one, other = (numpy_helper.to_array(t, str(artifact.root)) for t in (ours[name], theirs[twin]))
        if np.array_equal(one, other):
            return False
        if one.ndim < 2 or not np.array_equal(one[..., :k, :k], other):
            raise _refusal(artifact, f"{name} {list(one.shape)} and {list(other.shape)}")
        return True

    uses: dict[tuple[int, int], str] = {}
    if len(narrow.graph.node) != len(wide.graph.node):
        raise _refusal(artifact, "graphs with different operators")
    for index, (node, twin) in enumerate(zip(wide.graph.node, narrow.graph.node, strict=True)):
        if _operator(node) != _operator(twin) or len(node.input) != len(twin.input):
            raise _refusal(artifact, "graphs with different operators")
        for position, (name, other) in enumerate(zip(node.input, twin.input, strict=True)):
            if name.startswith(_STATIC) or name in _TABLES:
                continue
            if name in ours and other in theirs:
                if (name, other) not in kinds:
                    kinds[name, other] = is_cut(name, other)
                if kinds[name, other]:
                    uses[index, position] = name
            elif name != other:
                raise _refusal(artifact, f"{name} and {other} as operands of {node.name}")
    return uses


def _rewritten(model: ModelProto, uses: dict[tuple[int, int], str]) -> ModelProto:
    from onnx import TensorProto, helper

    graph = model.graph
    kept = [t for t in graph.initializer if not t.name.startswith(_STATIC) and t.name not in _TABLES]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(kept)
    graph.initializer.append(helper.make_tensor("route_corner", TensorProto.INT64, [2], [0, 0]))
    graph.initializer.append(helper.make_tensor("route_axes", TensorProto.INT64, [2], [-2, -1]))
    graph.input.append(helper.make_tensor_value_info(SLOTS, TensorProto.INT64, ["K"]))
    first = [
        helper.make_node("Shape", [SLOTS], ["route_count"], name="route_count"),
        helper.make_node("Concat", ["route_count"] * 2, ["route_square"], name="route_square", axis=0),
    ]
    for name in dict.fromkeys(uses.values()):
        inputs = [name, "route_corner", "route_square", "route_axes"]
        first.append(helper.make_node("Slice", inputs, [f"{name}.slots"], name=f"{name}.slots"))
    for index, node in enumerate(graph.node):
        for position, name in enumerate(node.input):
            if (index, position) in uses:
                node.input[position] = f"{name}.slots"
            elif name.startswith(_STATIC):
                node.input[position] = SLOTS
    nodes = [*first, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _load(path: Path) -> ModelProto:
    import onnx

    return onnx.load(str(path), load_external_data=False)


def _operator(node: NodeProto) -> tuple[Any, ...]:
    """Return what a node does, without its operands."""
    return node.domain, node.op_type, tuple(node.output), tuple(each.SerializeToString() for each in node.attribute)


def _same_place(one: TensorProto, other: TensorProto) -> bool:
    """Tell whether two tensors are the same bytes of the weights file."""
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in (one, other)]
    return bool(places[0]) and places[0] == places[1]


def _slots(graph: RouteGraph) -> int:
    return graph.units[0].slots


def _refusal(artifact: Artifact, got: str) -> UsageError:
    return UsageError(
        "build.one-capacity",
        "The capacities of this artefact do not fit into one engine",
        at=str(artifact.root),
        want="graphs of two capacities or more (--capacities) that differ in K alone, which all layers share",
        got=got,
        todo="Leave --all-capacities out: the engine then has the capacity of model.onnx.",
    )
