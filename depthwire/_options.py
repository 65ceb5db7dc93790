"""The options of a run as keyword arguments, and how they combine with a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from depthwire.errors import UsageError
from depthwire.recipe import Recipe, make_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from depthwire._flow import Model


class Options(TypedDict, total=False):
    """Options of a run; ``docs/recipe.md`` describes each, and absent ones take the recipe's value."""

    task: Literal["causal-lm", "encoder", "vision"] | None
    dtype: Literal["fp32", "bf16", "fp16"] | None
    revision: str | None
    trust_remote_code: bool
    batch: int
    seq_len: int | None
    image_size: int | None
    padding: bool
    checkpoint_map: str | None
    attn_res: str | None
    correction: Literal["eps", "scale"]
    queries: str | Path | None
    collapse_zero_queries: bool
    schedule: Literal["auto", "single"]
    route: str | Path | None
    route_seed: int | None
    route_layers: str | None
    capacity: float | str | None
    capacities: str | None
    route_carry: bool | None
    route_unit: Literal["block", "attention", "mlp"] | None
    route_keys_values: Literal["selected", "all"] | None
    route_rule: Literal["budget", "top-k"] | None
    route_score: Literal["linear", "mod", "surprise", "timescale"] | None
    route_gate: Literal["one", "score", "sigmoid", "surprise"] | None
    route_fallback: Literal["identity", "linear", "swiglu"] | None
    route_margin: int | None
    route_window: int | None
    precision: Literal["fp32", "fp16", "bf16", "int8", "int4-weights"]
    precision_rest: Literal["fp32", "fp16", "bf16"] | None
    logits: Literal["same", "fp32"]
    calibration: str | Path | None
    calibration_windows: int
    target: str
    opset: int | None
    goldens: int
    text: str | Path | None
    inputs: str | Path | None
    seed: int
    verify: bool
    windows: int
    max_perplexity_increase: float | None
    min_top1_agreement: float | None
    build: bool
    compute_capabilities: Sequence[str] | None
    workspace: int | str | None
    optimization_level: int | None
    check_memory: bool
    route_inputs: bool
    all_capacities: bool
    max_batch: int | None
    strip_weights: bool


def combine(
    source: Model | None,
    out: str | Path | None,
    recipe: Recipe | str | Path | None,
    options: Mapping[str, object],
) -> tuple[Model, Recipe]:
    """Return the model to work on and the recipe with the options applied."""
    given: dict[str, object] = dict(options)
    if "out" in given or "source" in given:
        raise TypeError("'source' and 'out' are arguments of their own")
    given["out"] = None if out is None else str(out)
    if isinstance(source, (str, Path)):
        given["source"] = str(source)
    base = recipe if isinstance(recipe, Recipe) else None
    resolved = make_recipe(given, file=None if base is not None else recipe, base=base)  # type: ignore[arg-type]
    if source is not None and not isinstance(source, (str, Path)):
        return source, resolved
    if resolved.source.reference is None:
        raise UsageError(
            "recipe.no-source",
            "No model was given",
            at="SOURCE",
            want="a Hugging Face directory or cached id, package.module:factory, or a .pt2 file",
            got="nothing",
            todo="Name the model, or give 'source: {reference: …}' in the recipe.",
        )
    return resolved.source.reference, resolved
