"""Where two graphs select different tokens: a flip is reported as a flip, not hidden in a tolerance.

Two tokens whose scores are closer together than rounding may change places in another runtime. Every later layer then
computes something else, and no tolerance on the outputs would be honest. What is reported is the token, the unit and
how far its score lay from the others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from depthwire.runtime._fx import is_selection, module_of
from depthwire.runtime.onnxruntime import run_session, session_from_artifact, value_names
from depthwire.runtime.torch_exported import run_nodes

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch.fx import Node

    from depthwire.artifact import Artifact
    from depthwire.program import Program

    Values = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class RoutingFlip:
    """A token that one of two graphs computes and the other does not.

    Attributes:
        module: The routed unit.
        unit: Its number in order of execution.
        sequence: Row of the batch.
        token: Position in the sequence.
        score: The token's score in the reference.
        nearest: The nearest score on the other side: of a token that the reference treats the other way.
    """

    module: str
    unit: int
    sequence: int
    token: int
    score: float
    nearest: float

    def as_dict(self) -> dict[str, Any]:
        """Return the flip JSON-ready."""
        return asdict(self)


def routing_flips(
    artifact: Artifact, program: Program, inputs: Values, *, kernels: bool | None = None
) -> list[RoutingFlip]:
    """Compare the selections of a program in torch with those of the file in ONNX Runtime.

    Args:
        artifact: The artefact.
        program: The program that was exported; its values have the file's names.
        inputs: One window.
        kernels: As in ``session_from_artifact``.

    Returns:
        Every flip, in order of execution; those of the first unit are causes, later ones may be consequences.
    """
    selections = [node for node in program.exported.graph.nodes if is_selection(node)]
    known = value_names(artifact)
    units = [(node, _parts(node)) for node in selections]
    units = [(node, parts) for node, parts in units if len(parts) == 2 and set(parts) <= known]
    if not units:
        return []
    names = [name for _, parts in units for name in parts]
    scores = [str(node.args[0]) for node, _ in units]
    wanted = run_nodes(program, inputs, [*names, *scores])
    session = session_from_artifact(artifact, extra_outputs=names, kernels=kernels)
    found = run_session(session, inputs)
    flips = []
    for number, ((node, (index, taken)), score) in enumerate(zip(units, scores, strict=True)):
        flips += compare_selections(
            module_of(node) or node.name,
            number,
            wanted[score],
            selected_bits(wanted[index], wanted[taken], wanted[score].shape),
            selected_bits(found[index], found[taken], wanted[score].shape),
        )
    return flips


def compare_selections(
    module: str, unit: int, score: NDArray[Any], left: NDArray[np.bool_], right: NDArray[np.bool_]
) -> list[RoutingFlip]:
    """Return the tokens that two selections of one unit treat differently.

    Args:
        module: Path of the unit.
        unit: Its number.
        score: Scores of the reference, ``[B, T]``.
        left: What the reference selects, ``[B, T]``.
        right: What the other selects.
    """
    import numpy as np

    flips = []
    for sequence, token in zip(*np.nonzero(left != right), strict=True):
        others = score[sequence][left[sequence] != left[sequence, token]]
        own = float(score[sequence, token])
        nearest = float(others[np.abs(others - own).argmin()]) if others.size else float("nan")
        flips.append(RoutingFlip(module, unit, int(sequence), int(token), own, nearest))
    return flips


def selected_bits(index: NDArray[Any], taken: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return which of the tokens are selected, ``[B, T]``."""
    import numpy as np

    bits = np.zeros(shape, dtype=bool)
    np.put_along_axis(bits, index, taken, axis=1)
    return bits


def _parts(node: Node) -> list[str]:
    """Return the names of the index and of the taken bits."""
    users = {user.args[1]: user.name for user in node.users if len(user.args) > 1}
    return [users[position] for position in (0, 1) if position in users]
