"""Writes an artefact: into a temporary sibling, checked there, and renamed when it is whole."""

from __future__ import annotations

import dataclasses
import datetime as dt
import shutil
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from depthwire._whole import put_in_place, temporary_sibling
from depthwire.artifact import (
    GOLDENS,
    MODEL,
    WEIGHTS,
    Artifact,
    Checkpoint,
    CustomOp,
    FileEntry,
    Manifest,
    PassInfo,
    PrecisionInfo,
    SourceInfo,
)
from depthwire.errors import ExportError
from depthwire.export._external_data import inline_small, write_external_data
from depthwire.export._route_inputs import STATES_OUT
from depthwire.export._route_manifest import RoutedGraphs, route_info, tensor_info
from depthwire.export.census import census, check_census, check_scales, weight_sizes
from depthwire.export.ops import DOMAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import onnx_ir as ir

    from depthwire.export.goldens import Goldens
    from depthwire.program import Program

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "transformers", "numpy", "safetensors")


def write_artifact(
    out: Path,
    *,
    original: Program,
    rewritten: Program,
    model: ir.Model,
    goldens: Goldens,
    recipe: dict[str, Any],
    checkpoints: list[Checkpoint],
    progress: Callable[[int, int], None] | None = None,
    routed: RoutedGraphs | None = None,
    precision: PrecisionInfo | None = None,
) -> Artifact:
    """Write ``model.onnx``, its weights, the goldens and the manifest.

    Args:
        out: The directory; an existing one is replaced (whether it may be is the caller's question).
        original: The captured program.
        rewritten: The program that ``model`` was translated from.
        model: Its initializers point at the weights file afterwards.
        goldens: Example inputs and the original's outputs.
        recipe: The resolved recipe.
        checkpoints: The values at which layers are compared.
        progress: Called with (bytes written, bytes in all) while the weights are written.
        routed: What a routed model adds: its specification, and graphs of other capacities over the same weights.
        precision: What was asked for and done, where that is not fp32; the census and the sizes are filled in.

    Raises:
        ExportError: ``onnx.checker`` refuses the file, or its dtypes are not those asked for (``export.precision``).
        OSError: The disk is full or the place cannot be written; nothing is left behind.
    """
    with temporary_sibling(out) as root:
        graphs = {MODEL: model, **({} if routed is None else routed.models)}
        others = [other for name, other in graphs.items() if name != MODEL]
        precision = None if precision is None else _counted(precision, graphs, rewritten)
        sha256, size = write_external_data(model, root / WEIGHTS, progress, others=others)
        for name, graph in graphs.items():
            inline_small(graph)
            _save_graph(graph, root / name)
            _check(root / name)
        goldens.save(root / GOLDENS)
        shutil.copymode(root / MODEL, root / GOLDENS)  # safetensors makes its files private
        manifest = _manifest(original, rewritten, model, recipe, checkpoints)
        manifest.route = route_info(graphs, routed)
        manifest.precision = precision
        artifact = Artifact(root, manifest)
        manifest.files[WEIGHTS] = FileEntry(bytes=size, sha256=sha256)
        for name in (*graphs, GOLDENS):
            artifact.add_file(name)
        artifact.write_manifest()
        put_in_place(root, out)
    return Artifact(out, manifest)


def _counted(precision: PrecisionInfo, graphs: Mapping[str, ir.Model], program: Program) -> PrecisionInfo:
    """Check the dtypes of every graph, and fill in the census and the sizes of the first."""
    wide = sum(precision.islands.get(reason, 0) for reason in ("scores", "logits", "functions"))
    for model in graphs.values():
        check_census(model, asked=precision.asked, rest=precision.rest, wide_products=wide)
    model = graphs[MODEL]
    check_scales(model, program)
    weights, embedding = weight_sizes(model)
    filled = {"census": census(model), "weight_bytes": weights, "embedding_bytes": embedding}
    return precision.model_copy(update=filled)


def _save_graph(model: ir.Model, path: Path) -> None:
    import onnx_ir as ir

    model.producer_name, model.producer_version = "depthwire", _version("depthwire")
    ir.save(model, path)


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            "export.checker",
            "The ONNX checker refuses the exported model",
            at=path.name,
            want="a model that passes onnx.checker with full_check",
            got=str(error).strip().splitlines()[0],
            todo="Report this with the model's configuration.",
        ) from error


def _manifest(
    original: Program, rewritten: Program, model: ir.Model, recipe: dict[str, Any], checkpoints: list[Checkpoint]
) -> Manifest:
    nodes = Counter(node.op_type if node.domain == "" else f"{node.domain}::{node.op_type}" for node in model.graph)
    bodies = {f"{function.domain}::{function.name}" for function in model.functions.values()}
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    return Manifest(
        depthwire=_version("depthwire"),
        created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        source=source_info(original),
        recipe=recipe,
        inputs=[tensor_info(value) for value in model.graph.inputs if not value.is_initializer()],
        outputs=[tensor_info(value) for value in model.graph.outputs if value.name != STATES_OUT],
        opsets=dict(model.graph.opset_imports),
        ops=dict(sorted(nodes.items())),
        custom_ops={
            name: CustomOp(count=count, body=name in bodies)
            for name, count in sorted(nodes.items())
            if name.startswith(f"{DOMAIN}::")
        },
        dtypes=dict(Counter(_dtype_name(tensor.dtype) for tensor in weights)),
        weight_bytes=rewritten.weight_bytes,
        passes=pass_infos(rewritten),
        checkpoints=checkpoints,
        tools={name: _version(name) for name in _TOOLS if _version(name)},
    )


def source_info(program: Program) -> SourceInfo:
    """Return where a program came from, as it stands in a manifest."""
    return SourceInfo(**dataclasses.asdict(program.source))


def pass_infos(program: Program) -> list[PassInfo]:
    """Return what the passes did to a program, as it stands in a manifest."""
    return [
        PassInfo(
            name=record.name,
            options=dict(record.options),
            rewrites=record.rewrites,
            declines=[dict(decline) for decline in record.declines],
            notes=list(record.notes),
            seconds=round(record.seconds, 3),
        )
        for record in program.history
    ]


def _dtype_name(dtype: ir.DataType) -> str:
    return str(dtype.numpy())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
