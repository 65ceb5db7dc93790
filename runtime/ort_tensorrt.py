"""ONNX Runtime's two TensorRT providers: which of them this machine can use, with which options, and a compiled model.

``TensorrtExecutionProvider`` is part of ``onnxruntime-gpu`` and needs TensorRT itself, of the major version that its
library is linked against (10 in ONNX Runtime 1.31). ``NvTensorRTRTXExecutionProvider`` is a plugin, the package
``onnxruntime-ep-nv-tensorrt-rtx``, which brings TensorRT-RTX along. Names of options: those that
``libonnxruntime_providers_tensorrt.so`` of ONNX Runtime 1.31.1 holds, which a test reads, and
``tensorrt_rtx_provider_options.h`` in the plugin's package, 0.5.0. Both need a GPU, so neither was run.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from depthwire.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnxruntime as ort

    from depthwire.artifact import Artifact
    from depthwire.runtime._route_network import Profile
    from depthwire.runtime.doctor import Finding

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
NV_TENSORRT_RTX = "NvTensorRTRTXExecutionProvider"

PLUGIN = "onnxruntime-ep-nv-tensorrt-rtx"
PLUGIN_MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
PLUGIN_LINE = "pip install 'depthwire[ort-rtx]'"
TENSORRT_FINDING = "TensorRT provider"
GPU_FINDING = "NVIDIA GPU"

FOLDER = "engine/ort-tensorrt"
"""Where in an artefact caches and the compiled model lie."""

CONTEXT = "model_ctx.onnx"

_CAPABILITY = re.compile(r", (\d+)\.(\d+), ")
# What the plugin accepts: IsComputeCapabilitySupported of its tensorrt_rtx_provider_options.h.
_RTX_CAPABILITIES = frozenset({86, 89})
_RTX_SINCE = 120

ProviderList = list[tuple[str, dict[str, str]]]


@dataclass(frozen=True)
class ProviderSettings:
    """What decides the options of a provider.

    Attributes:
        folder: Absolute path of the caches.
        dtypes: Dtypes of the graph's tensors, in numpy's spelling: the precisions that TensorRT may use.
        profile: Least, usual and greatest shape of every input whose shape is not static.
        context: Write the compiled model (``model_ctx.onnx``) when a session is made.
        embed: Hold the engine in that file, instead of in one of its own beside it.
    """

    folder: Path
    dtypes: frozenset[str] = frozenset()
    profile: Profile = field(default_factory=dict)
    context: bool = False
    embed: bool = True


def settings_of(artifact: Artifact, profile: Profile | None = None, *, context: bool = False) -> ProviderSettings:
    """Return the settings for an artefact: its folder for caches, and its dtypes."""
    folder = artifact.path(FOLDER).resolve()
    return ProviderSettings(folder, frozenset(artifact.manifest.dtypes), profile or {}, context)


def choose_providers(findings: Sequence[Finding], settings: ProviderSettings | None = None) -> ProviderList:
    """Return the providers that this machine can use, best first, with their options.

    On an RTX GPU the plugin for TensorRT-RTX goes before TensorRT's own provider, which otherwise takes any NVIDIA GPU.
    Never both: they would part the graph between them. CUDA and the CPU come behind, for operators that TensorRT does
    not take.

    Args:
        findings: ``doctor.diagnose()``.
        settings: Decides the options; without them the providers keep no caches.
    """
    status = {finding.name: finding.status for finding in findings}
    gpu = next((finding for finding in findings if finding.name == GPU_FINDING), None)
    chosen = [CPU]
    if gpu is not None and gpu.status == "present":
        runtime = next((finding.detail for finding in findings if finding.name == "onnxruntime"), "")
        if re.search(r"\bcuda\b", runtime):
            chosen.insert(0, CUDA)
        if status.get(PLUGIN) == "present" and _is_rtx(gpu.detail):
            chosen.insert(0, NV_TENSORRT_RTX)
        elif status.get(TENSORRT_FINDING) == "present":
            chosen.insert(0, TENSORRT)
    return [(name, {} if settings is None else provider_options(name, settings)) for name in chosen]


def provider_options(name: str, settings: ProviderSettings) -> dict[str, str]:
    """Return the options of one provider: caches, profile, precisions, and the compiled model."""
    if name == TENSORRT:
        return _tensorrt_options(settings)
    if name == NV_TENSORRT_RTX:
        return {"nv_runtime_cache_path": str(settings.folder / "runtime"), **_profile_options("nv", settings.profile)}
    return {}


def session_entries(name: str, settings: ProviderSettings) -> dict[str, str]:
    """Return the session's configuration entries that a provider needs: the plugin has no options for its context."""
    if name != NV_TENSORRT_RTX or not settings.context:
        return {}
    return {
        "ep.context_enable": "1",
        "ep.context_file_path": str(settings.folder / CONTEXT),
        "ep.context_embed_mode": str(int(settings.embed)),
    }


def attach(options: ort.SessionOptions, providers: Sequence[tuple[str, Mapping[str, str]]]) -> ProviderList:
    """Add a plugin's provider to the options of a session, and return the providers to give to the session itself.

    Raises:
        BuildError: ``runtime.no-provider``: the plugin is not installed, does not load, or finds no GPU.
    """
    others = [(name, dict(given)) for name, given in providers if name != NV_TENSORRT_RTX]
    if len(others) == len(providers):
        return others
    given = next(dict(each) for name, each in providers if name == NV_TENSORRT_RTX)
    options.add_provider_for_devices(_plugin_devices(), given)
    for name, each in others:
        # A session takes its providers from its options or from its arguments, not from both. The CPU is always there.
        if name != CPU:
            options.add_provider(name, each)
    return []


def _plugin_devices() -> list[ort.OrtEpDevice]:
    import onnxruntime

    try:
        plugin = importlib.import_module(PLUGIN_MODULE)
    except ImportError as error:
        raise _no_plugin(f"{type(error).__name__}: {error}", f"Install it: {PLUGIN_LINE}") from error
    found = _devices()
    if not found:
        try:
            onnxruntime.register_execution_provider_library(NV_TENSORRT_RTX, plugin.get_library_path())
        except Exception as error:
            todo = "It needs NVIDIA's driver; 'depthwire doctor --deep' says what is there."
            raise _no_plugin(f"{type(error).__name__}: {error}", todo) from error
        found = _devices()
    if not found:
        raise _no_plugin(
            "no device that it can use", "It takes RTX GPUs of compute capability 8.6, 8.9, and from 12.0."
        )
    return found


def _devices() -> list[ort.OrtEpDevice]:
    import onnxruntime

    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == NV_TENSORRT_RTX]


def _tensorrt_options(settings: ProviderSettings) -> dict[str, str]:
    switches = {
        "trt_engine_cache_enable": True,
        "trt_timing_cache_enable": True,
        # The network is weakly typed here: TensorRT may use no dtype but float32 unless it is allowed to.
        "trt_fp16_enable": "float16" in settings.dtypes,
        "trt_bf16_enable": "bfloat16" in settings.dtypes,
        "trt_int8_enable": "int8" in settings.dtypes,
    }
    # The provider wants a path relative to the compiled model's while it writes that.
    paths = {
        "trt_engine_cache_path": "engines" if settings.context else str(settings.folder),
        "trt_timing_cache_path": str(settings.folder),
    }
    context = {
        "trt_dump_ep_context_model": "1",
        "trt_ep_context_file_path": str(settings.folder / CONTEXT),
        "trt_ep_context_embed_mode": str(int(settings.embed)),
    }
    return {
        **{name: str(int(on)) for name, on in switches.items()},
        **paths,
        **_profile_options("trt", settings.profile),
        **(context if settings.context else {}),
    }


def _profile_options(prefix: Literal["trt", "nv"], profile: Profile) -> dict[str, str]:
    if not profile:
        return {}
    return {
        f"{prefix}_profile_{kind}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, shapes[number]))}" for name, shapes in profile.items()
        )
        for number, kind in enumerate(("min", "opt", "max"))
    }


def _is_rtx(detail: str) -> bool:
    match = _CAPABILITY.search(detail)
    number = 0 if match is None else int(match[1]) * 10 + int(match[2])
    return number in _RTX_CAPABILITIES or number >= _RTX_SINCE


def _no_plugin(got: str, todo: str) -> BuildError:
    return BuildError(
        "runtime.no-provider",
        "ONNX Runtime's provider for TensorRT-RTX is not available",
        at="providers",
        want=f"{NV_TENSORRT_RTX}, of the package {PLUGIN}",
        got=got,
        todo=todo,
    )
