"""``inspect --routing``: from a routed model and a text to the table, ``report.json``, the picture and the page."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from depthwire._flow import capture_stage, make_windows, rewrite_stage, source_dict
from depthwire._inspect_out import check_inspection_out, require_inputs, write_inspection
from depthwire._results import Inspection
from depthwire.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from depthwire._flow import Examples, Model, Window
    from depthwire.program import Source
    from depthwire.recipe import Recipe
    from depthwire.stages import Stages

PICTURE = "routing_map.png"
PAGE = "routing_map.html"
_IDS = "input_ids"


def inspect_routing(source: Model, recipe: Recipe, stages: Stages, examples: Examples, out: Path | None) -> Inspection:
    """See ``depthwire.api.inspect``."""
    what = "A routing map shows the tokens of real inputs, and none were given"
    require_inputs(recipe, "runtime.routing-input", what, "--routing")
    if out is not None:
        check_inspection_out(out, {PICTURE, PAGE})
    program = capture_stage(source, recipe, stages, examples)
    rewritten = rewrite_stage(program, recipe, None, stages).program
    with stages.stage("routing") as stage:
        from depthwire.runtime.routing_map import routing_html, routing_map, save_routing_picture

        windows = make_windows(program, recipe, recipe.verify.windows)
        found = routing_map(rewritten, windows, _texts(program.source, windows))
        count = sum(len(row) for row in found.tokens)
        shares = ", ".join(f"{100 * share:.0f} %" for share in sorted({round(s.share, 2) for s in found.selections}))
        stage.detail = f"{len(found.selections)} routed units, {count} tokens, {shares} computed"
    inspection = Inspection(source_dict(program), routing=found.as_dict())
    if out is not None:
        with stages.stage("write", str(out)):
            page = routing_html(found)
            files = {
                PICTURE: partial(save_routing_picture, found),
                PAGE: lambda path: path.write_text(page, encoding="utf-8"),
            }
            write_inspection(out, inspection.source, {"routing": inspection.routing}, files)  # type: ignore[arg-type]
    return inspection


def _texts(source: Source, windows: Sequence[Window]) -> list[list[str]]:
    """Return every token as text, one row for each sequence; numbers where the source has no tokenizer."""
    from depthwire.export._tokenizer import load_tokenizer

    first = next(iter(windows[0].values()))
    if _IDS not in windows[0]:  # images: positions of the tokens are all there is to name
        return [[str(position) for position in range(first.shape[1])] for window in windows for _ in first]
    rows = [row.tolist() for window in windows for row in window[_IDS]]
    try:
        tokenizer = load_tokenizer(source)
    except CaptureError:
        return [[f"{token} " for token in row] for row in rows]  # the inputs were a file, which needs no tokenizer
    return [[tokenizer.decode([token]) for token in row] for row in rows]
