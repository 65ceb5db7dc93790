"""``model_ctx.onnx``: an artefact's graph with the engine that a TensorRT provider of ONNX Runtime compiled from it.

ONNX Runtime calls it an EPContext model: one node holds the engine, so a session over it starts without a builder and
without the weights. It is made on the GPU that it is for; nothing of this was run without one.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from depthwire.artifact import EngineInfo
from depthwire.errors import BuildError
from depthwire.runtime import ort_tensorrt
from depthwire.runtime._route_network import network_model
from depthwire.runtime.doctor import diagnose

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import onnxruntime as ort

    from depthwire.artifact import Artifact
    from depthwire.runtime.doctor import Finding

TARGET = "ort-tensorrt"
"""Name of the compiled model among the manifest's engines."""

PROVIDERS = {
    "tensorrt": ort_tensorrt.TENSORRT,
    "nv-tensorrt-rtx": ort_tensorrt.NV_TENSORRT_RTX,
}

_NOTE = "Compiled by ONNX Runtime on this machine's GPU, for it and for this version of its provider."


def build_context(
    artifact: Artifact,
    provider: str = "auto",
    *,
    max_batch: int | None = None,
    findings: Sequence[Finding] | None = None,
) -> EngineInfo:
    """Let a TensorRT provider compile the artefact's graph, and list what it wrote in the manifest.

    Args:
        artifact: The artefact.
        provider: ``tensorrt``, ``nv-tensorrt-rtx``, or ``auto`` for what ``choose_providers`` puts first.
        max_batch: Leave the batch open, from 1 to this.
        findings: What the machine has; ``doctor.diagnose()`` when absent.

    Raises:
        BuildError: ``build.no-tensorrt-provider``: no GPU, or no provider; ``runtime.no-provider`` or
            ``runtime.session`` where a provider is there and fails; ``build.no-context`` where it wrote no file.
    """
    found = list(findings) if findings is not None else diagnose(folder=artifact.root)
    name = _provider(artifact, provider, found)
    start = time.monotonic()
    network = network_model(artifact, route_inputs=False, max_batch=max_batch)
    with network as (model, profile):
        settings = ort_tensorrt.settings_of(artifact, profile, context=True)
        settings.folder.mkdir(parents=True, exist_ok=True)
        open_session(model, name, settings)
    written = settings.folder / ort_tensorrt.CONTEXT
    if not written.is_file():
        raise BuildError(
            "build.no-context",
            "The provider has compiled nothing",
            at=str(model),
            want=str(written),
            got="no such file",
            todo="All nodes went to another provider. Convert with --target ort-cuda, whose graph TensorRT takes.",
        )
    info = EngineInfo(
        target=TARGET,
        builder=name,
        version=_version(),
        file=f"{ort_tensorrt.FOLDER}/{ort_tensorrt.CONTEXT}",
        compute_capabilities=[],
        bytes=written.stat().st_size,
        seconds=round(time.monotonic() - start, 3),
        peak_rss_bytes=0,
        profile={key: [list(shape) for shape in shapes] for key, shapes in profile.items()},
        max_batch=max_batch,
        notes=[_NOTE],
    )
    artifact.manifest.engines[TARGET] = info
    artifact.add_file(info.file)
    artifact.write_manifest()
    return info


def open_context(artifact: Artifact) -> ort.InferenceSession:
    """Open the compiled model; its provider must be the one that compiled it.

    Raises:
        BuildError: ``build.no-context``, ``runtime.no-provider`` or ``runtime.session``.
    """
    info = artifact.manifest.engines.get(TARGET)
    if info is None:
        raise BuildError(
            "build.no-context",
            "The artefact has no compiled model",
            at=str(artifact.root),
            want=f"an entry {TARGET} among the manifest's engines",
            got="none",
            todo=f"Compile it on the GPU: depthwire build {artifact.root} --target ort-cuda --provider auto",
        )
    return open_session(artifact.path(info.file), info.builder, ort_tensorrt.settings_of(artifact))


def open_session(model: Path, name: str, settings: ort_tensorrt.ProviderSettings) -> ort.InferenceSession:
    """Open a graph on one provider, with CPU behind it, and check that the provider is really used.

    Raises:
        BuildError: ``runtime.no-provider`` or ``runtime.session``.
    """
    import onnxruntime

    from depthwire.runtime.onnxruntime import no_provider, refused_session

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in ort_tensorrt.session_entries(name, settings).items():
        options.add_session_config_entry(key, value)
    wanted = [(name, ort_tensorrt.provider_options(name, settings)), (ort_tensorrt.CPU, {})]
    remaining: list[Any] | None = ort_tensorrt.attach(options, wanted) or None
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=remaining)
    except Exception as error:
        raise refused_session(model, [name], error) from error
    if name not in session.get_providers():
        raise no_provider([name], session.get_providers())
    return session


def _provider(artifact: Artifact, provider: str, findings: Sequence[Finding]) -> str:
    best = ort_tensorrt.choose_providers(findings)[0][0]
    if best in PROVIDERS.values():
        return best if provider == "auto" else PROVIDERS[provider]
    names = (ort_tensorrt.GPU_FINDING, ort_tensorrt.TENSORRT_FINDING, ort_tensorrt.PLUGIN)
    lacks = [f"{each.name}: {each.detail}" for each in findings if each.name in names and each.status != "present"]
    raise BuildError(
        "build.no-tensorrt-provider",
        "No TensorRT provider of ONNX Runtime works on this machine",
        at=str(artifact.root),
        want="an NVIDIA GPU, and TensorRT or the plugin for TensorRT-RTX",
        got="; ".join(lacks) or f"{best} alone",
        todo="Run 'depthwire doctor' on the machine with the GPU, and compile there.",
    )


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
