"""The values at which an original, a rewritten and an ONNX graph are compared layer by layer.

Passes keep the name of a value whose meaning they keep: a fused norm has the name of the norm's last node, and the
branch that a sublayer writes keeps its own. So the original's names serve for all three graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthwire.artifact import Checkpoint
from depthwire.passes._base import module_path
from depthwire.passes.analysis.norm import find_norms

if TYPE_CHECKING:
    from depthwire.passes.analysis.residual_stream import ResidualStream
    from depthwire.program import Program


def checkpoints(canonical: Program, stream: ResidualStream | None) -> list[Checkpoint]:
    """Return the checkpoints of a program: for every sublayer its normed inputs, then its written branches.

    Args:
        canonical: The program after the passes that change no structure.
        stream: Its residual stream; ``None`` if it has none.

    Returns:
        In layer order. Without a residual stream (a program that reads its depth by attention already), every norm
        is a checkpoint and a layer of its own.
    """
    if stream is None:
        return [_norm(norm.output, layer) for layer, norm in enumerate(find_norms(canonical.exported))]
    points = []
    for sublayer in stream.sublayers:
        points += [_norm(norm.output, sublayer.index) for norm in sublayer.reads.norms]
        for write in sublayer.writes:
            points.append(_point(write.branch.name, sublayer.index, "write", sublayer.module))
    points += [_norm(norm.output, len(stream.sublayers)) for norm in stream.final.norms]
    return points


def _norm(output: object, layer: int) -> Checkpoint:
    return _point(output.name, layer, "norm", module_path(output))  # type: ignore[attr-defined, arg-type]


def _point(value: str, layer: int, role: str, module: str) -> Checkpoint:
    return Checkpoint(value=value, layer=layer, role=role, module=module)
