"""``inspect --depth-weights``: from a model and a text to the table, ``report.json`` and the heat map."""

from __future__ import annotations

import datetime as dt
import json
import os
from typing import TYPE_CHECKING

import depthwire
from depthwire._flow import capture_stage, make_windows, rewrite_stage, source_dict
from depthwire._outdir import check_out
from depthwire._results import Inspection
from depthwire.artifact import MANIFEST, REPORT
from depthwire.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire._flow import Examples, Model
    from depthwire.recipe import Recipe
    from depthwire.runtime.depth_weights import DepthWeights
    from depthwire.stages import Stages

HEAT_MAP = "depth_weights.png"
SCHEMA_VERSION = 1


def inspect_depth_weights(
    source: Model, recipe: Recipe, stages: Stages, examples: Examples, out: Path | None
) -> Inspection:
    """See ``depthwire.api.inspect``."""
    if recipe.goldens.text is None and recipe.goldens.inputs is None:
        raise UsageError(
            "runtime.depth-weights-input",
            "Depth weights are a mean over real inputs, and none were given",
            at="--depth-weights",
            want="--text FILE, or --inputs FILE",
            got="neither",
            todo="Name a text of the kind that the model reads.",
        )
    if out is not None:
        _check(out)
    program = capture_stage(source, recipe, stages, examples)
    rewritten = rewrite_stage(program, recipe, None, stages).program
    with stages.stage("depth weights") as stage:
        from depthwire.runtime.depth_weights import depth_weights

        weights = depth_weights(rewritten, make_windows(program, recipe, recipe.verify.windows))
        stage.detail = f"{len(weights.reads)} reads, {weights.tokens} tokens"
    inspection = Inspection(source_dict(program), depth_weights=weights.as_dict())
    if out is not None:
        with stages.stage("write", str(out)):
            _write(out, inspection, weights)
    return inspection


def _check(out: Path) -> None:
    """Refuse a directory that holds anything but an earlier report: an artefact's files are hashed."""
    foreign = out.is_dir() and {path.name for path in out.iterdir()} - {REPORT, HEAT_MAP}
    if foreign:
        raise UsageError(
            "export.output-exists",
            "The output directory exists and holds other files",
            at=str(out),
            want="a new or empty directory, or one of an earlier inspection",
            got="an artefact" if MANIFEST in foreign else ", ".join(sorted(foreign)[:3]),
            todo="Choose another directory with -o.",
        )
    if not out.is_dir():
        check_out(out)


def _write(out: Path, inspection: Inspection, weights: DepthWeights) -> None:
    from depthwire.runtime.depth_weights import save_heat_map

    out.mkdir(parents=True, exist_ok=True)
    picture = out / f".{os.getpid()}.{HEAT_MAP}"
    try:
        save_heat_map(weights, picture)
        picture.replace(out / HEAT_MAP)
    finally:
        picture.unlink(missing_ok=True)
    report = {
        "schema_version": SCHEMA_VERSION,
        "depthwire": depthwire.__version__,
        "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "source": dict(inspection.source),
        "depth_weights": inspection.depth_weights,
    }
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
