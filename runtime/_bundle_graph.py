"""The graph of a bundle: the artefact's own, with its selections as outputs and in the form that the target reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from depthwire.artifact import MODEL
from depthwire.errors import ExportError, UsageError
from depthwire.runtime.deploy.manifest import RoutingUnit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from onnx import ModelProto

    from depthwire.artifact import Artifact, RouteGraph
    from depthwire.runtime.target import Target


@dataclass(frozen=True)
class Graph:
    """One graph of an artefact.

    Attributes:
        file: Its name.
        capacity: Share of the tokens, as a fraction; ``None`` where nothing is routed or layers differ.
        route: What the manifest says of its selections.
    """

    file: str
    capacity: str | None
    route: RouteGraph | None


def graphs_of(artifact: Artifact, capacities: Sequence[str]) -> list[Graph]:
    """Return the graphs to bundle, ``model.onnx`` first.

    Args:
        artifact: The artefact.
        capacities: Shares (``0.5``, ``50%``, ``1/2``) of those that are wanted; empty for every graph.

    Raises:
        UsageError: ``bundle.capacity``: the artefact has no graph of this capacity.
    """
    route = artifact.manifest.route
    listed = [Graph(MODEL, None, None)] if route is None else [Graph(g.file, g.capacity, g) for g in route.graphs]
    if not capacities:
        return listed
    known = {graph.capacity: graph for graph in listed if graph.capacity is not None}
    wanted = [_fraction(text) for text in capacities]
    missing = [text for text, share in zip(capacities, wanted, strict=True) if share not in known]
    if missing:
        raise UsageError(
            "bundle.capacity",
            "The artefact has no graph of this capacity",
            at=f"--capacity {missing[0]}",
            want=f"one of {', '.join(known)}" if known else "no --capacity: nothing is routed, or layers differ",
            got=missing[0],
            todo="Choose another, or convert again with --capacities.",
        )
    return [graph for graph in listed if graph.capacity in wanted]


def _fraction(text: str) -> str | None:
    from fractions import Fraction

    try:
        share = Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
    return str(share)


def expose_routing(model: ModelProto, graph: Graph) -> tuple[RoutingUnit, ...]:
    """Make index and taken bits of every selection outputs of the graph, in place; they are as long as K.

    Returns:
        The units, by the names of their new outputs.
    """
    from onnx import TensorProto, helper

    if graph.route is None:
        return ()
    index_of = {node.output[1]: node.output[0] for node in model.graph.node if node.op_type.startswith("SelectTokens")}
    known, units = {value.name for value in model.graph.output}, []
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    for unit in graph.route.units:
        index = index_of[unit.taken]
        for name, kind in ((index, TensorProto.INT64), (unit.taken, TensorProto.BOOL)):
            if name not in known:
                model.graph.output.append(helper.make_tensor_value_info(name, kind, [batch, unit.slots]))
                known.add(name)
        units.append(RoutingUnit(unit.module, unit.layer, unit.tokens, index, unit.taken))
    _drop_value_info(model, known)
    return tuple(units)


def write_plugin_form(model: ModelProto, path: Path, target: Target) -> str:
    """Make a written graph name its plugins, write them beside it, and return the name of their module in the bundle.

    Raises:
        BuildError, UsageError: As ``write_plugins``.
    """
    from depthwire.runtime.triton.plugin import MODULE, to_plugin_form, write_plugins

    folder = f"plugins/{path.stem}"
    (capability,) = target.default_compute_capabilities
    write_plugins(path, capability, path.parent / folder, tensorrt=target.tensorrt or "unknown")
    to_plugin_form(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return f"{folder}/{MODULE}"


def check_graph(path: Path) -> None:
    """Have ``onnx.checker`` look at a graph that was rewritten.

    Raises:
        ExportError: ``export.checker``.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            "export.checker",
            "The ONNX checker refuses the graph that the bundle would carry",
            at=path.name,
            want="a model that passes onnx.checker with full_check",
            got=str(error).strip().splitlines()[0],
            todo="Report this with the model's configuration.",
        ) from error


def _drop_value_info(model: ModelProto, outputs: set[str]) -> None:
    # A value may be described once: as an output, or as an inner value.
    kept = [value for value in model.graph.value_info if value.name not in outputs]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
