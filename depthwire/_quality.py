"""What a rewrite that changes the function costs: the routed model against the original, on the same text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from depthwire.errors import ParityError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from depthwire._flow import Window
    from depthwire.program import Program
    from depthwire.recipe import Recipe
    from depthwire.stages import Stages


def quality_stage(
    original: Program, routed: Program, windows: Sequence[Window], recipe: Recipe, stages: Stages
) -> dict[str, Any]:
    """Compare the routed program with the original in torch, and refuse what exceeds the recipe's budget.

    Args:
        original: The captured program.
        routed: The same program with its routing, before anything else.
        windows: Inputs; text says something about quality, random tokens about exactness alone.
        recipe: ``quality.max_perplexity_increase`` is the budget, ``goldens.text`` where the windows are from.
        stages: Where the stage is recorded.

    Returns:
        JSON-ready: largest difference of the outputs, share of equal top-1 tokens, and for causal language models both
        perplexities.

    Raises:
        ParityError: ``quality.perplexity``: the increase is above the budget.
    """
    with stages.stage("quality", f"{len(windows)} windows") as stage:
        found = _compare(original, routed, windows)
        found["text"] = None if recipe.goldens.text is None else str(recipe.goldens.text)
        budget = recipe.quality.max_perplexity_increase
        found["max_perplexity_increase"] = budget
        increase = found.get("perplexity_increase")
        stage.detail = _detail(found)
        if budget is not None and (increase is None or not increase <= budget):
            raise ParityError(
                "quality.perplexity",
                "The routed model is worse than the budget allows",
                at="--max-perplexity-increase",
                want=f"perplexity at most {100 * budget:.1f} % above the original's",
                got="no perplexity (no logits over tokens)" if increase is None else f"{100 * increase:+.1f} %",
                todo="Raise --capacity, route fewer layers or attention alone, or train the routers and priors.",
            )
        return found


def _compare(original: Program, routed: Program, windows: Sequence[Window]) -> dict[str, Any]:
    import numpy as np

    from depthwire.export.goldens import make_goldens
    from depthwire.runtime.logits import token_nll

    largest, equal, positions = 0.0, 0, 0
    losses: list[tuple[float, float, int]] = []
    for window in windows:  # one at a time: logits are large
        before, after = (make_goldens(program, [window]).outputs[0] for program in (original, routed))
        for name, expected in before.items():
            actual = after[name]
            if expected.dtype.kind == "f":
                largest = max(largest, float(np.abs(expected.astype(np.float64) - actual).max(initial=0.0)))
        logits = next((name for name in before if name.endswith("logits")), None)
        if logits is None:
            continue
        same = before[logits].argmax(-1) == after[logits].argmax(-1)
        equal, positions = equal + int(same.sum()), positions + int(same.size)
        ids = window.get("input_ids")
        if original.source.task == "causal-lm" and ids is not None and ids.shape[1] > 1:
            mask = window.get("attention_mask")
            (left, count), (right, _) = (token_nll(side[logits], ids, mask) for side in (before, after))
            losses.append((left * count, right * count, count))
    result: dict[str, Any] = {"windows": len(windows), "max_abs": largest}
    if positions:
        result["top1_agreement"] = equal / positions
    if losses:
        left, right, count = (sum(column) for column in zip(*losses, strict=True))
        result["nll"] = {"original": left / count, "routed": right / count, "tokens": count}
        result["perplexity"] = {"original": math.exp(left / count), "routed": math.exp(right / count)}
        result["perplexity_increase"] = math.expm1((right - left) / count)
    return result


def _detail(found: dict[str, Any]) -> str:
    parts = []
    if "perplexity" in found:
        before, after = found["perplexity"]["original"], found["perplexity"]["routed"]
        parts.append(f"perplexity {before:.2f} -> {after:.2f} ({100 * found['perplexity_increase']:+.1f} %)")
    if "top1_agreement" in found:
        parts.append(f"top-1 equal {100 * found['top1_agreement']:.1f} %")
    parts.append(f"max|d| {found['max_abs']:.2e}")
    source = "random inputs" if found["text"] is None else found["text"]
    return f"{', '.join(parts)} on {source}"
