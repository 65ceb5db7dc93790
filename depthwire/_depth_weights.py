"""``inspect --depth-weights``: from a model and a text to the table, ``report.json`` and the heat map."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from depthwire._flow import capture_stage, make_windows, rewrite_stage, source_dict
from depthwire._inspect_out import check_inspection_out, require_inputs, write_inspection
from depthwire._results import Inspection

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire._flow import Examples, Model
    from depthwire.recipe import Recipe
    from depthwire.stages import Stages

HEAT_MAP = "depth_weights.png"


def inspect_depth_weights(
    source: Model, recipe: Recipe, stages: Stages, examples: Examples, out: Path | None
) -> Inspection:
    """See ``depthwire.api.inspect``."""
    what = "Depth weights are a mean over real inputs, and none were given"
    require_inputs(recipe, "runtime.depth-weights-input", what, "--depth-weights")
    if out is not None:
        check_inspection_out(out, {HEAT_MAP})
    program = capture_stage(source, recipe, stages, examples)
    rewritten = rewrite_stage(program, recipe, None, stages).program
    with stages.stage("depth weights") as stage:
        from depthwire.runtime.depth_weights import depth_weights, save_heat_map

        weights = depth_weights(rewritten, make_windows(program, recipe, recipe.verify.windows))
        stage.detail = f"{len(weights.reads)} reads, {weights.tokens} tokens"
    inspection = Inspection(source_dict(program), depth_weights=weights.as_dict())
    if out is not None:
        with stages.stage("write", str(out)):
            sections = {"depth_weights": inspection.depth_weights}
            write_inspection(out, inspection.source, sections, {HEAT_MAP: partial(save_heat_map, weights)})
    return inspection
