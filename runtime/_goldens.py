"""The example inputs and expected outputs that travel in an artefact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.artifact import GOLDENS
from depthwire.errors import ExportError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from depthwire.artifact import Artifact


class Goldens:
    """``goldens.safetensors``: ``input.<name>`` and ``output.<name>``, each with a leading axis over windows.

    Windows are read one at a time, so that the outputs of all of them are never held at once.
    """

    def __init__(self, artifact: Artifact) -> None:
        """Open the file and check its names and number of windows against the manifest.

        Raises:
            ExportError: The artefact has no goldens or they lack a tensor (``verify.goldens``).
        """
        from safetensors import SafetensorError, safe_open

        path = artifact.path(GOLDENS)
        try:
            file: Any = safe_open(str(path), framework="np")
        except (OSError, SafetensorError) as error:
            raise _bad_goldens(str(path), f"{type(error).__name__}: {error}") from error
        self._file = file
        self._names = {
            "input": [info.name for info in artifact.manifest.inputs],
            "output": [info.name for info in artifact.manifest.outputs],
        }
        wanted = {f"{side}.{name}" for side, names in self._names.items() for name in names}
        found = set(self._file.keys())
        if wanted != found:
            differing = ", ".join(sorted(wanted ^ found))
            raise _bad_goldens(str(path), f"names that only one side has: {differing}")
        shapes = [list(self._file.get_slice(key).get_shape()) for key in wanted]
        counts = {shape[0] if shape else 0 for shape in shapes}
        if len(counts) != 1 or 0 in counts:
            raise _bad_goldens(str(path), f"numbers of windows {sorted(counts)}")
        self.count: int = counts.pop()

    def inputs(self, window: int) -> dict[str, NDArray[Any]]:
        """Return the inputs of one window by name."""
        return self._read("input", window)

    def outputs(self, window: int) -> dict[str, NDArray[Any]]:
        """Return the expected outputs of one window by name."""
        return self._read("output", window)

    def _read(self, side: str, window: int) -> dict[str, NDArray[Any]]:
        return {name: self._file.get_slice(f"{side}.{name}")[window] for name in self._names[side]}


def _bad_goldens(path: str, got: str) -> ExportError:
    return ExportError(
        "verify.goldens",
        "The artefact's goldens cannot be used",
        at=path,
        want="input.<name> and output.<name> for every input and output of the manifest, one or more windows each",
        got=got,
        todo="Convert the model again, or give the source model to verify against.",
    )
