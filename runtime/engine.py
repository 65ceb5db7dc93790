"""Engines that were built: is this file for this GPU and this TensorRT, and if so, load it and run it.

What can be told without a GPU is told first: the file's header, the manifest's facts, the GPU's compute capability.
Only then is anything handed to TensorRT-RTX, which would answer with a log line, or end the process.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from depthwire.errors import BuildError, UsageError
from depthwire.runtime._build_errors import PIP_LINE
from depthwire.runtime.deploy.cuda import find_gpu

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from depthwire.artifact import Artifact, EngineInfo
    from depthwire.runtime._engine_session import EngineSession
    from depthwire.runtime.deploy.cuda import Gpu

__all__ = ["PlanHeader", "check_engine", "load_engine", "read_header", "require_valid", "run_engine"]

_HEADER_BYTES = 28
_TAGS: dict[bytes, Literal["tensorrt", "tensorrt-rtx"]] = {b"ftrt": "tensorrt", b"vtrt": "tensorrt-rtx"}
# The numbers that must be the same in engine and runtime; the last one counts the builds of one release.
_RELEASE_NUMBERS = 3


@dataclass(frozen=True)
class PlanHeader:
    """What the first bytes of an engine say.

    Attributes:
        builder: ``tensorrt`` or ``tensorrt-rtx``.
        version: Version of the builder, of four numbers.
    """

    builder: Literal["tensorrt", "tensorrt-rtx"]
    version: str


def read_header(path: Path) -> PlanHeader:
    """Read builder and version from an engine's first 28 bytes.

    Source of the layout: ``printPlanVersion`` in NVIDIA's ``samples/common/sampleEngines.cpp`` (what ``trtexec
    --getPlanVersionOnly`` prints): a tag, the layout's number 0, and the version as bytes 24 to 27. TensorRT-RTX
    writes a tag of its own and the same layout, as engines built here show.

    Raises:
        BuildError: ``engine.missing``, or ``engine.damaged`` where the file is no engine.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError as error:
        raise _missing(str(path), str(error)) from error
    builder = _TAGS.get(head[:4])
    if len(head) < _HEADER_BYTES or builder is None or any(head[4:8]):
        raise _damaged(path, f"{len(head)} bytes that begin with {head[:8].hex(' ') or 'nothing'}")
    return PlanHeader(builder, ".".join(str(number) for number in head[24:28]))


def check_engine(artifact: Artifact, target: str, *, gpu: Gpu, version: str) -> EngineInfo:
    """Check that an engine is whole and for this GPU and this TensorRT; nothing is loaded.

    Args:
        artifact: The artefact.
        target: Whose engine; a name in the manifest's ``engines``.
        gpu: The GPU that is to run it.
        version: Version of the installed TensorRT-RTX or TensorRT.

    Returns:
        The engine's entry in the manifest.

    Raises:
        UsageError: ``engine.none``: the artefact has no engine for the target.
        BuildError: ``engine.missing``, ``engine.damaged``, ``engine.wrong-version`` or ``engine.wrong-gpu``.
    """
    info = artifact.manifest.engines.get(target)
    if info is None:
        raise UsageError(
            "engine.none",
            f"The artefact has no engine for target {target}",
            at=str(artifact.root),
            want=f"an entry {target} among the manifest's engines",
            got=", ".join(artifact.manifest.engines) or "no engine",
            todo=f"Build it: depthwire build {artifact.root} --target {target}",
        )
    path = artifact.path(info.file)
    header = read_header(path)
    size = path.stat().st_size
    if size != info.bytes:
        raise _damaged(path, f"{size} bytes, of {info.bytes}")
    if header.builder != info.builder or header.version != info.version:
        raise _damaged(
            path, f"an engine of {header.builder} {header.version}; the manifest says {info.builder} {info.version}"
        )
    if _release(version) != _release(info.version):
        raise BuildError(
            "engine.wrong-version",
            f"The engine was built by another version of {info.builder}",
            at=str(path),
            want=f"{info.builder} {info.version}",
            got=f"{version} installed",
            todo=f"Build it again with the installed one: depthwire build {artifact.root} --target {target}",
        )
    if gpu.capability not in info.compute_capabilities:
        raise BuildError(
            "engine.wrong-gpu",
            "The engine was not built for this GPU",
            at=str(path),
            want=f"a GPU of {', '.join(info.compute_capabilities)}",
            got=f"{gpu.name}, {gpu.capability}",
            todo=f"Build it for this one too: depthwire build {artifact.root} --target {target} --cc {gpu.capability}",
        )
    return info


def load_engine(
    artifact: Artifact, target: str = "rtx", *, cache: Path | None = None, cuda_graphs: bool = False
) -> EngineSession:
    """Check and load a TensorRT-RTX engine; not run without a GPU, and so not run where Depthwire is developed.

    Loading compiles the engine's kernels for the GPU (seconds). With a cache file that happens once for each GPU,
    driver and version; a cache of another is rejected by TensorRT-RTX, which ``EngineSession.cache_state`` says, and
    written anew. An engine without weights gets them back from the artefact's graph.

    Args:
        artifact: The artefact.
        target: Whose engine.
        cache: File that keeps what was compiled; read if it is there, written by ``EngineSession.close``.
        cuda_graphs: Let TensorRT-RTX capture and replay the whole engine as a CUDA graph.

    Returns:
        The loaded engine, a context manager.

    Raises:
        UsageError: ``engine.none``.
        BuildError: ``engine.no-gpu``, ``build.backend-missing``, ``engine.refused``, ``engine.refit-failed`` or as
            ``check_engine``.
    """
    from depthwire.runtime._engine_session import EngineSession

    trt = _tensorrt_rtx()
    gpu, reason = find_gpu()
    if gpu is None:
        raise BuildError(
            "engine.no-gpu",
            "An engine can be loaded only where an NVIDIA GPU and its driver are",
            at=str(artifact.root),
            want="an RTX GPU",
            got=reason,
            todo="Copy the artefact to the machine with the GPU. Without one, 'depthwire verify' runs model.onnx.",
        )
    info = check_engine(artifact, target, gpu=gpu, version=trt.__version__)
    return EngineSession.open(trt, artifact, info, cache=cache, cuda_graphs=cuda_graphs)


def run_engine(session: EngineSession, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Run a loaded engine once and return every output by name.

    Args:
        session: From ``load_engine``.
        inputs: Every input of the engine by name, with its dtype; a size that is open within its profile.

    Raises:
        UsageError: ``engine.bad-input``.
        BuildError: ``engine.run``.
    """
    return session.run(inputs)


def require_valid(trt: Any, path: Path, validity: Any, diagnostics: int, log: str) -> None:
    """Turn what ``Runtime.get_engine_validity`` says of an engine into an error.

    Args:
        trt: The module ``tensorrt_rtx``.
        path: The engine, for the message.
        validity: Of the enumeration ``EngineValidity``.
        diagnostics: Bits of the enumeration ``EngineInvalidityDiagnostics``.
        log: What TensorRT-RTX logged meanwhile.

    Raises:
        BuildError: ``engine.damaged``, ``engine.wrong-version``, ``engine.wrong-gpu`` or ``engine.refused``.
    """
    if validity != trt.EngineValidity.INVALID:
        return
    names = [name for name, bit in trt.EngineInvalidityDiagnostics.__members__.items() if diagnostics & int(bit)]
    codes = {
        "MALFORMED_ENGINE": "engine.damaged",
        "VERSION_MISMATCH": "engine.wrong-version",
        "UNSUPPORTED_CC": "engine.wrong-gpu",
    }
    code = next((codes[name] for name in codes if name in names), "engine.refused")
    raise BuildError(
        code,
        "TensorRT-RTX says that it cannot run this engine",
        at=str(path),
        want="an engine that is valid on this GPU, driver and version",
        got=f"{', '.join(names) or 'no diagnostics'}: {log or 'nothing logged'}",
        todo="Build the engine again for this GPU (--cc) and the installed TensorRT-RTX; update an old driver.",
    )


def _release(version: str) -> list[str]:
    return version.split(".")[:_RELEASE_NUMBERS]


def _tensorrt_rtx() -> Any:
    try:
        return importlib.import_module("tensorrt_rtx")
    except ImportError as error:
        raise BuildError(
            "build.backend-missing",
            "TensorRT-RTX is not installed, or cannot be loaded",
            at="target rtx",
            want="an importable tensorrt_rtx",
            got=str(error),
            todo=f"Install it: {PIP_LINE}",
        ) from error


def _missing(at: str, got: str) -> BuildError:
    return BuildError(
        "engine.missing",
        "The engine's file cannot be read",
        at=at,
        want="an engine",
        got=got,
        todo="Copy the artefact again, whole, or build the engine again.",
    )


def _damaged(path: Path, got: str) -> BuildError:
    return BuildError(
        "engine.damaged",
        "The engine's file is damaged",
        at=str(path),
        want="an engine as the manifest describes it",
        got=got,
        todo="Copy the artefact again, whole, or build the engine again.",
    )
