"""``verify --result``: what a device found, read back into the artefact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthwire.artifact import Artifact

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire.runtime.device_result import Judged
    from depthwire.stages import Stages


def verify_result(directory: Path, path: Path, stages: Stages) -> Judged:
    """See ``depthwire.api.verify_result``."""
    from depthwire.runtime.device_result import judge_result, record_result

    with stages.stage("load", str(directory)) as stage:
        artifact = Artifact.load(directory)
        stage.bytes = sum(entry.bytes for entry in artifact.manifest.files.values())
    with stages.stage("result", str(path)) as stage:
        judged = judge_result(artifact, path)
        name = record_result(artifact, judged, path)
        stage.detail = f"{judged.result.target}: {judged.result.verdict}, kept as {name}"
    return judged
