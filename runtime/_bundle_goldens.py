"""The goldens of a bundle: arrays that numpy alone reads, and what they were computed with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.errors import InternalError
from depthwire.runtime._goldens import Goldens
from depthwire.runtime.onnxruntime import CPU

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import onnxruntime as ort
    from numpy.typing import NDArray

    from depthwire.artifact import Artifact

    Arrays = dict[str, NDArray[Any]]

TORCH = "torch, at the dtypes of the graph"
ONNX_RUNTIME = "ONNX Runtime on the CPU"
_ERRORS_ONLY = 3


class Runner:
    """ONNX Runtime over a graph in the form it travels in, without any kernel of ours: bodies are run as bodies."""

    def __init__(self, model: Path) -> None:
        """Open it; ``problem`` says why it cannot be run, such as a dtype that the CPU provider lacks."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        # Pairs of QuantizeLinear and DequantizeLinear are computed as they stand, not fused into integer kernels.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self.problem = ""
        self._session: ort.InferenceSession | None = None
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=[CPU])
        except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            self.problem = str(error).strip().splitlines()[0]

    def __call__(self, names: Sequence[str], feed: Arrays) -> Arrays:
        """Return some outputs of one run."""
        if self._session is None:
            raise InternalError("internal.bundle-runner", "A graph that cannot be run was run", got=self.problem)
        return dict(zip(names, self._session.run(list(names), feed), strict=True))


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
