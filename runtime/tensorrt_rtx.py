"""Builds TensorRT-RTX engines ahead of time, on a CPU: no GPU and no driver are needed.

What comes out was *built*, not run: loading an engine takes an RTX GPU, and ``EngineInfo.notes`` says so.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from typing import TYPE_CHECKING

from depthwire.artifact import REPORT, Artifact, EngineInfo
from depthwire.errors import BuildError, UsageError
from depthwire.runtime._build_errors import turing_float32
from depthwire.runtime._build_process import BuildRequest, BuildResult, Progress, spawn
from depthwire.runtime._onnx_graph import GraphFacts, named_dtypes, read_graph
from depthwire.runtime._route_network import network_model, refuse_wide_selections, remove_abandoned
from depthwire.runtime._route_profile import SLOTS
from depthwire.runtime._turing import TURING, small_products
from depthwire.runtime.memory import require_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from depthwire.runtime.target import Target

__all__ = ["Progress", "build"]

ENGINE = "model.engine"
LOG = "build.log"
FAILED_LOG = "build-failed.log"
_NOT_RUN = "Built ahead of time without a GPU; not loaded or run on one."
_ROUTE_INPUTS = "Thresholds, budgets and counts are inputs of the engine: give them with every call."
_SHOWN_NODES = 5
# The builder's names of tensor types, in the manifest's spelling.
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_STRIPPED = "Without weights: it is loaded beside model.onnx and its weights, which are put back."


def build(
    artifact: Artifact,
    target: Target,
    *,
    compute_capabilities: Sequence[str] | None = None,
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    check_memory: bool = True,
    route_inputs: bool = False,
    all_capacities: bool = False,
    max_batch: int | None = None,
    strip_weights: bool = False,
) -> EngineInfo:
    """Build ``engine/<target>/model.engine`` and enter it into the manifest and the report.

    The same graph, compute capabilities and builder version give the same bytes.

    Args:
        artifact: The artefact; its ``model.onnx`` is what gets built.
        target: A target whose builder is ``tensorrt-rtx``.
        compute_capabilities: GPUs to compile for, in any usual spelling; ``None`` for the target's default set.
        workspace_bytes: Limit of the builder's workspace; ``None`` for the target's or the builder's default.
        optimization_level: 0 to 5; ``None`` for the target's or the builder's default.
        progress: Called as the build goes on; an exception from it cancels the build.
        check_memory: Refuse a build that is predicted not to fit into memory.
        route_inputs: Make thresholds, budgets and counts of a routed model inputs of the engine, which its caller must
            give; else they are constants.
        all_capacities: One engine for every capacity of the artefact, with K from an optimisation profile; its caller
            gives ``route_slots`` (0 … K-1) and the tables.
        max_batch: One engine for batches of 1 to this, tuned for this; ``None`` for the graph's own batch alone.
        strip_weights: Leave the weights out of the engine; ``engine.load_engine`` puts them back. Needs a GPU here.

    Returns:
        The engine's facts, as they stand in the manifest. A build that is cancelled or fails leaves an engine that
        was there before as it was; a failed one leaves its log in ``engine/<target>/build-failed.log``.

    Raises:
        UsageError: ``target.nothing-to-build``, ``target.bad-build-option``, ``build.no-route-inputs``,
            ``build.one-capacity``, ``build.batch-not-followed`` or a bad compute capability.
        BuildError: ``build.attention-op``, ``build.custom-op-without-body``, ``build.turing-float32``,
            ``build.too-many-slots``, ``build.out-of-memory``, or what ``_build_process.spawn`` raises.
    """
    level = optimization_level if optimization_level is not None else target.optimization_level
    workspace = workspace_bytes if workspace_bytes is not None else target.workspace_bytes
    _check_options(target, workspace, level, max_batch)
    capabilities = target.resolve_compute_capabilities(compute_capabilities)
    facts = read_graph(artifact.model)
    _refuse_unbuildable(artifact.model, facts, capabilities)
    refuse_wide_selections(artifact.model)
    predicted = None
    if target.memory is not None:
        predicted = target.memory.predict(
            weight_bytes=facts.weight_bytes,
            products=facts.products,
            nodes=facts.nodes,
            open_sizes=max_batch is not None or all_capacities,
        )
        if check_memory:
            require_memory(predicted, weight_bytes=facts.weight_bytes, at=str(artifact.model))

    engine_name, log_name = (f"engine/{target.name}/{file}" for file in (ENGINE, LOG))
    network = network_model(
        artifact,
        route_inputs=route_inputs,
        all_capacities=all_capacities,
        max_batch=max_batch,
        turing=TURING in capabilities,
    )
    with (
        network as (model, profile),
        _workplace(artifact.path(engine_name).parent) as (engine, log),
    ):
        request = BuildRequest(
            model=str(model.resolve()),
            engine=str(engine.resolve()),
            compute_capabilities=capabilities,
            workspace_bytes=workspace,
            optimization_level=level,
            profile=profile,
            strip_weights=strip_weights,
            dtypes=named_dtypes(model),
            source=str(artifact.model),
        )
        result = spawn(
            request,
            log=log,
            kept_log=log.with_name(FAILED_LOG),
            estimated_seconds=estimate_seconds(facts),
            progress=progress,
        )
        _withdraw(artifact, target, engine_name, log_name)
        engine.replace(artifact.path(engine_name))
        log.replace(artifact.path(log_name))
    info = _engine_info(target, engine_name, capabilities, result, predicted)
    if route_inputs or all_capacities:
        info.notes.append(_ROUTE_INPUTS)
    info.route_inputs, info.all_capacities, info.max_batch = route_inputs or all_capacities, all_capacities, max_batch
    info.stripped = strip_weights
    if strip_weights:
        info.notes.append(_STRIPPED)
    info.profile = {name: [list(shape) for shape in shapes] for name, shapes in profile.items()}
    if SLOTS in profile:
        info.notes.append(f"{SLOTS} of {profile[SLOTS][0][0]} to {profile[SLOTS][-1][0]}: its length is K.")
    if max_batch is not None:
        info.notes.append(f"Batches of 1 to {max_batch}, tuned for {max_batch}.")
    _record(artifact, info, log_name)
    return info


def estimate_seconds(facts: GraphFacts) -> float:
    """Return the expected duration of a build in seconds.

    Fitted by eye to the builds listed in ``depthwire.runtime.memory`` on two CPU cores (0.5 to 150 s, mostly within a
    factor of 1.5); another machine differs, so this feeds a progress display and nothing else.
    """
    return 0.5 + 4.0e-9 * facts.weight_bytes + 8.0e-3 * facts.products + 6.0e-5 * math.pow(facts.nodes, 1.5)


def _check_options(target: Target, workspace_bytes: int | None, level: int | None, max_batch: int | None) -> None:
    if target.builder != "tensorrt-rtx":
        raise UsageError(
            "target.nothing-to-build",
            f"Target {target.name} has no engine to build here",
            at=f"target {target.name}",
            want="a target whose builder is tensorrt-rtx",
            got=f"builder {target.builder}",
            todo="model.onnx is what runs there: 'depthwire verify' takes it as it is."
            if target.builder == "onnxruntime"
            else f"'depthwire bundle DIRECTORY --target {target.name}' writes what builds the engine on the device.",
        )
    wrong = []
    if level is not None and not 0 <= level <= 5:
        wrong.append(f"optimization level {level}")
    if workspace_bytes is not None and workspace_bytes <= 0:
        wrong.append(f"workspace of {workspace_bytes} bytes")
    if max_batch is not None and max_batch < 1:
        wrong.append(f"batch of at most {max_batch}")
    if wrong:
        raise UsageError(
            "target.bad-build-option",
            "An option of the build is out of its range",
            at=f"target {target.name}",
            want="an optimization level from 0 to 5, a workspace above 0 bytes, a batch of 1 or more",
            got=", ".join(wrong),
            todo="Change the option, or leave it out for the builder's default.",
        )


def _refuse_unbuildable(model: Path, facts: GraphFacts, capabilities: Sequence[str]) -> None:
    """Refuse what would end the builder's process, or what it would refuse after minutes."""
    if facts.attention:
        raise BuildError(
            "build.attention-op",
            "The graph has ONNX Attention nodes, which crash the TensorRT-RTX builder",
            at=f"{model}: {_some(facts.attention)}",
            want="attention written as MatMul and Softmax",
            got=f"{len(facts.attention)} Attention node(s)",
            todo="Convert the model again with --target rtx, which decomposes attention.",
        )
    if facts.without_body:
        raise BuildError(
            "build.custom-op-without-body",
            "The graph has custom operators without a function body, and TensorRT-RTX takes no plugins",
            at=f"{model}: {_some(facts.without_body)}",
            want="a function body in the file for every operator outside the ONNX standard",
            got=f"{len(facts.without_body)} node(s) without one",
            todo="Convert the model again with --target rtx, which writes the bodies into the file.",
        )
    if TURING in capabilities:
        small = set(small_products(model).values())
        large = [name for name in facts.float32_products if name not in small]
        if large:
            raise turing_float32(str(model), f"float32 products at {_some(large)}")


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_NODES
    return ", ".join(names[:_SHOWN_NODES]) + (f" and {more} more" if more > 0 else "")


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Give temporary names for engine and log beside their places, and leave nothing half-done behind."""
    created = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder, ENGINE, LOG)
    engine, log = (folder / f".{name}.{os.getpid()}" for name in (ENGINE, LOG))
    try:
        yield engine, log
        (folder / FAILED_LOG).unlink(missing_ok=True)
    except BuildError:
        log.replace(folder / FAILED_LOG)
        raise
    finally:
        for path in (engine, log):
            path.unlink(missing_ok=True)
        for path in created:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _withdraw(artifact: Artifact, target: Target, *names: str) -> None:
    # An interruption between here and the next manifest then leaves a file that nobody lists, never a wrong hash.
    listed = [name for name in names if artifact.manifest.files.pop(name, None) is not None]
    if artifact.manifest.engines.pop(target.name, None) is not None or listed:
        artifact.write_manifest()


def _engine_info(
    target: Target, name: str, capabilities: Sequence[str], result: BuildResult, predicted: int | None
) -> EngineInfo:
    return EngineInfo(
        target=target.name,
        builder=target.builder,
        version=result.version,
        file=name,
        compute_capabilities=list(capabilities),
        bytes=result.bytes,
        seconds=round(result.seconds, 3),
        peak_rss_bytes=result.peak_rss_bytes,
        predicted_rss_bytes=predicted,
        layers=result.layers,
        dtypes={_DTYPES.get(dtype, dtype.lower()): count for dtype, count in result.dtypes.items()},
        weights={_DTYPES.get(dtype, dtype.lower()): count for dtype, count in result.weights.items()},
        checked_dtypes=result.checked,
        notes=[_NOT_RUN],
    )


def _record(artifact: Artifact, info: EngineInfo, log_name: str) -> None:
    report = artifact.path(REPORT)
    if REPORT in artifact.manifest.files:
        content = json.loads(report.read_text(encoding="utf-8"))
        content.setdefault("engines", {})[info.target] = info.model_dump()
        temporary = report.with_name(f".{REPORT}.{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(report)
        artifact.add_file(REPORT)
    artifact.manifest.engines[info.target] = info
    artifact.add_file(info.file)
    artifact.add_file(log_name)
    artifact.write_manifest()
