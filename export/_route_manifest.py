"""What the manifest says of a routed model: its selections, its graphs, and the inputs that have defaults."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from depthwire.artifact import RouteGraph, RouteInfo, RouteUnit, TensorInfo
from depthwire.export._route_inputs import STATES_OUT
from depthwire.export.ops import DOMAIN

if TYPE_CHECKING:
    from collections.abc import Mapping
    from fractions import Fraction

    import onnx_ir as ir

    from depthwire.route import RouteSpec

_MODULE_KEY = "depthwire.module"
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class RoutedGraphs:
    """What a routed model is written with, beside its first graph.

    Attributes:
        spec: The specification of the first graph.
        models: Graphs of other capacities, by file name.
        capacities: The capacity of each of them, by file name.
    """

    spec: RouteSpec
    models: Mapping[str, ir.Model] = field(default_factory=dict)
    capacities: Mapping[str, Fraction] = field(default_factory=dict)


def graph_name(capacity: Fraction) -> str:
    """Return the file name of the graph of a capacity, such as ``model.c12.5.onnx``.

    It lies beside the weights: neither ONNX Runtime nor the checker follow a path out of a graph's own folder.
    """
    return f"model.c{float(100 * capacity):.6g}.onnx"


def route_info(graphs: Mapping[str, ir.Model], routed: RoutedGraphs | None) -> RouteInfo | None:
    """Return the manifest's section; ``None`` where the first graph selects no tokens.

    Args:
        graphs: Every graph by file name, ``model.onnx`` first.
        routed: As ``write_artifact`` got it.
    """
    first = next(iter(graphs.values()))
    listed = [RouteGraph(file=name, capacity=_capacity(name, routed), units=_units(graphs[name])) for name in graphs]
    if not listed[0].units:
        return None
    outputs = [value.name for value in first.graph.outputs]
    return RouteInfo(
        spec=None if routed is None else routed.spec.as_dict(),
        inputs=[tensor_info(value) for value in first.graph.inputs if value.is_initializer()],
        states_out=STATES_OUT if STATES_OUT in outputs else None,
        graphs=listed,
    )


def _capacity(name: str, routed: RoutedGraphs | None) -> str | None:
    if routed is None:
        return None
    if name in routed.capacities:
        return str(routed.capacities[name])
    several = set(routed.spec.capacity)
    return str(next(iter(several))) if len(several) == 1 else None


def _units(model: ir.Model) -> list[RouteUnit]:
    units = []
    for node in model.graph:
        if node.domain != DOMAIN or not node.op_type.startswith("SelectTokens"):
            continue
        score, index, taken = node.inputs[0], node.outputs[0], node.outputs[1]
        assert score is not None  # noqa: S101 - the schema's
        module = node.metadata_props.get(_MODULE_KEY, "")
        layer = _LAYER.search(module)
        units.append(
            RouteUnit(
                module=module,
                layer=int(layer[1]) if layer else None,
                tokens=_length(score),
                slots=_length(index),
                taken=str(taken.name),
                state=str(node.outputs[2].name) if len(node.outputs) > 2 else None,
            )
        )
    return units


def _length(value: ir.Value) -> int:
    """Return the second size of a value ``[B, N]``."""
    if value.shape is None:
        raise ValueError(f"{value.name} has no static shape")
    return int(value.shape[1])  # type: ignore[arg-type]


def tensor_info(value: ir.Value) -> TensorInfo:
    """Return name, shape and dtype of an input or output of a graph."""
    if value.shape is None or value.dtype is None or value.name is None:
        raise ValueError(f"{value.name} has no static shape")
    return TensorInfo(name=value.name, shape=[int(dim) for dim in value.shape], dtype=str(value.dtype.numpy()))  # type: ignore[arg-type]
