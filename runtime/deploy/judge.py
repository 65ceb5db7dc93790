"""Judges what an engine returned, window by window: pure functions over arrays.

The comparison is the one that ``depthwire verify`` makes at home, by the budgets that the bundle took from the one
table of tolerances.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from depthwire.errors import UsageError
from depthwire.runtime.compare import compare
from depthwire.runtime.logits import NegativeLogLikelihood, token_nll, top1
from depthwire.runtime.tolerances import KINDS, Kind, Tolerance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from depthwire.runtime.deploy.manifest import Model, Output, RoutingUnit

    Arrays = Mapping[str, NDArray[Any]]

_LISTED_FLIPS = 32


@dataclass(frozen=True)
class EngineFlip:
    """A token that only one of engine and reference computes.

    Attributes:
        module: The routed unit.
        unit: Its number in order of execution.
        sequence: Row of the batch.
        token: Position in the sequence.
        selected: Whether the reference computes it.
    """

    module: str
    unit: int
    sequence: int
    token: int
    selected: bool


def judge_window(model: Model, task: str | None, expected: Arrays, actual: Arrays, feed: Arrays) -> dict[str, Any]:
    """Judge one window.

    Args:
        model: The graph's outputs with their budgets, and its selections.
        task: ``causal-lm`` has a likelihood.
        expected: The goldens: outputs and selections by name.
        actual: What the engine returned, by name.
        feed: The window's inputs.

    Returns:
        ``passed``, and every number that it rests on. A flip of a selection is reported as a flip; whether the window
        passes is decided by its values, as at home.
    """
    rows = {output.name: output for output in model.outputs}
    kinds = {name: _kind(output) for name, output in rows.items()}
    named = [{name: arrays[name] for name in rows if name in arrays} for arrays in (expected, actual)]
    tensors = [result.judge(_budget(rows[result.name])) for result in compare(*named, kinds=kinds).tensors]
    logits = [result for result in tensors if result.kind == "logits" and result.allowed is not None]
    tokens = {r.name: top1(expected[r.name], actual[r.name], allowed=r.allowed or 0.0) for r in logits}
    nll, notes = None, []
    if task == "causal-lm":
        nll, problem = _likelihood(rows, [result.name for result in logits], expected, actual, feed)
        notes += [f"NLL not computed: {problem}"] if problem else []
    flips, problems = judge_routing(model.routing, expected, actual)
    verdicts = [bool(tensors), all(tensors), all(tokens.values()), nll is None or bool(nll), not problems]
    return {
        "passed": all(verdicts),
        "outputs": [result.as_dict() for result in tensors],
        "top1": {name: result.as_dict() for name, result in tokens.items()},
        "nll": None if nll is None else nll.as_dict(),
        "routing": {
            "units": len(model.routing),
            "flips": len(flips),
            "problems": problems,
            "listed": [asdict(flip) for flip in flips[:_LISTED_FLIPS]],
        },
        "notes": notes,
    }


def judge_routing(units: Sequence[RoutingUnit], expected: Arrays, actual: Arrays) -> tuple[list[EngineFlip], list[str]]:
    """Compare the selections of an engine with the reference's.

    Returns:
        Every flip, in order of execution, and what could not be compared.
    """
    flips: list[EngineFlip] = []
    problems = []
    for number, unit in enumerate(units):
        try:
            left, right = (_selected(unit, arrays) for arrays in (expected, actual))
        except (KeyError, ValueError, IndexError) as error:
            problems.append(f"{unit.module}: {type(error).__name__}: {error}")
            continue
        if left.shape != right.shape:
            problems.append(f"{unit.module}: {len(right)} sequences instead of {len(left)}")
            continue
        for sequence, token in zip(*np.nonzero(left != right), strict=True):
            place = int(sequence), int(token)
            flips.append(EngineFlip(unit.module, number, *place, bool(left[place])))
    return flips, problems


def _selected(unit: RoutingUnit, arrays: Arrays) -> NDArray[np.bool_]:
    """Return which tokens are computed, ``[B, T]``."""
    index, taken = arrays[unit.index], arrays[unit.taken].astype(bool)
    if index.shape != taken.shape:
        raise ValueError(f"{list(index.shape)} tokens and {list(taken.shape)} bits")
    if index.size and not 0 <= index.min() <= index.max() < unit.tokens:
        raise ValueError(f"tokens {index.min()} to {index.max()} of {unit.tokens}")
    bits = np.zeros((*index.shape[:-1], unit.tokens), dtype=bool)
    # A slot that holds no token may name one that another slot holds.
    for row, slots, used in zip(bits, index, taken, strict=True):
        row[slots[used]] = True
    return bits


def _kind(output: Output) -> Kind:
    if output.kind not in KINDS:
        raise ValueError(f"output {output.name} has the unknown kind {output.kind!r}")
    return cast("Kind", output.kind)


def _budget(output: Output) -> Tolerance:
    return Tolerance(output.rtol, output.atol, output.reason)


def _likelihood(
    rows: Mapping[str, Output], names: Sequence[str], expected: Arrays, actual: Arrays, feed: Arrays
) -> tuple[NegativeLogLikelihood | None, str]:
    if not names:
        return None, "no output of logits could be compared"
    output, ids, mask = rows[names[0]], feed.get("input_ids"), feed.get("attention_mask")
    if ids is None or output.nll_atol is None:
        return None, "the model has no input named input_ids"
    usable = mask if mask is not None and mask.shape == ids.shape else None
    try:
        (left, count), (right, _) = (token_nll(side[output.name], ids, usable) for side in (expected, actual))
    except UsageError as error:
        return None, str(error.got)
    return NegativeLogLikelihood(count, left, right, Tolerance(0.0, output.nll_atol, output.reason)), ""
