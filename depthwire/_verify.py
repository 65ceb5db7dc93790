"""``verify``: the artefact against the source it names, captured and rewritten again as its recipe says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from depthwire import _flow
from depthwire._results import VerificationError
from depthwire.artifact import MANIFEST, Artifact
from depthwire.errors import CaptureError, DepthwireError, ExportError, UsageError
from depthwire.recipe import make_recipe
from depthwire.report import make_report, write_report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from depthwire._flow import Model, Window
    from depthwire.program import Program
    from depthwire.recipe import Recipe
    from depthwire.runtime.target import Target
    from depthwire.runtime.verify_report import PairResult, VerifyReport
    from depthwire.stages import Stage, Stages


def verify(
    directory: Path, source: Model | None, options: Mapping[str, object], stages: Stages, *, goldens_only: bool
) -> VerifyReport:
    """See ``depthwire.api.verify``."""
    given = [name for name, value in options.items() if value is not None]
    if goldens_only and (given or source is not None):
        raise UsageError(
            "verify.goldens-only",
            "The goldens bring their own inputs and outputs",
            at="--goldens-only",
            want="no other option",
            got=", ".join([*(["source"] if source is not None else []), *given]),
            todo="Leave --goldens-only away to compare with the source model.",
        )
    with stages.stage("load", str(directory)) as stage:
        artifact = Artifact.load(directory)
        stage.bytes = sum(entry.bytes for entry in artifact.manifest.files.values())
    again: _flow.Rewritten | None = None
    windows: Sequence[Window] = []
    if not goldens_only:
        recipe = _recipe(artifact, options)
        original = _capture_again(artifact, source, recipe, stages)
        target = _target(recipe)
        again = _flow.rewrite_stage(original, recipe, target, stages)
        windows, again = _flow.precise(
            original, again, recipe, target=target, count=recipe.verify.windows, stages=stages
        )
    failure: DepthwireError | None = None
    try:
        report = verify_stage(artifact, again, windows, stages)
    except VerificationError as error:
        report, failure = error.report, error
    write_report(artifact, make_report(artifact, stages, verify=report.as_dict(), failure=failure))
    if failure is not None:
        raise failure
    return report


def verify_stage(
    artifact: Artifact,
    rewritten: _flow.Rewritten | None,
    windows: Sequence[Window],
    stages: Stages,
) -> VerifyReport:
    """Compare; graphs of further capacities on the first window, before ``model.onnx`` on all.

    Args:
        artifact: The artefact.
        rewritten: The programs; ``None`` to compare with the goldens.
        windows: Inputs.
        stages: Where the stage is recorded.

    Raises:
        VerificationError: They differ.
    """
    with stages.stage("verify") as stage:
        further = _capacities(artifact, rewritten)
        for name, variant in further:
            graph = artifact.with_graph(name)
            report = _compare(graph, variant, windows[:1], stage, rewriting=False)
            if not report.passed:
                raise _failure(graph, report)
        report = _compare(artifact, rewritten, windows, stage)
        stage.detail = f"{report.windows} windows, {len(report.comparisons)} comparisons"
        if further:
            stage.detail += f"; 1 window at {len(further)} more capacities"
        if not report.passed:
            raise _failure(artifact, report)
        return report


def _compare(
    artifact: Artifact,
    rewritten: _flow.Rewritten | _flow.Variant | None,
    windows: Sequence[Window],
    stage: Stage,
    *,
    rewriting: bool = True,
) -> VerifyReport:
    """Compare one graph with its programs; of another precision than fp32, the twin of the graph with the program's.

    Args:
        artifact: With the graph chosen.
        rewritten: Its programs; ``None`` to compare with the goldens.
        windows: Inputs.
        stage: Told what goes on.
        rewriting: Whether the rewritten program is compared with the original too.
    """
    from depthwire.runtime.twin import twin_of
    from depthwire.runtime.verify import verify as compare

    if rewritten is None:
        with twin_of(artifact, rounding=True) as twin:
            report = compare(twin, original=None, rewritten=None, windows=windows, progress=stage.update)
            return report if twin is artifact else dataclasses.replace(report, polygraphy="")
    program = rewritten.program if rewriting else None
    if rewritten.deployed is None:
        return compare(
            artifact, original=rewritten.reference, rewritten=program, windows=windows, progress=stage.update
        )
    first = None
    if rewriting:
        first = compare(
            artifact,
            original=rewritten.reference,
            rewritten=program,
            windows=windows,
            progress=stage.update,
            file=False,
        )
    with twin_of(artifact) as twin:
        stage.update("the fp32 twin of the graph")
        second = compare(
            twin,
            original=None,
            rewritten=None,
            deployed=rewritten.deployed.twin,
            windows=windows,
            progress=stage.update,
        )
        second = second if twin is artifact else dataclasses.replace(second, polygraphy="")
    if first is None:
        return second
    return dataclasses.replace(
        second,
        comparisons=(*first.comparisons, *second.comparisons),
        first_divergence=first.first_divergence or second.first_divergence,
        seconds=first.seconds + second.seconds,
    )


def _capacities(artifact: Artifact, rewritten: _flow.Rewritten | None) -> list[tuple[str, _flow.Variant]]:
    """Return the further graphs of a routed model with the programs that they were made from."""
    route = artifact.manifest.route
    if rewritten is None or route is None:
        return []
    return list(zip((graph.file for graph in route.graphs[1:]), rewritten.variants, strict=True))


def _recipe(artifact: Artifact, options: Mapping[str, object]) -> Recipe:
    """Return the recorded recipe with the options applied; new inputs replace recorded text and vice versa."""
    recorded = _flow.recorded_recipe(artifact)
    if options.get("text") is not None or options.get("inputs") is not None:
        cleared = recorded.goldens.model_copy(update={"text": None, "inputs": None})
        recorded = recorded.model_copy(update={"goldens": cleared})
    return make_recipe(options, base=recorded)


def _target(recipe: Recipe) -> Target:
    from depthwire.runtime.target import load_target

    return load_target(recipe.target)


def _capture_again(artifact: Artifact, source: Model | None, recipe: Recipe, stages: Stages) -> Program:
    recorded = artifact.manifest.source
    if source is None and recorded.kind == "module":
        raise ExportError(
            "verify.no-source",
            "The artefact was made from a module that lived in Python",
            at=str(artifact.root / MANIFEST),
            want="the module itself",
            got=recorded.model or recorded.reference,
            todo="Call depthwire.verify(directory, source=module), or compare with the stored outputs: --goldens-only.",
        )
    named = source if source is not None else recorded.reference
    try:
        program = _flow.capture_stage(named, recipe, stages)
    except CaptureError as error:
        raise ExportError(
            "verify.source-missing",
            "The model that was converted cannot be captured again",
            at=str(named) if isinstance(named, (str, Path)) else recorded.reference,
            want="the source that the manifest names",
            got=f"{error.what} [{error.code}]",
            todo="Say where it lies now with --source, or compare with the stored outputs alone: --goldens-only.",
        ) from error
    _require_same_files(recorded.sha256, program)
    return program


def _require_same_files(recorded: Mapping[str, str], program: Program) -> None:
    found = program.source.sha256
    changed = [name for name in sorted({*recorded, *found}) if recorded.get(name) != found.get(name)]
    if not changed:
        return
    name = changed[0]
    raise ExportError(
        "verify.source-changed",
        "The source is not the model that was converted",
        at=f"{program.source.reference}: {', '.join(changed)}",
        want=f"{name} with sha256 {recorded[name][:16]}…" if name in recorded else f"no file {name}",
        got=f"sha256 {found[name][:16]}…" if name in found else "no such file",
        todo="Give the model that was converted with --source, or convert this one.",
    )


def _failure(artifact: Artifact, report: VerifyReport) -> VerificationError:
    failed = next(pair for pair in report.comparisons if not pair)
    divergence = report.first_divergence
    first = None if divergence is None else divergence.first
    at = f"{artifact.model.name}: outputs, {failed.expected} -> {failed.actual}"
    want, got = _numbers(failed)
    if first is not None:
        point = first.checkpoint
        at = f"layer {point.layer}, {point.module} ({point.role} {point.value}), step {first.pair}"
        stats = first.result.stats
        if stats is not None and first.result.allowed is not None:
            want, got = f"max|d| <= {first.result.allowed:.2e} there", f"max|d| {stats.max_abs:.2e} there; {got}"
    elif divergence is not None:
        got = f"{got}; {divergence.note}"
    again = report.polygraphy or f"depthwire verify {artifact.root}"
    error = VerificationError(
        "verify.parity",
        "The compiled model does not compute what the original computes",
        at=at,
        want=want,
        got=got,
        todo=f"Do not use {artifact.root}. Its report.html holds all numbers; repeat with: {again}",
    )
    error.report = report
    return error


def _numbers(pair: PairResult) -> tuple[str, str]:
    """Return what was wanted and found of a failed pair, from its first failed window."""
    if pair.problems or pair.first_failed is None:
        return "every window of every runner", "; ".join(pair.problems) or "no window"
    window = pair.windows[pair.first_failed]
    where = f"window {pair.first_failed}"
    for result in window.tensors.tensors:
        if result.problem is not None:
            return f"{result.name} that can be compared", f"{where}: {result.problem}"
        if not result and result.stats is not None and result.allowed is not None:
            return (
                f"{result.name} max|d| <= {result.allowed:.2e}",
                f"{where}: {result.name} max|d| {result.stats.max_abs:.2e}",
            )
    for name, tokens in window.top1.items():
        if not tokens:
            return f"the same top-1 token of {name}", f"{where}: {tokens.flips} of {tokens.positions} positions differ"
    return "the same likelihood", f"{where}: {window.nll.difference:+.2e} nats" if window.nll else where
