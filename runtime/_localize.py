"""Find the layer where two graphs start to disagree."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from depthwire.runtime.compare import compare
from depthwire.runtime.onnxruntime import run_session, session_from_artifact, value_names
from depthwire.runtime.routing_flips import RoutingFlip, routing_flips
from depthwire.runtime.torch_exported import node_names, run_nodes
from depthwire.runtime.verify_report import CheckpointResult, Divergence, Pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from depthwire.artifact import Artifact, Checkpoint
    from depthwire.program import Program

    Values = Mapping[str, NDArray[Any]]

_ONNXRUNTIME = "onnxruntime"
_STEPS: dict[tuple[str, str], Pair] = {
    ("original", "rewritten"): "rewrite",
    ("rewritten", _ONNXRUNTIME): "export/runtime",
    ("original", _ONNXRUNTIME): "compile",
    ("routed", "rewritten"): "rewrite",
    ("routed", _ONNXRUNTIME): "compile",
    ("deployed", _ONNXRUNTIME): "export/runtime",
}


def first_divergence(
    artifact: Artifact,
    programs: Mapping[str, Program],
    inputs: Values,
    *,
    window: int,
    tell: Callable[[str], None],
    kernels: bool | None,
    file: bool = True,
) -> Divergence:
    """Walk the artefact's checkpoints in layer order, across every step from the original to ONNX Runtime.

    Args:
        artifact: The artefact.
        programs: ``original`` (or ``routed``) and ``rewritten``, or one of them, in this order.
        inputs: The window on which a comparison failed.
        window: Its index, for the report.
        tell: Receives a line per graph.
        kernels: As in ``session_from_artifact``.
        file: Whether the artefact's graph is one of the steps.
    """
    checkpoints = sorted(artifact.manifest.checkpoints, key=_layer_order)
    names = list(dict.fromkeys(checkpoint.value for checkpoint in checkpoints))
    values: dict[str, Values] = {}
    for label, program in programs.items():
        tell(f"layers of {label}")
        known = node_names(program)
        values[label] = run_nodes(program, inputs, [name for name in names if name in known])
    flips: list[RoutingFlip] = []
    if file:
        tell(f"layers of {_ONNXRUNTIME}")
        values[_ONNXRUNTIME] = _session_values(artifact, inputs, names, kernels=kernels)
        tell("routing")
        flips = routing_flips(artifact, list(programs.values())[-1], inputs, kernels=kernels)
    trail = tuple(_walk(checkpoints, values))
    first = next((entry for entry in trail if not entry.result), None)
    return Divergence(
        first=first,
        note=" ".join(filter(None, [_flip_note(flips), _note(first, trail, checkpoints)])),
        window=window,
        checked=len({id(entry.checkpoint) for entry in trail}),
        skipped=sum(any(c.value not in side for side in values.values()) for c in checkpoints),
        trail=trail,
        flips=tuple(flips),
    )


def _layer_order(checkpoint: Checkpoint) -> tuple[int, bool]:
    return checkpoint.layer, checkpoint.role != "norm"  # a sublayer reads through its norm before it writes


def _session_values(artifact: Artifact, inputs: Values, names: list[str], *, kernels: bool | None) -> Values:
    known = value_names(artifact)
    wanted = [name for name in names if name in known]
    if not wanted:
        return {}
    found = run_session(session_from_artifact(artifact, extra_outputs=wanted, kernels=kernels), inputs)
    return {name: found[name] for name in wanted}


def _walk(checkpoints: list[Checkpoint], values: Mapping[str, Values]) -> Iterator[CheckpointResult]:
    labels = list(values)
    for checkpoint in checkpoints:
        for expected, actual in pairwise(labels):
            name = checkpoint.value
            if name in values[expected] and name in values[actual]:
                left, right = {name: values[expected][name]}, {name: values[actual][name]}
                result = compare(left, right, default="layer")[name]
                yield CheckpointResult(checkpoint, _STEPS[expected, actual], result)


def _flip_note(flips: list[RoutingFlip]) -> str:
    """Return what was routed differently: a unit's flips change everything behind it."""
    if not flips:
        return ""
    cause = flips[0]
    own = [flip for flip in flips if flip.unit == cause.unit]
    apart = abs(cause.score - cause.nearest)
    return (
        f"The graphs route {len(own)} tokens differently, first in {cause.module}: token {cause.token} of sequence "
        f"{cause.sequence}, whose score {cause.score:.6g} is {apart:.2g} away from that of a token on the other side."
    )


def _note(first: CheckpointResult | None, trail: tuple[CheckpointResult, ...], checkpoints: list[Checkpoint]) -> str:
    if first is not None:
        at = first.checkpoint
        return f"Layer {at.layer} ({at.role} of {at.module}) is the first to differ, in the step '{first.pair}'."
    if trail:
        last = trail[-1].checkpoint
        return f"Every checkpoint agrees: the divergence comes after the last one, layer {last.layer} ({last.module})."
    if checkpoints:
        return "No checkpoint is in two graphs under one name, so the divergence cannot be placed."
    return "The artefact lists no checkpoints, so the divergence cannot be placed."
