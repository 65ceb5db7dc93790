"""ONNX Runtime sessions over an artefact, with any named value of the graph as an output."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthwire.artifact import KERNELS
from depthwire.errors import BuildError, UsageError
from depthwire.runtime import native, ort_tensorrt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnx
    import onnxruntime as ort
    from numpy.typing import NDArray

    from depthwire.artifact import Artifact

CPU = ort_tensorrt.CPU
CUDA = ort_tensorrt.CUDA

COPY_LIMIT = 2 << 30
"""Bytes of weights beyond which the weights stay memory-mapped unless the caller says otherwise."""

_ERRORS_ONLY = 3
_NO_PREPACKING = "session.disable_prepacking"
_WIDE_INPUTS = ("session.qdq_matmulnbits_accuracy_level", "1")
"""Fused 4-bit products would round their inputs to 8 bits, which nobody asked for: level 1 keeps them float32."""
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class KernelOptions:
    """What gives a session the kernels of depth-attention operators.

    Attributes:
        library: To register, after the entries are set.
        entries: Session configuration entries.
    """

    library: str
    entries: dict[str, str]

    def apply(self, options: ort.SessionOptions) -> None:
        """Add them to the options of a session.

        Raises:
            BuildError: ONNX Runtime cannot load the library, or the library cannot read the cubins
                (``runtime.kernels-refused``).
        """
        for name, value in self.entries.items():
            options.add_session_config_entry(name, value)
        try:
            options.register_custom_ops_library(self.library)
        except Exception as error:
            raise BuildError(
                "runtime.kernels-refused",
                "The library of kernels cannot be registered",
                at=self.library,
                want="kernels for the depth-attention operators",
                got=str(error),
                todo="Write the cubins again with 'depthwire kernels' if they are named; else build the library again "
                f"with '{native.BUILD_COMMAND}'.",
            ) from error


def session_from_artifact(
    artifact: Artifact,
    *,
    providers: Sequence[str | tuple[str, Mapping[str, str]]] = (CPU,),
    threads: int | None = None,
    map_weights: bool | None = None,
    extra_outputs: Sequence[str] = (),
    kernels: bool | None = None,
    keep_memory: bool = True,
) -> ort.InferenceSession:
    """Open ``model.onnx`` of an artefact.

    Args:
        artifact: The artefact; its weights file is used where it lies, never copied.
        providers: Execution providers, by preference, each with options or without
            (``ort_tensorrt.choose_providers``). All of them must load: there is no falling back.
        threads: Threads within an operator; ``None`` for every CPU this process may use.
        map_weights: Leave the weights in their memory-mapped file instead of copying them into the layout that the
            kernels prefer: no prepacking, and no folding of transposed weights into constants. On a model of 540 MB
            it saves 700 MB and costs a tenth of the speed. ``None`` does so beyond ``COPY_LIMIT``.
        extra_outputs: Values inside the graph to return as further outputs, in this order after the graph's own.
        kernels: Run depth-attention operators by the library of kernels (``docs/native.md``) instead of the function
            bodies in the file. ``None`` does so where there are any: for the CPU the library, for the CUDA provider the
            library and the cubins that ``depthwire kernels`` wrote.
        keep_memory: Keep the memory of intermediate results for the next call. Several sessions that run in turn take
            it once each; without it they give it back.

    Raises:
        UsageError: An extra output is not a value of the graph (``runtime.no-such-value``).
        BuildError: A provider is not there (``runtime.no-provider``), ONNX Runtime refuses the model
            (``runtime.session``), its kernels (``runtime.kernels-refused``), or as ``kernel_options``.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads or _usable_cpus()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = keep_memory
    wanted = [(each, {}) if isinstance(each, str) else (each[0], dict(each[1])) for each in providers]
    names = [name for name, _ in wanted]
    chosen = kernel_options(artifact, names, kernels=kernels)
    if chosen is not None:
        chosen.apply(options)
    precision = artifact.manifest.precision
    if precision is not None and precision.asked == "int4-weights":
        options.add_session_config_entry(*_WIDE_INPUTS)
    mapped = artifact.manifest.weight_bytes > COPY_LIMIT if map_weights is None else map_weights
    if mapped:
        options.add_session_config_entry(_NO_PREPACKING, "1")
    model: str | bytes = str(artifact.model)
    if extra_outputs:
        # A model that comes as bytes has no folder of its own: without this its weights are looked for in the
        # current directory.
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(artifact.root.resolve()))
        model = _with_outputs(artifact, extra_outputs)
    remaining = ort_tensorrt.attach(options, wanted)
    missing = [name for name, _ in remaining if name not in onnxruntime.get_available_providers()]
    if missing:
        raise no_provider(missing, onnxruntime.get_available_providers())
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=remaining or None, disabled_optimizers=["ConstantFolding"] if mapped else None
        )
    except Exception as error:
        raise refused_session(artifact.model, names, error) from error
    unloaded = [name for name in names if name not in session.get_providers()]
    if unloaded:
        raise no_provider(unloaded, session.get_providers())
    return session


def refused_session(model: Path, providers: Sequence[str], error: Exception) -> BuildError:
    """Return the error for a session that ONNX Runtime does not make."""
    return BuildError(
        "runtime.session",
        "ONNX Runtime refuses the model",
        at=str(model),
        want=f"a session on {', '.join(providers)}",
        got=f"{type(error).__name__}: {error}",
        todo="ONNX Runtime's CPU kernels lack bfloat16: convert with --dtype fp32 to verify. Otherwise report "
        "this with the file.",
    )


def kernel_options(
    artifact: Artifact, providers: Sequence[str], *, kernels: bool | None = None
) -> KernelOptions | None:
    """Return what gives a session over an artefact its kernels, or ``None`` where function bodies run.

    A kernel for the CPU wins over a function body on every provider, and each read would then copy its sources to the
    host. So a session on the CUDA provider gets kernels only where they are the CUDA provider's own. Cubins that do not
    fit its GPU are refused by the library when the operator runs. No GPU is needed to ask.

    Args:
        artifact: The artefact.
        providers: Execution providers of the session.
        kernels: ``True`` to insist on them, ``False`` for function bodies, ``None`` for kernels where there are any.

    Raises:
        BuildError: Kernels are insisted on and not there (``runtime.no-kernels``), or the library is not of this
            version (``runtime.stale-kernels``).
    """
    ops = native.ops_entry(artifact.manifest.custom_ops)
    if kernels is False or (kernels is None and (not ops or not {CPU, CUDA}.issuperset(providers))):
        return None
    library = native.custom_ops_library() if kernels else native.library_path()
    if library is None or not ops:
        return None
    if CUDA not in providers:
        return KernelOptions(str(library), {native.OPS_ENTRY: ops})
    lack = _lack_on_cuda(artifact)
    if lack is None:
        folder = str(artifact.path(KERNELS).resolve())
        return KernelOptions(str(library), {native.OPS_ENTRY: ops, native.KERNELS_ENTRY: folder})
    if kernels:
        raise lack
    return None


def operators_run_by(artifact: Artifact, *, kernels: bool | None = None) -> str | None:
    """Return what runs the depth-attention and routing operators of an artefact on the CPU.

    Such as ``avx512 kernels`` or ``function bodies``, or ``None`` where the graph has no such operator.
    """
    if not native.ops_entry(artifact.manifest.custom_ops):
        return None
    return (
        "function bodies"
        if kernel_options(artifact, (CPU,), kernels=kernels) is None
        else f"{native.instruction_set()} kernels"
    )


def run_session(session: ort.InferenceSession, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Run once and return every output by name.

    Raises:
        BuildError: ONNX Runtime fails (``runtime.run``).
    """
    names = [output.name for output in session.get_outputs()]
    try:
        arrays = session.run(names, dict(inputs))
    except Exception as error:
        raise BuildError(
            "runtime.run",
            "ONNX Runtime failed while it ran the model",
            at=", ".join(names[:4]) + (" …" if len(names) > 4 else ""),
            want="an inference with the given inputs",
            got=f"{type(error).__name__}: {error}",
            todo="Compare the inputs with 'depthwire inspect'; if they fit, report this with the file.",
        ) from error
    return dict(zip(names, arrays, strict=True))


def value_names(artifact: Artifact) -> frozenset[str]:
    """Return the names of all values that nodes of the main graph compute; those inside functions have none."""
    return _computed(_load(artifact))


def _lack_on_cuda(artifact: Artifact) -> BuildError | None:
    """Return what keeps kernels from a session on the CUDA provider, as the error where they were insisted on."""
    if artifact.manifest.kernels is None:
        at, got = str(artifact.root), f"no folder {KERNELS}"
        todo = f"Compile them: depthwire kernels {artifact.root} --cc SM87 (your GPU's compute capability)."
    elif not native.has_cuda_kernels():
        at, got = str(native.library_path()), "a library that was built without cuda.h"
        todo = f"Build it again with '{native.BUILD_COMMAND}' where CUDA's headers are."
    else:
        return None
    return BuildError(
        "runtime.no-kernels",
        "There are no kernels for the CUDA provider",
        at=at,
        want="cubins in the artefact, and a library that launches them",
        got=got,
        todo=f"{todo} Or leave the kernels away: the function bodies in the file compute the same.",
    )


def _load(artifact: Artifact) -> onnx.ModelProto:
    import onnx

    return onnx.load(str(artifact.model), load_external_data=False)


def _computed(model: onnx.ModelProto) -> frozenset[str]:
    return frozenset(name for node in model.graph.node for name in node.output if name)


def _with_outputs(artifact: Artifact, names: Sequence[str]) -> bytes:
    """Serialise a copy of the graph that returns the named values too; the weights stay in their file."""
    model = _load(artifact)
    absent = [name for name in names if name not in _computed(model)]
    if absent:
        raise UsageError(
            "runtime.no-such-value",
            "The graph has no such value",
            at=str(artifact.model),
            want="names of values that nodes of the main graph compute",
            got=", ".join(absent[:8]),
            todo="See 'depthwire inspect' for the names.",
        )
    known = {info.name: info for info in model.graph.value_info}
    present = {output.name for output in model.graph.output}
    for name in dict.fromkeys(names):
        if name in present:
            continue
        # ONNX Runtime infers the type of an output that carries none.
        added = model.graph.output.add()
        added.CopyFrom(known[name]) if name in known else setattr(added, "name", name)
    serialised: bytes = model.SerializeToString()
    return serialised


def _usable_cpus() -> int:
    # Left to itself ONNX Runtime pins a thread to every CPU of the machine, also those a container may not use.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def no_provider(missing: Sequence[str], available: Sequence[str]) -> BuildError:
    """Return the error for providers that ONNX Runtime does not have, or could not load."""
    return BuildError(
        "runtime.no-provider",
        "An execution provider of ONNX Runtime is not available",
        at="providers",
        want=", ".join(missing),
        got=", ".join(available),
        todo="Run 'depthwire doctor'; install the provider's libraries, or ask for the CPU provider.",
    )
