"""``kernels``: GPU kernels for the custom ops of an artefact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthwire.artifact import Artifact
from depthwire.report import make_report, write_report

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from depthwire.artifact import KernelsInfo
    from depthwire.stages import Stages


def kernels(directory: Path, compute_capabilities: Sequence[str], stages: Stages) -> KernelsInfo:
    """See ``depthwire.api.kernels``."""
    from depthwire.runtime.triton.build import build_kernels, resolve_capabilities
    from depthwire.runtime.triton.compile import require_triton

    capabilities = resolve_capabilities(compute_capabilities)
    require_triton()
    with stages.stage("load", str(directory)) as stage:
        artifact = Artifact.load(directory)
        stage.bytes = sum(entry.bytes for entry in artifact.manifest.files.values())
    with stages.stage("kernels", ", ".join(capabilities)) as stage:
        info = build_kernels(
            artifact,
            capabilities,
            progress=lambda done, total: stage.progress(f"{done} of {total} compiled", done / total),
        )
        stage.bytes = info.bytes
        stage.detail = f"{info.kernels} kernels for {', '.join(info.compute_capabilities)}"
    write_report(artifact, make_report(artifact, stages))
    return info
