"""The GPU kernels of an artefact: compiled for its operators, put beside its model and listed in its manifest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from depthwire.artifact import KERNELS, KernelsInfo
from depthwire.errors import UsageError
from depthwire.runtime.triton.bundle import INDEX, kernels_of, write_bundle
from depthwire.runtime.triton.compile import KNOWN, capability_of, require_triton

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from depthwire.artifact import Artifact

_NOT_RUN: Final = "compiled ahead of time; not run on a GPU"


def resolve_capabilities(requested: Sequence[str]) -> tuple[str, ...]:
    """Return the compute capabilities to compile for, in ascending order and without repetition.

    Args:
        requested: User spellings (``SM87``, ``8.7``).

    Raises:
        UsageError: As ``capability_of``, or ``target.no-compute-capability`` for an empty request.
    """
    if not requested:
        raise UsageError(
            "target.no-compute-capability",
            "No compute capability was named to compile for",
            at="compute capability",
            want=f"at least one of {', '.join(KNOWN)}",
            got="none",
            todo="Name the GPU's, such as --cc SM87; repeat for several.",
        )
    return tuple(sorted({capability_of(text) for text in requested}, key=lambda capability: int(capability[2:])))


def build_kernels(
    artifact: Artifact,
    compute_capabilities: Sequence[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> KernelsInfo:
    """Compile the kernels of an artefact's depth-attention and routing operators, into its folder ``kernels/``.

    The folder is written beside the earlier one and renamed when it is whole: a run that fails or is interrupted leaves
    the artefact as it was.

    Args:
        artifact: The artefact; its manifest is written.
        compute_capabilities: GPUs to compile for.
        progress: Called after each cubin with the number of those done and of all.

    Raises:
        UsageError: As ``resolve_capabilities``; ``triton.no-operators``, ``triton.bad-spec``.
        BuildError: ``triton.missing``, or as ``write_bundle``.
    """
    capabilities = resolve_capabilities(compute_capabilities)
    version = require_triton()
    began = time.perf_counter()
    specs = kernels_of(artifact.model)
    if not specs:
        raise UsageError(
            "triton.no-operators",
            "The artefact has no depth-attention or routing operators to compile kernels for",
            at=str(artifact.model),
            want="nodes AttnRes…, SelectTokens… and the like of domain depthwire",
            got=", ".join(artifact.manifest.custom_ops) or "no custom ops",
            todo="Convert the model with --attn-res or with routing; a plain residual stream runs as it is.",
        )
    folder = artifact.path(KERNELS)
    entries = write_bundle(specs, capabilities, folder, progress=progress, replacing=lambda: _withdraw(artifact))
    info = KernelsInfo(
        compiler="triton",
        version=version,
        compute_capabilities=list(capabilities),
        kernels=len(specs),
        bytes=sum((folder / entry.file).stat().st_size for entry in entries),
        seconds=round(time.perf_counter() - began, 3),
        notes=[_NOT_RUN],
    )
    for name in (INDEX, *(entry.file for entry in entries)):
        artifact.add_file(f"{KERNELS}/{name}")
    artifact.manifest.kernels = info
    artifact.write_manifest()
    return info


def _withdraw(artifact: Artifact) -> None:
    # An interruption between here and the next manifest then leaves files that nobody lists, never a wrong hash.
    listed = [name for name in artifact.manifest.files if name.startswith(f"{KERNELS}/")]
    for name in listed:
        del artifact.manifest.files[name]
    if listed or artifact.manifest.kernels is not None:
        artifact.manifest.kernels = None
        artifact.write_manifest()
