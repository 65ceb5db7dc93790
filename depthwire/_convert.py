"""``convert`` and its dry run: the stages in order, and what stays behind when one of them fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthwire import _flow
from depthwire._build import build_stage, builds_here, require_backend
from depthwire._outdir import check_out, disk_full_as_error, free_bytes, removed_unless_vouched, require_space
from depthwire._quality import quality_stage
from depthwire._results import DryRun, Result, VerificationError
from depthwire._verify import verify_stage
from depthwire.errors import DepthwireError
from depthwire.report import make_report, write_report

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from depthwire._flow import Examples, Model, Window
    from depthwire.artifact import Artifact, EngineInfo
    from depthwire.export._route_manifest import RoutedGraphs
    from depthwire.program import Program
    from depthwire.recipe import Recipe
    from depthwire.runtime.target import Target
    from depthwire.runtime.verify_report import VerifyReport
    from depthwire.stages import Stages


@dataclass(frozen=True)
class _Run:
    """What the stages of one conversion share."""

    out: Path
    recipe: Recipe
    target: Target
    stages: Stages
    original: Program
    rewritten: _flow.Rewritten
    windows: Sequence[Window]


def convert(source: Model, recipe: Recipe, stages: Stages, *, force: bool, examples: Examples) -> Result:
    """See ``depthwire.api.convert``."""
    out = check_out(recipe.out, force=force)
    target = _target(recipe)
    original = _flow.capture_stage(source, recipe, stages, examples)
    rewritten = _flow.rewrite_stage(original, recipe, target, stages)
    count = max(recipe.goldens.count, recipe.verify.windows if recipe.verify.enabled else 1)
    windows, rewritten = _flow.precise(original, rewritten, recipe, target=target, count=count, stages=stages)
    run = _Run(out, recipe, target, stages, original, rewritten, windows)
    with removed_unless_vouched(out):
        return _prove_and_build(run, _export_stages(run))


def _target(recipe: Recipe) -> Target:
    """Return the target with its package checked: a missing builder must not cost a conversion."""
    from depthwire.runtime.target import load_target

    target = load_target(recipe.target)
    if recipe.build.enabled and builds_here(target):
        target.resolve_compute_capabilities(recipe.build.compute_capabilities)
        require_backend(target)
    if recipe.precision.kind != "fp32":
        capabilities = target.resolve_compute_capabilities(recipe.build.compute_capabilities)
        target.require_precision(recipe.precision.kind, capabilities if recipe.build.enabled else ())
    return target


def _export_stages(run: _Run) -> Artifact:
    """Run on the goldens' windows what the file must compute, translate the program, write both."""
    recipe, stages, deployed = run.recipe, run.stages, run.rewritten.deployed
    opset = recipe.opset or run.target.opset
    needed = sum(bytes_by_part(run.rewritten.written, recipe).values())
    require_space(run.out, needed)
    with stages.stage("goldens") as stage:
        from depthwire.export.goldens import make_goldens

        reference = run.rewritten.reference if deployed is None else deployed.program
        goldens = make_goldens(reference, run.windows[: recipe.goldens.count])
        what = "original" if run.rewritten.route is None else "routed model"
        what = what if deployed is None else f"{recipe.precision.kind} model"
        stage.detail = f"{what} run on {len(goldens.inputs)} of {len(run.windows)} windows"
    with stages.stage("export", f"opset {opset}") as stage, disk_full_as_error(run.out, needed):
        from depthwire.export.to_onnx import to_onnx
        from depthwire.export.write import write_artifact

        stage.update("translating")
        carry = bool(recipe.route.carry)
        model = to_onnx(run.rewritten.written, opset=opset, carry=carry)
        routed = _routed_graphs(run.rewritten, opset, carry=carry)
        artifact = write_artifact(
            run.out,
            original=run.original,
            rewritten=run.rewritten.written,
            model=model,
            goldens=goldens,
            recipe=recipe.resolved(),
            checkpoints=run.rewritten.checkpoints,
            progress=lambda done, total: stage.progress("writing weights", done / max(total, 1)),
            routed=routed,
            precision=None if deployed is None else deployed.info,
        )
        stage.bytes = sum(entry.bytes for entry in artifact.manifest.files.values())
        stage.detail += f", {len(model.graph)} nodes"
        if run.rewritten.variants:
            stage.detail += f", graphs of {len(run.rewritten.variants)} more capacities"
    return artifact


def _routed_graphs(rewritten: _flow.Rewritten, opset: int, *, carry: bool) -> RoutedGraphs | None:
    """Translate the routed model at its further capacities."""
    from depthwire.export._route_manifest import RoutedGraphs, graph_name
    from depthwire.export.to_onnx import to_onnx

    if rewritten.route is None:
        return None
    capacities = {graph_name(share): share for share in (each.route.spec.capacity[0] for each in rewritten.variants)}
    models = [to_onnx(each.written, opset=opset, carry=carry) for each in rewritten.variants]
    return RoutedGraphs(rewritten.route.spec, dict(zip(capacities, models, strict=True)), capacities)


def _prove_and_build(run: _Run, artifact: Artifact) -> Result:
    recipe, stages, windows = run.recipe, run.stages, run.windows
    verdict: VerifyReport | None = None
    engine: EngineInfo | None = None
    failure: DepthwireError | None = None
    quality: dict[str, Any] | None = None
    try:
        programs = _programs(run)
        if len(programs) > 1:
            quality = quality_stage(programs, windows, recipe, stages)
            if artifact.manifest.precision is not None:
                artifact.manifest.precision.quality = quality
                artifact.write_manifest()
        if recipe.verify.enabled:
            # A file of inputs says itself how many windows there are.
            chosen = windows if recipe.goldens.inputs is not None else windows[: recipe.verify.windows]
            verdict = verify_stage(artifact, run.rewritten, chosen, stages)
        if recipe.build.enabled and builds_here(run.target):
            engine = build_stage(artifact, run.target, recipe.build, stages)
    except VerificationError as error:
        verdict, failure = error.report, error
    except DepthwireError as error:
        failure = error
    verify = None if verdict is None else verdict.as_dict()
    structure = run.rewritten.structure
    document = make_report(artifact, stages, structure=structure, verify=verify, quality=quality, failure=failure)
    write_report(artifact, document)
    if failure is not None:
        raise failure
    return Result(artifact, document, verdict, engine, stages)


def _programs(run: _Run) -> dict[str, Program]:
    """Return the programs that compute different functions: the original first, what is deployed last."""
    rewritten = run.rewritten
    found = {"original": run.original}
    if rewritten.route is not None:
        found["routed"] = rewritten.reference
    if rewritten.deployed is not None:
        found["deployed"] = rewritten.deployed.program
    return found


def dry_run(source: Model, recipe: Recipe, stages: Stages, *, force: bool, examples: Examples) -> DryRun:
    """See ``depthwire.api.dry_run``."""
    out = None if recipe.out is None else check_out(recipe.out, force=force)
    target = _target(recipe)
    original = _flow.capture_stage(source, recipe, stages, examples)
    rewritten = _flow.rewrite_stage(original, recipe, target, stages)
    facts = {
        "name": target.name,
        "title": target.title,
        "builder": target.builder,
        "opset": recipe.opset or target.opset,
        "engine": recipe.build.enabled and builds_here(target),
        "compute_capabilities": list(target.resolve_compute_capabilities(recipe.build.compute_capabilities))
        if builds_here(target)
        else [],
    }
    return DryRun(
        recipe=recipe,
        source=_flow.source_dict(original),
        target=facts,
        structure=rewritten.structure,
        passes=_flow.passes_list(rewritten.program),
        bytes_by_part=bytes_by_part(rewritten.program, recipe),
        free_bytes=None if out is None else free_bytes(out),
        stages=stages,
    )


def bytes_by_part(program: Program, recipe: Recipe) -> dict[str, int]:
    """Return the bytes that a conversion will write: weights, goldens, and what ``verify`` keeps (base64 in JSON)."""
    window = _flow.window_bytes(program)
    parts = {"weights": program.weight_bytes, "goldens": recipe.goldens.count * window}
    if recipe.verify.enabled:
        parts["verify"] = window * 4 // 3
    return parts
