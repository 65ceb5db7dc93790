"""``bundle``: what a device needs to build and prove an engine, from an artefact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthwire._outdir import disk_full_as_error, require_space
from depthwire.artifact import Artifact

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire.runtime.bundle import BundleInfo, BundleOptions
    from depthwire.runtime.target import Target
    from depthwire.stages import Stages


def bundle(directory: Path, device: Target, out: Path | None, options: BundleOptions, stages: Stages) -> BundleInfo:
    """See ``depthwire.api.bundle``."""
    from depthwire.runtime.bundle import check_bundle_out, write_bundle

    place = place_of(directory, device.name, out)
    check_bundle_out(place)
    with stages.stage("load", str(directory)) as stage:
        artifact = Artifact.load(directory)
        stage.bytes = sum(entry.bytes for entry in artifact.manifest.files.values())
    needed = stage.bytes
    require_space(place, needed)
    with stages.stage("bundle", device.name) as stage, disk_full_as_error(place, needed):
        info = write_bundle(artifact, device, place, options, progress=lambda step: stage.progress(step, None))
        stage.bytes = info.bytes
        stage.detail = f"{device.name}, {info.bundle.form} form, {len(info.bundle.models)} engine(s) to build"
        for proxy in info.bundle.proxies:
            stage.note(f"{proxy.model}: {proxy.label}: {_outcome(proxy.passed)} ({proxy.detail})")
    _record(artifact, info)
    return info


def place_of(directory: Path, target: str, out: Path | None) -> Path:
    """Return the bundle's directory: ``DIRECTORY-TARGET`` beside the artefact when none is given."""
    return out if out is not None else directory.with_name(f"{directory.resolve().name}-{target}")


def _outcome(passed: bool | None) -> str:  # noqa: FBT001 - the three values of Proxy.passed
    return "not run" if passed is None else "parsed" if passed else "REFUSED"


def _record(artifact: Artifact, info: BundleInfo) -> None:
    """Keep the bundle's manifest, so that a result can be told to belong to this artefact."""
    from depthwire.runtime.deploy.manifest import BUNDLE
    from depthwire.runtime.device_result import BUNDLES

    name = f"{BUNDLES}/{info.sha256[:16]}.json"
    if name in artifact.manifest.files:
        return
    path = artifact.path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((info.root / BUNDLE).read_bytes())
    artifact.add_file(name)
    artifact.write_manifest()
