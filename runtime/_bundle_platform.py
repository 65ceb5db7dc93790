"""What a bundle says of its device and its builder, from the target's facts."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from depthwire.errors import UsageError
from depthwire.runtime._target_checks import require_form
from depthwire.runtime.deploy.manifest import BuilderOptions, Platform
from depthwire.runtime.footprint import Footprint, own_precision, read_model, require_fits
from depthwire.runtime.target import load_target

if TYPE_CHECKING:
    from collections.abc import Collection

    from depthwire.artifact import Artifact
    from depthwire.runtime.target import Precision, Target

PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_FLOOR_SHARE, _LEAST_FLOOR = 0.05, 200_000_000


def with_flavour(target: Target, flavour: str | None) -> Target:
    """Return the target with the builder that was asked for.

    Args:
        target: The target.
        flavour: ``tensorrt`` or ``tensorrt_rtx``; ``None`` for the target's own builder.

    Raises:
        UsageError: ``bundle.nothing-to-build`` or ``bundle.flavour``.
    """
    own = PACKAGES.get(target.builder)
    if own is None:
        raise UsageError(
            "bundle.nothing-to-build",
            f"Target {target.name} has no engine that a device could build",
            at=f"--target {target.name}",
            want="a target of TensorRT or TensorRT-RTX",
            got=f"builder {target.builder}",
            todo="Copy the artefact: ONNX Runtime runs its model.onnx. 'depthwire targets' lists the others.",
        )
    if flavour in {None, own}:
        return target
    rtx = load_target("rtx")
    served = set(target.compute_capabilities) <= set(rtx.compute_capabilities)
    if flavour != "tensorrt_rtx" or not served:
        raise UsageError(
            "bundle.flavour",
            f"Target {target.name} is not built by {flavour}",
            at=f"--flavour {flavour}",
            want=own,
            got=f"{', '.join(target.compute_capabilities)}"
            + ("" if flavour == "tensorrt" else f": TensorRT-RTX serves {', '.join(rtx.compute_capabilities)}"),
            todo="Leave --flavour out.",
        )
    kept = ("name", "title", "compute_capabilities", "default_compute_capabilities", "boards", "memory_bytes")
    more = ("memory_is_unified", "reserved_bytes")
    return rtx.model_copy(update={name: getattr(target, name) for name in (*kept, *more)} | {"aliases": ()})


def platform_of(target: Target) -> Platform:
    """Return what the device must be; the target has its flavour."""
    at_least, below = target.tensorrt_range or ("0", "0")
    # TensorRT-RTX engines are compiled for a set of GPUs, of which the device must have one.
    return Platform(
        boards=target.boards,
        jetpack=target.jetpack,
        l4t=target.l4t,
        compute_capabilities=target.default_compute_capabilities,
        package=PACKAGES[target.builder],
        tensorrt_at_least=at_least,
        tensorrt_below=below,
        memory_bytes=target.memory_bytes if target.memory_is_unified else None,
    )


def form_of(target: Target, form: str | None, custom_ops: Collection[str]) -> str:
    """Return the form of the custom operators: what was asked for, or what suits target and graph.

    Raises:
        BuildError: ``target.plugin-unsupported``.
    """
    if form is not None:
        require_form(target, form)
        return form
    return "plugin" if target.custom_ops == "plugin" and custom_ops else "function"


def builder_options(
    target: Target, *, workspace_bytes: int | None, optimization_level: int | None, disk_bytes: int
) -> BuilderOptions:
    """Return how the engines are built; a floor of memory keeps a board with unified memory alive."""
    package = PACKAGES[target.builder]
    share = round((target.memory_bytes or 0) * _FLOOR_SHARE) if target.memory_is_unified else 0
    return BuilderOptions(
        workspace_bytes=target.workspace_bytes if workspace_bytes is None else workspace_bytes,
        optimization_level=target.optimization_level if optimization_level is None else optimization_level,
        tf32=False,
        compute_capabilities=target.default_compute_capabilities if package == "tensorrt_rtx" else (),
        floor_bytes=max(share, _LEAST_FLOOR),
        disk_bytes=disk_bytes,
    )


def require_target(artifact: Artifact, target: Target) -> Footprint:
    """Refuse a graph that the target cannot hold or compute, naming layer and limit.

    Args:
        artifact: The artefact, with the graph in question chosen.
        target: The target, under its JetPack and with its flavour.

    Returns:
        The memory that the graph is predicted to take.

    Raises:
        UsageError: ``target.precision-unsupported``.
        BuildError: ``target.topk-limit`` or ``target.memory-limit``.
    """
    facts = read_model(artifact.model)
    precision = artifact.manifest.precision
    asked = own_precision(facts) if precision is None else cast("Precision", precision.asked)
    target.require_precision(asked, target.default_compute_capabilities)
    return require_fits(target, facts)
