"""What a change of the function costs: the routed model, or one of another precision, against the original on text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from depthwire.errors import ParityError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from depthwire._flow import Window
    from depthwire.program import Program
    from depthwire.recipe import Recipe
    from depthwire.runtime.routing_flips import RoutingFlip
    from depthwire.stages import Stages

    Arrays = Mapping[str, NDArray[Any]]

_LISTED = 16


def quality_stage(
    programs: Mapping[str, Program], windows: Sequence[Window], recipe: Recipe, stages: Stages
) -> dict[str, Any]:
    """Compare programs that compute different functions, in torch, and refuse what exceeds the recipe's budgets.

    Args:
        programs: ``original`` first, then, as far as they differ, ``routed`` and ``deployed``.
        windows: Inputs; text says something about quality, random tokens about exactness alone.
        recipe: ``quality`` has the budgets, ``goldens.text`` where the windows are from.
        stages: Where the stage is recorded.

    Returns:
        JSON-ready: of the last program against the original, the largest difference of the outputs, the share of equal
        top-1 tokens, and for causal language models both perplexities. ``steps`` has the same of each program against
        the one before it, with the routing flips, where there are three.

    Raises:
        ParityError: ``quality.perplexity`` or ``quality.top1``: beyond the budget. ``quality.not-finite``: a value
            inside the last program overflowed.
    """
    with stages.stage("quality", f"{len(windows)} windows") as stage:
        labels = list(programs)
        pairs = {pair: _Pair() for pair in [(labels[0], labels[-1]), *pairwise(labels)]}
        task = programs[labels[0]].source.task
        for number, window in enumerate(windows):  # one at a time: logits are large
            stage.update(f"window {number + 1} of {len(windows)}")
            runs = {label: _run(program, window) for label, program in programs.items()}
            _require_finite(runs[labels[0]], runs[labels[-1]], labels[-1])
            for (left, right), pair in pairs.items():
                pair.add(runs[left], runs[right], window, task)
        found = pairs[labels[0], labels[-1]].as_dict((labels[0], labels[-1]), len(windows))
        if len(labels) > 2:
            found["steps"] = [pairs[pair].as_dict(pair, len(windows)) for pair in pairwise(labels)]
        found["text"] = None if recipe.goldens.text is None else str(recipe.goldens.text)
        found["max_perplexity_increase"] = recipe.quality.max_perplexity_increase
        found["min_top1_agreement"] = recipe.quality.min_top1_agreement
        stage.detail = _detail(found, labels[-1])
        _require_budgets(found, recipe, labels[-1])
        return found


@dataclass(frozen=True)
class _Run:
    """Outputs of one program, the selections of its routed units with their scores, and where values overflowed."""

    outputs: Arrays
    selections: list[tuple[str, NDArray[Any], NDArray[np.bool_]]]
    not_finite: list[str]


def _run(program: Program, window: Window) -> _Run:
    import torch

    from depthwire.passes._base import where
    from depthwire.passes.analysis.observe import observe
    from depthwire.runtime._fx import is_selection, module_of
    from depthwire.runtime.routing_flips import selected_bits

    selections: list[tuple[str, NDArray[Any], NDArray[np.bool_]]] = []
    scores = {node.args[0] for node in program.exported.graph.nodes if is_selection(node)}
    held: dict[Any, NDArray[Any]] = {}
    broken: list[str] = []

    def look(node: torch.fx.Node, value: Any) -> None:
        if node in scores:
            held[node] = value.float().numpy()
        if is_selection(node):
            score = held[node.args[0]]
            bits = selected_bits(value[0].numpy(), value[1].numpy(), score.shape)
            selections.append((module_of(node) or node.name, score, bits))
        tensors = value if isinstance(value, (tuple, list)) else (value,)
        floats = [each for each in tensors if isinstance(each, torch.Tensor) and each.is_floating_point()]
        if node.op != "placeholder" and not all(bool(each.isfinite().all()) for each in floats):
            broken.append(where(node))

    feed = {name: torch.from_numpy(array) for name, array in window.items()}
    results = observe(program, feed, look)
    outputs = {
        name: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for name, value in zip(program.output_names, results, strict=True)
    }
    return _Run(outputs, selections, broken)


def _require_finite(reference: _Run, last: _Run, label: str) -> None:
    """Refuse a program in which a value overflowed that is finite in the reference (masks may hold infinities)."""
    fresh = [place for place in last.not_finite if place not in reference.not_finite]
    if not reference.not_finite and fresh:
        raise ParityError(
            "quality.not-finite",
            f"A value of the {label} model is infinite or not a number",
            at=fresh[0],
            want="finite values, as in the original",
            got=f"{len(fresh)} values that are not finite",
            todo="Use --precision bf16, which has the range of fp32, or --logits fp32 if the logits are meant.",
        )


@dataclass
class _Pair:
    """What is known of two programs after some windows."""

    largest: float = 0.0
    equal: int = 0
    positions: int = 0
    losses: list[tuple[float, float, int]] = field(default_factory=list)
    flips: list[RoutingFlip] = field(default_factory=list)
    selected: int = 0

    def add(self, left: _Run, right: _Run, window: Window, task: str | None) -> None:
        import numpy as np

        from depthwire.runtime.logits import token_nll
        from depthwire.runtime.routing_flips import compare_selections

        for name, expected in left.outputs.items():
            if expected.dtype.kind == "f":
                difference = np.abs(expected.astype(np.float64) - right.outputs[name])
                self.largest = max(self.largest, float(difference.max(initial=0.0)))
        if len(left.selections) == len(right.selections):
            for unit, ((module, score, bits), other) in enumerate(zip(left.selections, right.selections, strict=True)):
                self.flips += compare_selections(module, unit, score, bits, other[2])
                self.selected += int(bits.size)
        logits = next((name for name in left.outputs if name.endswith("logits")), None)
        if logits is None:
            return
        before, after = left.outputs[logits], right.outputs[logits]
        same = before.argmax(-1) == after.argmax(-1)
        self.equal, self.positions = self.equal + int(same.sum()), self.positions + int(same.size)
        ids = window.get("input_ids")
        if task == "causal-lm" and ids is not None and ids.shape[1] > 1:
            mask = window.get("attention_mask")
            (one, count), (other_nll, _) = (token_nll(side, ids, mask) for side in (before, after))
            self.losses.append((one * count, other_nll * count, count))

    def as_dict(self, labels: tuple[str, str], windows: int) -> dict[str, Any]:
        result: dict[str, Any] = {
            "expected": labels[0],
            "actual": labels[1],
            "windows": windows,
            "max_abs": self.largest,
        }
        if self.positions:
            result["top1_agreement"] = self.equal / self.positions
        if self.losses:
            left, right, count = (sum(column) for column in zip(*self.losses, strict=True))
            result["nll"] = {labels[0]: left / count, labels[1]: right / count, "tokens": count}
            result["perplexity"] = {labels[0]: math.exp(left / count), labels[1]: math.exp(right / count)}
            result["perplexity_increase"] = math.expm1((right - left) / count)
        if self.selected:
            listed = [flip.as_dict() for flip in self.flips[:_LISTED]]
            result["routing_flips"] = {"count": len(self.flips), "of": self.selected, "listed": listed}
        return result


def _require_budgets(found: Mapping[str, Any], recipe: Recipe, label: str) -> None:
    quality = recipe.quality
    increase, agreement = found.get("perplexity_increase"), found.get("top1_agreement")
    todo = (
        "Raise --capacity, route fewer layers or attention alone, or train the routers and priors."
        if label == "routed"
        else "Choose a wider --precision (or --logits fp32, or more --calibration-windows), or a looser budget."
    )
    budget = quality.max_perplexity_increase
    if budget is not None and (increase is None or not increase <= budget):
        raise ParityError(
            "quality.perplexity",
            f"The {label} model is worse than the budget allows",
            at="--max-perplexity-increase",
            want=f"perplexity at most {100 * budget:.1f} % above the original's",
            got="no perplexity (no logits over tokens)" if increase is None else f"{100 * increase:+.1f} %",
            todo=todo,
        )
    least = quality.min_top1_agreement
    if least is not None and (agreement is None or not agreement >= least):
        raise ParityError(
            "quality.top1",
            f"The {label} model chooses other tokens more often than the budget allows",
            at="--min-top1-agreement",
            want=f"the same most likely token at {100 * least:.2f} % of the positions",
            got="no logits over tokens" if agreement is None else f"{100 * agreement:.2f} %",
            todo=todo,
        )


def _detail(found: Mapping[str, Any], label: str) -> str:
    parts = []
    if "perplexity" in found:
        before, after = found["perplexity"]["original"], found["perplexity"][label]
        parts.append(f"perplexity {before:.2f} -> {after:.2f} ({100 * found['perplexity_increase']:+.1f} %)")
    if "top1_agreement" in found:
        parts.append(f"top-1 equal {100 * found['top1_agreement']:.2f} %")
    parts.append(f"max|d| {found['max_abs']:.2e}")
    flips = found.get("steps", [{}])[-1].get("routing_flips")
    if flips is not None:
        parts.append(f"{flips['count']} of {flips['of']} routing decisions flipped by the precision")
    source = "random inputs" if found["text"] is None else found["text"]
    return f"{', '.join(parts)} on {source}"
