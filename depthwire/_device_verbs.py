"""The verbs that make something for a device, and read back what it found; ``depthwire.api`` has them all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from depthwire.stages import Stages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from depthwire._remote import DeviceRun
    from depthwire.artifact import EngineInfo, KernelsInfo
    from depthwire.runtime.bundle import BundleInfo
    from depthwire.runtime.device_result import Judged


def verify_result(directory: str | Path, result: str | Path, *, stages: Stages | None = None) -> Judged:
    """Read back what a device found, judge it again, and keep it in the artefact as ``engine/<target>/result.json``.

    Args:
        directory: The artefact that the bundle was made from; every hash is checked first.
        result: The ``result.json`` that ``build_and_verify.py`` wrote.
        stages: See the module's text.

    Returns:
        The result and the judgement; ``require_passed()`` raises where it is no proof.

    Raises:
        ExportError: It is no result, or one of another artefact.
    """
    from depthwire import _device_result

    return _device_result.verify_result(Path(directory), Path(result), stages or Stages())


def build(
    directory: str | Path,
    *,
    target: str | None = None,
    compute_capabilities: Sequence[str] | None = None,
    workspace: int | None = None,
    optimization_level: int | None = None,
    check_memory: bool = True,
    route_inputs: bool | None = None,
    all_capacities: bool | None = None,
    max_batch: int | None = None,
    strip_weights: bool | None = None,
    provider: Literal["auto", "tensorrt", "nv-tensorrt-rtx"] | None = None,
    stages: Stages | None = None,
) -> EngineInfo:
    """Build an engine from an artefact and list it in the manifest.

    Args:
        directory: The artefact; every hash is checked first.
        target: What to build for; the artefact's own when absent.
        compute_capabilities: GPUs, such as ``SM86``; the recipe's, else the target's own, when absent.
        workspace: Most scratch memory of the engine in bytes; the recipe's, else the builder's default, when absent.
        optimization_level: Builder effort, 0 to 5; as above when absent.
        route_inputs: Make a routed model's thresholds, budgets and counts inputs; as above when absent.
        all_capacities: One engine for every capacity of a routed model; as above when absent.
        max_batch: One engine for batches of 1 to this, tuned for this; as above when absent.
        strip_weights: Leave the weights out of the engine, which takes a GPU; as above when absent.
        provider: With target ``ort-cuda``: let this provider of ONNX Runtime compile the graph, on this machine's GPU.
        check_memory: Refuse a build that is predicted not to fit into memory.
        stages: See the module's text.

    Raises:
        DepthwireError: A target or option is wrong, the artefact is damaged, or the builder is absent or fails.
    """
    from depthwire import _build

    options = {
        "target": target,
        "compute_capabilities": None if compute_capabilities is None else list(compute_capabilities),
        "workspace": workspace,
        "optimization_level": optimization_level,
        "check_memory": check_memory,
        "route_inputs": route_inputs,
        "all_capacities": all_capacities,
        "max_batch": max_batch,
        "strip_weights": strip_weights,
    }
    return _build.build(Path(directory), options, stages or Stages(), provider=provider)


def bundle(
    directory: str | Path,
    *,
    target: str,
    out: str | Path | None = None,
    jetpack: str | None = None,
    form: str | None = None,
    flavour: str | None = None,
    capacities: Sequence[str] = (),
    workspace: int | None = None,
    optimization_level: int | None = None,
    latency_runs: int | None = None,
    stages: Stages | None = None,
) -> BundleInfo:
    """Write a device bundle: graphs, weights, goldens, and a script that builds, proves and measures the engines.

    Args:
        directory: The artefact; every hash is checked first, and the bundle is listed in it.
        target: The device.
        out: The bundle's directory; ``DIRECTORY-TARGET`` beside the artefact when absent. Replaces an earlier one.
        jetpack: JetPack of a Jetson; the target's default when absent.
        form: Of the custom operators, ``function`` or ``plugin``; the target's when absent.
        flavour: ``tensorrt`` or ``tensorrt_rtx``; the target's when absent.
        capacities: Graphs of a routed model, such as ``25%``; all of them when empty.
        workspace: Limit of the builder's workspace in bytes; the target's when absent.
        optimization_level: 0 to 5; the target's when absent.
        latency_runs: Runs that are measured on the device.
        stages: See the module's text.

    Raises:
        UsageError: The target builds nothing, or an option does not fit it.
        BuildError: The model does not fit the device, or its operators do not fit the device's TensorRT.
        ExportError: The artefact is damaged, or the disk is full.
        ParityError: The graph, in the form it would travel in, does not compute the goldens.
    """
    from depthwire import _bundle
    from depthwire.runtime.bundle import LATENCY_RUNS, BundleOptions
    from depthwire.runtime.target import load_target

    options = BundleOptions(
        form=form,
        flavour=flavour,
        capacities=tuple(capacities),
        latency_runs=LATENCY_RUNS if latency_runs is None else latency_runs,
        workspace_bytes=workspace,
        optimization_level=optimization_level,
    )
    place = None if out is None else Path(out)
    return _bundle.bundle(Path(directory), load_target(target, jetpack), place, options, stages or Stages())


def run_bundle(
    directory: str | Path,
    bundle: BundleInfo,
    *,
    on: str,
    identity: str | Path | None = None,
    python: str = "python3",
    ssh_options: Sequence[str] = (),
    remote_dir: str | None = None,
    ignore_board: bool = False,
    skip_latency: bool = False,
    keep: bool = False,
    stages: Stages | None = None,
) -> DeviceRun:
    """Run a bundle on a device over ssh and read the result back (``bundle --on``); resumes what was interrupted.

    Args:
        directory: The artefact.
        bundle: A bundle of it.
        on: ``[user@]host[:port]``.
        identity: The private key to log in with; the user's own configuration decides when absent.
        python: Python of the device.
        ssh_options: ``KEY=VALUE``, as for ``ssh -o``.
        remote_dir: Folder on the device; one named after the bundle when absent.
        ignore_board: Go on with another board, memory size or L4T.
        skip_latency: Do not measure.
        keep: Leave the folder on the device.
        stages: See the module's text.

    Returns:
        What was copied, fetched and found; ``require_built()`` raises where the script failed.

    Raises:
        UsageError: The address or an option cannot be meant.
        RemoteError: The device cannot be reached, or cannot be worked on.
        ExportError: The result is not one of this artefact.
    """
    from depthwire._remote import run_on_device
    from depthwire.runtime.remote import parse_device

    key = None if identity is None else Path(identity)
    device = parse_device(on, identity=key, python=python, ssh_options=ssh_options)
    flags = [flag for flag, given in (("--ignore-board", ignore_board), ("--skip-latency", skip_latency)) if given]
    root, told = Path(directory), stages or Stages()
    return run_on_device(root, bundle, device, told, folder=remote_dir, arguments=flags, keep=keep)


def kernels(
    directory: str | Path,
    *,
    compute_capabilities: Sequence[str],
    stages: Stages | None = None,
) -> KernelsInfo:
    """Compile GPU kernels for the depth-attention operators of an artefact and list them in the manifest.

    They lie in ``kernels/`` of the artefact, which is replaced as a whole. ONNX Runtime's CUDA provider runs them in
    place of the function bodies (``docs/triton.md``).

    Args:
        directory: The artefact; every hash is checked first.
        compute_capabilities: GPUs to compile for, such as ``SM87``.
        stages: See the module's text.

    Raises:
        UsageError: No compute capability, an unknown one, or the artefact has no depth-attention operators.
        ExportError: The artefact is damaged.
        BuildError: triton is not installed, or cannot compile a kernel.
    """
    from depthwire import _kernels

    return _kernels.kernels(Path(directory), list(compute_capabilities), stages or Stages())
