"""``build``: an engine from an artefact, by the target's builder."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from depthwire import _flow
from depthwire.artifact import Artifact
from depthwire.errors import BuildError, UsageError
from depthwire.recipe import make_recipe
from depthwire.report import make_report, write_report

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from depthwire.artifact import EngineInfo
    from depthwire.recipe import BuildOptions
    from depthwire.runtime.target import Target
    from depthwire.runtime.tensorrt_rtx import Progress
    from depthwire.stages import Stages


def has_engine(target: Target) -> bool:
    """Whether something is built for a target; ONNX Runtime runs the ONNX file itself."""
    return target.builder != "onnxruntime"


def builds_here(target: Target) -> bool:
    """Whether the engine is built on this machine; others are built by a bundle, where their GPU is."""
    return has_engine(target) and target.builds_on != "device"


def require_backend(target: Target) -> None:
    """Refuse a target whose engine is built elsewhere, or whose builder is not installed.

    Raises:
        BuildError: ``build.on-device`` or ``build.backend-missing``.
    """
    from depthwire.runtime.doctor import PACKAGES

    if target.builds_on == "device":
        raise BuildError(
            "build.on-device",
            f"An engine for target {target.name} is built where its GPU is, not here",
            at=f"--target {target.name}",
            want="a target whose engine is built anywhere: rtx",
            got=f"{target.title}, built by {target.builder} on the device",
            todo=f"'depthwire bundle DIRECTORY --target {target.name}' writes what builds and proves the engine there.",
        )
    package = next((package for package in PACKAGES if package.distribution == target.builder), None)
    if package is None or importlib.util.find_spec(package.module) is not None:
        return
    raise BuildError(
        "build.backend-missing",
        f"The builder of target {target.name} is not installed",
        at=f"--target {target.name}",
        want=f"the package {package.distribution}",
        got=f"no module {package.module}",
        todo=f"Install it: {package.remedy}. Or add --no-build to write the ONNX model alone.",
    )


def build(directory: Path, options: Mapping[str, object], stages: Stages, *, provider: str | None = None) -> EngineInfo:
    """See ``depthwire.api.build``."""
    from depthwire.runtime.target import load_target

    with stages.stage("load", str(directory)) as stage:
        artifact = Artifact.load(directory)
        stage.bytes = sum(entry.bytes for entry in artifact.manifest.files.values())
    recorded = _flow.recorded_recipe(artifact)
    recipe = make_recipe(options, base=recorded)
    target = load_target(recipe.target)
    if has_engine(target) and provider is None:
        require_backend(target)
    engine = (
        build_stage(artifact, target, recipe.build, stages)
        if provider is None
        else context_stage(artifact, target, provider, recipe.build, stages)
    )
    write_report(artifact, make_report(artifact, stages))
    return engine


def context_stage(
    artifact: Artifact, target: Target, provider: str, options: BuildOptions, stages: Stages
) -> EngineInfo:
    """Let a TensorRT provider of ONNX Runtime compile the graph.

    Raises:
        UsageError: ``build.provider``: the target is not ONNX Runtime's on a GPU.
        BuildError: No provider works here, or it fails.
    """
    from depthwire.runtime.ort_context import build_context

    if target.name != "ort-cuda":
        raise UsageError(
            "build.provider",
            "Only ONNX Runtime on a GPU has providers to choose from",
            at="--provider",
            want="--target ort-cuda",
            got=f"target {target.name}",
            todo="Name the target, or leave --provider out.",
        )
    with stages.stage("build", f"{target.name}, {provider}") as stage:
        engine = build_context(artifact, provider, max_batch=options.max_batch)
        stage.bytes = engine.bytes
        stage.detail = f"{target.name} by {engine.builder}"
        return engine


def build_stage(artifact: Artifact, target: Target, options: BuildOptions, stages: Stages) -> EngineInfo:
    """Build, with the builder's progress shown.

    Raises:
        UsageError: Nothing is built for this target, or not for that compute capability.
        BuildError: The builder is absent, lacks memory, or fails.
    """
    with stages.stage("build", target.name) as stage:
        from depthwire.runtime.tensorrt_rtx import build as build_engine

        def show(progress: Progress) -> None:
            rest = progress.eta_seconds
            fraction = None if rest is None else progress.elapsed_seconds / max(progress.elapsed_seconds + rest, 1e-9)
            stage.progress(progress.phase, fraction, rest)

        engine = build_engine(
            artifact,
            target,
            compute_capabilities=options.compute_capabilities,
            workspace_bytes=options.workspace,
            optimization_level=options.optimization_level,
            progress=show,
            check_memory=options.check_memory,
            route_inputs=options.route_inputs,
            all_capacities=options.all_capacities,
            max_batch=options.max_batch,
            strip_weights=options.strip_weights,
        )
        stage.bytes = engine.bytes
        stage.child_peak(engine.peak_rss_bytes)
        stage.detail = f"{target.name} for {', '.join(engine.compute_capabilities)}"
        return engine
