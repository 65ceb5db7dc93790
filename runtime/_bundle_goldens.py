"""The goldens of a bundle: arrays that numpy alone reads, and what they were computed with."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthwire.artifact import MODEL
from depthwire.errors import ParityError, UsageError
from depthwire.runtime._goldens import Goldens
from depthwire.runtime._judge import output_kinds
from depthwire.runtime.deploy.judge import judge_window
from depthwire.runtime.deploy.manifest import Model, Output
from depthwire.runtime.deploy.steps import describe
from depthwire.runtime.onnxruntime import CPU
from depthwire.runtime.tolerances import EXACT_DTYPES, FLOAT_DTYPES, QUANTIZED, tolerance
from depthwire.runtime.twin import multiply_out, twin_of, widen

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnxruntime as ort
    from numpy.typing import NDArray

    from depthwire.artifact import Artifact, TensorInfo

    Arrays = dict[str, NDArray[Any]]

TORCH = "torch, at the dtypes of the graph"
ONNX_RUNTIME = "ONNX Runtime on the CPU"
TWIN = "ONNX Runtime on the CPU, the graph's fp32 twin: rounding may flip near-ties"
_ERRORS_ONLY = 3
_NUMPY = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Runner:
    """ONNX Runtime over a graph, without any kernel of ours: function bodies are run as bodies."""

    def __init__(self, model: Path) -> None:
        """Open the graph.

        Raises:
            ParityError: ONNX Runtime cannot run it here (``bundle.self-check``).
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        # Weights are read once: packing them for speed would cost their size again.
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session: ort.InferenceSession = onnxruntime.InferenceSession(str(model), options, providers=[CPU])
        except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            raise _self_check(model.name, f"ONNX Runtime cannot run it: {str(error).splitlines()[0]}") from error

    def __call__(self, names: Sequence[str], feed: Arrays) -> Arrays:
        """Return some outputs of one run."""
        return dict(zip(names, self._session.run(list(names), feed), strict=True))


@contextlib.contextmanager
def rewritten_runner(model: Path, *, twin: bool) -> Iterator[Runner]:
    """Open a graph of the bundle, or its fp32 twin (see ``runtime.twin``), which is gone afterwards."""
    if not twin:
        yield Runner(model)
        return
    import onnx_ir

    loaded = onnx_ir.load(model)
    widen(loaded)
    multiply_out(loaded)
    with tempfile.TemporaryDirectory(dir=model.parent.parent, prefix=f".{model.parent.name}.twin-") as folder:
        onnx_ir.save(loaded, Path(folder) / MODEL, external_data=f"{MODEL}.data")
        yield Runner(Path(folder) / MODEL)


def original_outputs(artifact: Artifact, names: Sequence[str], feeds: Sequence[Arrays]) -> list[Arrays]:
    """Return what the artefact's own graph (its twin, where it has a precision) computes in ONNX Runtime."""
    with twin_of(artifact) as twin:
        runner = Runner(twin.model)
        return [runner(names, feed) for feed in feeds]


def windows(artifact: Artifact, *, own_graph: bool) -> Iterator[tuple[Arrays, Arrays | None]]:
    """Yield inputs and expected outputs of every golden, a window at a time.

    Args:
        artifact: The artefact.
        own_graph: Whether the outputs are those of the graph in question; ``None`` stands in their place otherwise.
    """
    goldens = Goldens(artifact)
    for window in range(goldens.count):
        yield goldens.inputs(window), goldens.outputs(window) if own_graph else None


class Writer:
    """Writes ``<side>.<name>.npy`` with a leading axis over windows, holding one window at a time."""

    def __init__(self, folder: Path, count: int) -> None:
        """Create the folder for ``count`` windows."""
        folder.mkdir(parents=True)
        self._folder, self._count = folder, count
        self._files: dict[str, Any] = {}

    def add(self, side: str, window: int, arrays: Arrays) -> None:
        """Write one window of some arrays."""
        import numpy as np

        for name, array in arrays.items():
            key = f"{side}.{name}"
            if key not in self._files:
                shape = (self._count, *array.shape)
                self._files[key] = np.lib.format.open_memmap(
                    self._folder / f"{key}.npy", mode="w+", dtype=array.dtype, shape=shape
                )
            self._files[key][window] = array

    def close(self) -> None:
        """Flush every file."""
        for file in self._files.values():
            file.flush()
        self._files.clear()


def write_goldens(artifact: Artifact, model: Model, root: Path) -> Model:
    """Write the goldens, and prove on the way that the graph, as it travels, computes what the artefact's does.

    Without a precision the goldens themselves are the proof. With one the fp32 twins of both graphs are compared, by
    the budgets of fp32: ONNX Runtime has no half-precision arithmetic on the CPU.
    """
    own, twin = model.file == MODEL, artifact.manifest.precision is not None
    names = [output.name for output in model.outputs]
    extra = list(dict.fromkeys(name for unit in model.routing for name in (unit.index, unit.taken)))
    every = list(windows(artifact, own_graph=own))
    feeds = [feed for feed, _ in every]
    known = [expected for _, expected in every]
    wanted = [expected for expected in known if expected is not None]
    if twin or not own:
        wanted = original_outputs(artifact.with_graph(model.file), names, feeds)
    judged_by = dataclasses.replace(model, outputs=outputs_of(artifact, rounded=False)) if twin else model
    writer = Writer(root / model.goldens, len(every))
    with rewritten_runner(root / model.file, twin=twin) as runner:
        for window, (feed, reference) in enumerate(zip(feeds, wanted, strict=True)):
            ran = runner([*names, *extra], feed)
            selections = {name: ran[name] for name in extra}
            verdict = judge_window(judged_by, artifact.manifest.source.task, {**reference, **selections}, ran, feed)
            if not verdict["passed"]:
                raise _self_check(model.file, f"window {window}: {describe(verdict)}")
            writer.add("input", window, feed)
            writer.add("output", window, {**(known[window] or reference), **selections})
    writer.close()
    return dataclasses.replace(model, windows=len(every))


def _self_check(model: str, got: str) -> ParityError:
    return ParityError(
        "bundle.self-check",
        "The graph, as it would travel, does not compute the goldens",
        at=model,
        want="outputs within the tolerances, in ONNX Runtime on this machine",
        got=got,
        todo="Verify the artefact ('depthwire verify'); if that passes, report this.",
    )


def _require_numpy(info: TensorInfo) -> None:
    # Not np.sctypeDict, which ml_dtypes adds bfloat16 to.
    if info.dtype in {*EXACT_DTYPES, *FLOAT_DTYPES} - {"bfloat16"}:
        return
    raise UsageError(
        "bundle.interface-dtype",
        "An output has a dtype that numpy does not know, and the device has nothing else to compare with",
        at=f"output {info.name}",
        want="float32, float16 or an integer",
        got=info.dtype,
        todo="Convert with --precision, which leaves inputs and outputs as they are, in place of --dtype.",
    )


def outputs_of(artifact: Artifact, *, rounded: bool = True) -> tuple[Output, ...]:
    """Return the outputs of an artefact with their budgets; not ``rounded`` for those of its fp32 twin.

    Raises:
        UsageError: ``bundle.interface-dtype``.
    """
    kinds, causal = output_kinds(artifact.manifest), artifact.manifest.source.task == "causal-lm"
    scored = causal and any(info.name == "input_ids" for info in artifact.manifest.inputs)
    precision, outputs = artifact.manifest.precision, []
    # Outputs stay float32; what was rounded inside the graph has the budgets of its dtype.
    rest = "float32"
    if precision is not None and rounded:
        rest = QUANTIZED if precision.asked == "int8" else _NUMPY[precision.rest]
    for info in artifact.manifest.outputs:
        _require_numpy(info)
        kind = kinds[info.name]
        computed = rest if info.dtype == "float32" else info.dtype
        budget = tolerance(computed, kind)
        nll = tolerance(computed, "nll").atol if scored and kind == "logits" else None
        shape = tuple(info.shape)
        outputs.append(
            Output(info.name, shape, info.dtype, kind, computed, budget.rtol, budget.atol, budget.reason, nll)
        )
    return tuple(outputs)
