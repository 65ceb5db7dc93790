"""The precision stage: from the rewritten fp32 program to the one that is deployed, and its fp32 twin.

The deployed program has the dtypes of the written graph; what it computes in torch is what an engine must compute. The
twin has the same stored weights and computes in fp32: it is what a runtime without half-precision kernels can be
compared with, to rounding.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from depthwire.artifact import PrecisionInfo
from depthwire.errors import PassError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from depthwire._flow import Rewritten, Window
    from depthwire.passes.analysis.quantization import QuantizationPlan
    from depthwire.passes.analysis.ranges import Ranges
    from depthwire.program import Program
    from depthwire.recipe import Recipe
    from depthwire.runtime.target import Target
    from depthwire.stages import Stage, Stages

Rest = Literal["fp32", "fp16", "bf16"]
_PLAIN: dict[str, Rest] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}

HEADROOM = 2.0
"""Calibration text shows the ranges of some text: what fp16 holds must be this many times more."""


@dataclass(frozen=True)
class Deployed:
    """What is written in place of the rewritten program.

    Attributes:
        program: At the dtypes of the graph.
        twin: The same stored weights, computed in fp32.
        info: For the manifest.
    """

    program: Program
    twin: Program
    info: PrecisionInfo


def rest_of(recipe: Recipe, target: Target) -> Rest:
    """Return the dtype of what is not quantised."""
    kind, rest = recipe.precision.kind, recipe.precision.rest
    plain = _PLAIN.get(kind)
    if plain is not None:
        if rest is not None:
            raise UsageError(
                "precision.rest",
                "There is no rest: everything is computed in one dtype",
                at="--precision-rest",
                want="--precision int8 or int4-weights",
                got=f"--precision {kind}",
                todo="Leave --precision-rest away, or quantise.",
            )
        return plain
    return rest or ("fp32" if target.builder == "onnxruntime" else "fp16")


def calibration_count(recipe: Recipe) -> int:
    """Return how many windows of the recipe's own text the calibration takes, behind those that are compared."""
    own = recipe.precision.kind != "fp32" and recipe.precision.calibration is None and recipe.goldens.inputs is None
    return recipe.precision.calibration_windows if own else 0


def calibration_windows(program: Program, recipe: Recipe, spare: Sequence[Window]) -> tuple[Sequence[Window], str]:
    """Return the windows to measure ranges on, and where they are from.

    Args:
        program: The captured program.
        recipe: Its ``precision`` section decides.
        spare: Windows of the recipe's text that nothing is compared on; of a file of inputs, all of it.
    """
    from depthwire.export.inputs import text_windows

    options = recipe.precision
    if options.calibration is not None:
        windows = text_windows(program, options.calibration, count=options.calibration_windows)
        return windows, f"{len(windows)} windows of {options.calibration.name}"
    if recipe.goldens.inputs is not None:
        return spare, f"{len(spare)} windows of {recipe.goldens.inputs.name}"
    if recipe.goldens.text is None and options.kind in ("int8", "int4-weights"):
        raise UsageError(
            "precision.no-calibration",
            "Scales cannot be measured on random tokens",
            at=f"--precision {options.kind}",
            want="--text or --calibration with text that the model knows, or --inputs",
            got="neither",
            todo="Give a text of the kind that the model will see.",
        )
    origin = "random inputs" if recipe.goldens.text is None else recipe.goldens.text.name
    return spare, f"{len(spare)} windows of {origin}"


def precision_stage(
    rewritten: Rewritten, recipe: Recipe, target: Target, windows: Sequence[Window], *, origin: str, stages: Stages
) -> Rewritten:
    """Bring the rewritten programs to the precision asked for.

    Args:
        rewritten: What the passes made, in fp32.
        recipe: Its ``precision`` section.
        target: Which precisions it has, and what int8 leaves.
        windows: To measure ranges on.
        origin: Where they are from, in words.
        stages: Where the stage is recorded.

    Raises:
        UsageError: The target lacks the precision, or the options contradict each other.
        PassError: The model is not fp32 (``precision.not-fp32``), or float16 does not hold its values
            (``precision.overflow``).
    """
    options = recipe.precision
    if options.kind == "fp32":
        return rewritten
    with stages.stage("precision", options.kind) as stage:
        rest = rest_of(recipe, target)
        _require_fp32(rewritten.program)
        feeds = _feeds(windows)
        ranges = _ranges(rewritten, feeds, rest, wide_logits=options.logits == "fp32", stage=stage)
        steps, twin_steps, quantized = _steps(rewritten.program, feeds, recipe, rest, stage)
        program, twin = (_run(rewritten.program, each) for each in (steps, twin_steps))
        info = PrecisionInfo(
            asked=options.kind,
            rest=rest,
            logits=options.logits,
            islands=_islands(rewritten.program, wide_logits=options.logits == "fp32") if rest != "fp32" else {},
            quantized=quantized,
            calibration=origin,
            largest=ranges.largest,
            largest_at=ranges.largest_at,
        )
        stage.bytes = program.weight_bytes
        stage.detail = f"{options.kind}: {_told(info)}, largest value {ranges.largest:.4g} on {origin}"
        variants = tuple(
            dataclasses.replace(
                each, deployed=Deployed(_run(each.program, steps), _run(each.program, twin_steps), info)
            )
            for each in rewritten.variants
        )
        return dataclasses.replace(rewritten, deployed=Deployed(program, twin, info), variants=variants)


def _told(info: PrecisionInfo) -> str:
    parts = [f"{count} {what}" for what, count in info.quantized.items()]
    parts += [f"{reason} {count} in fp32" for reason, count in info.islands.items()]
    return ", ".join(parts) or "no islands"


def _require_fp32(program: Program) -> None:
    import torch

    low = [
        fqn for fqn, tensor in program.exported.state_dict.items() if tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    if low:
        raise PassError(
            "precision.not-fp32",
            "The precision of a model that was captured in half precision is what it is",
            at=low[0],
            want="fp32 weights",
            got=f"{len(low)} weights of {program.exported.state_dict[low[0]].dtype}",
            todo="Capture with --dtype fp32, or leave --precision away to keep the model's own dtypes.",
        )


def _feeds(windows: Sequence[Window]) -> list[Mapping[str, Tensor]]:
    import torch

    return [{name: torch.from_numpy(array) for name, array in window.items()} for window in windows]


def _ranges(
    rewritten: Rewritten, feeds: Sequence[Mapping[str, Tensor]], rest: str, *, wide_logits: bool, stage: Stage
) -> Ranges:
    """Measure the values that are to be stored in the low dtype, and refuse what float16 does not hold."""
    from depthwire.passes.analysis.precision import assign
    from depthwire.passes.analysis.ranges import measure

    assignment = assign(rewritten.program, wide_logits=wide_logits)
    stage.update("measuring ranges")
    ranges = measure(rewritten.program, feeds, assignment.low | assignment.weights)
    limit = 65504.0 / HEADROOM
    if rest == "fp16" and not ranges.largest <= limit:
        raise PassError(
            "precision.overflow",
            "float16 does not hold the values of this model",
            at=ranges.largest_at or "the model",
            want=f"at most {limit:.0f} in magnitude ({HEADROOM:g} times below float16's largest)",
            got=f"{ranges.largest:.4g} on the calibration windows",
            todo="Use --precision bf16, which has the range of fp32"
            + (" (or --precision-rest bf16)." if rest else "."),
        )
    return ranges


def _islands(program: Program, *, wide_logits: bool) -> dict[str, int]:
    from depthwire.passes.analysis.precision import assign

    return assign(program, wide_logits=wide_logits).islands


def _steps(
    program: Program, feeds: Sequence[Mapping[str, Tensor]], recipe: Recipe, rest: Rest, stage: Stage
) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, int]]:
    """Return the passes that make the deployed program, those that make its twin, and what is quantised."""
    from depthwire.passes.cast_precision import CastPrecision

    options = recipe.precision
    quantize: tuple[Any, ...] = ()
    weights_alone: tuple[Any, ...] = ()
    quantized: dict[str, int] = {}
    if options.kind in ("int8", "int4-weights"):
        from depthwire.passes.analysis.quantization import calibrate
        from depthwire.passes.quantize_linear import QuantizeLinear

        plan = calibrate(program, feeds, options.kind, progress=stage.update)
        _require_quantized(plan, options.kind)
        quantize = (QuantizeLinear(plan),)
        weights = {name: dataclasses.replace(weight, activation=None) for name, weight in plan.weights.items()}
        weights_alone = (QuantizeLinear(dataclasses.replace(plan, weights=weights)),)
        quantized = {
            "layers quantised": len(plan.weights),
            "with their input": len(plan.weights) - len(plan.weight_only),
        }
        quantized |= {"layers kept": len(plan.kept)} if plan.kept else {}
    if rest == "fp32":
        return quantize, weights_alone, quantized
    cast = CastPrecision(rest, options.logits)
    twin = dataclasses.replace(cast, arithmetic="fp32")
    return (*quantize, cast), (*weights_alone, twin), quantized


def _require_quantized(plan: QuantizationPlan, kind: str) -> None:
    bits = 4 if kind == "int4-weights" else 8
    if any(weight.bits == bits for weight in plan.weights.values()):
        return
    # Heads and routers are left alone in every model: the reason for all others says more.
    declines = sorted(plan.kept.values(), key=lambda each: each.code.endswith((".head", ".router", ".shared")))
    raise PassError(
        "precision.nothing-quantised",
        f"No linear layer of this model can have weights of {bits} bits",
        at=declines[0].at if declines else "the model",
        want=declines[0].want if declines else "linear layers",
        got=f"{declines[0].got}; {len(declines)} layers left alone" if declines else "none",
        todo="Use another --precision; 'depthwire explain' lists why each layer is left alone.",
    )


def _run(program: Program, steps: tuple[Any, ...]) -> Program:
    from depthwire.passes._pipeline import Pipeline

    return Pipeline(steps).run(program)
