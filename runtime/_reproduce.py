"""Write what Polygraphy's own command line needs to repeat a comparison without Depthwire."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from depthwire.errors import ExportError
from depthwire.runtime._statistics import extent
from depthwire.runtime.tolerances import Kind, tolerance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from depthwire.artifact import Artifact

    Arrays = Mapping[str, NDArray[Any]]

INPUTS = "verify/inputs.json"
OUTPUTS = "verify/outputs.json"


def write_reproduction(
    artifact: Artifact, *, inputs: Arrays, expected: Arrays, kinds: Mapping[str, Kind], label: str
) -> str:
    """Write one window's inputs and reference outputs in Polygraphy's JSON; return the command that compares them.

    Polygraphy's ``--check-error-stat max`` passes an output whose ``max|d|`` is at most ``--atol`` or whose largest
    element-wise relative error is at most ``--rtol``. With ``--rtol 0`` the second admits only equality, so the
    budget relative to ``max|reference|`` becomes an absolute number here.

    Args:
        artifact: The artefact; its manifest comes to list both files.
        inputs: The window.
        expected: The reference's outputs.
        kinds: Row of the table of tolerances for each output.
        label: The reference's name in Polygraphy's output.

    Raises:
        ExportError: The files cannot be written (``verify.not-written``).
    """
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    results = RunResults()
    results.add([dict(expected)], runtime=0.0, runner_name=label)
    members = {INPUTS: [dict(inputs)], OUTPUTS: results}
    temporary = {name: artifact.path(f"{name}.{os.getpid()}.tmp") for name in members}
    try:
        artifact.path(INPUTS).parent.mkdir(exist_ok=True)
        for name, content in members.items():
            save_json(content, str(temporary[name]))
        # Unlisted while they are replaced: an interruption then leaves files that nobody vouches for, instead of an
        # artefact whose hashes are wrong.
        for name in members:
            artifact.manifest.files.pop(name, None)
        artifact.write_manifest()
        for name in members:
            temporary[name].replace(artifact.path(name))
            artifact.add_file(name)
        artifact.write_manifest()
    except OSError as error:
        raise ExportError(
            "verify.not-written",
            "The files to repeat the comparison with cannot be written",
            at=str(artifact.root),
            want=f"{INPUTS} and {OUTPUTS}",
            got=f"{type(error).__name__}: {error}",
            todo="Make the artefact writable and free some disk space (outputs take 4/3 of their size in memory).",
        ) from error
    finally:
        for path in temporary.values():
            with suppress(OSError):  # the error that matters is already on its way
                path.unlink(missing_ok=True)
    return _command(artifact, {name: _allowed(array, kinds.get(name, "hidden")) for name, array in expected.items()})


def _allowed(array: NDArray[Any], kind: Kind) -> float:
    return tolerance(array.dtype.name, kind).allowed(extent(array).largest)


def _command(artifact: Artifact, allowed: Mapping[str, float]) -> str:
    arguments = ["polygraphy", "run", str(artifact.model), "--onnxrt", "--validate"]
    arguments += ["--load-inputs", str(artifact.path(INPUTS)), "--load-outputs", str(artifact.path(OUTPUTS))]
    arguments += ["--check-error-stat", "max", "--atol", *(f"{name}:{value!r}" for name, value in allowed.items())]
    return shlex.join([*arguments, "--rtol", "0"])
