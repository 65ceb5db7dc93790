"""The stages behind the verbs: functions from values to values, each run under ``Stages``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from depthwire._outdir import check_file, disk_full_as_error, require_space
from depthwire._results import Explanation, Inspection
from depthwire._route import route_of, variants_of
from depthwire.artifact import MANIFEST, Artifact, Checkpoint
from depthwire.errors import ExportError, InternalError, PassError, UsageError
from depthwire.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from depthwire._precision import Deployed
    from depthwire.passes._base import Pass
    from depthwire.passes.analysis.residual_stream import ResidualStream
    from depthwire.program import Program
    from depthwire.route_parts import RouteParts
    from depthwire.runtime.target import Target
    from depthwire.stages import Stages

    Window = Mapping[str, NDArray[np.generic]]
    Model = str | Path | torch.nn.Module | Program
    Examples = Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...] | None


def capture_stage(source: Model, recipe: Recipe, stages: Stages, examples: Examples = None) -> Program:
    """Capture the source with the recipe's shapes; a ``Program`` is taken as it is."""
    label = str(source) if isinstance(source, (str, Path)) else type(source).__name__
    with stages.stage("capture", label) as stage:
        from depthwire.export.capture import capture
        from depthwire.program import Program

        options = recipe.source.model_dump(exclude={"reference"})
        if recipe.precision.kind != "fp32" and isinstance(source, (str, Path)) and Path(source).suffix != ".pt2":
            # The graph's dtypes are decided behind the passes, from fp32: a checkpoint's storage is not its arithmetic.
            options["dtype"] = options["dtype"] or "fp32"
        if isinstance(source, Program):
            _refuse_source_options(recipe)
            program = source
        else:
            program = capture(source, example_inputs=examples, **options)
        stage.bytes = program.weight_bytes
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in program.example_inputs.items())
        stage.detail = f"{program.source.model or label}, {shapes}"
        return program


def _refuse_source_options(recipe: Recipe) -> None:
    given = recipe.source.model_dump(exclude={"reference"}, exclude_defaults=True)
    if given:
        raise UsageError(
            "recipe.captured-already",
            "A captured program cannot be captured again",
            at=", ".join(f"source.{name}" for name in given),
            want="no option of the recipe's source section",
            got=", ".join(f"{name}={value}" for name, value in given.items()),
            todo="Give these options to 'capture', which made the program.",
        )


@dataclass(frozen=True)
class Variant:
    """A routed model at a further capacity: its routing, the program to export, and what that must compute."""

    route: RouteParts
    program: Program
    reference: Program
    deployed: Deployed | None = None

    @property
    def written(self) -> Program:
        """The program to translate."""
        return self.program if self.deployed is None else self.deployed.program


@dataclass(frozen=True)
class Rewritten:
    """What the rewrite stage hands on.

    Attributes:
        program: The rewritten program.
        structure: ``ResidualStream.as_dict()`` of the canonical one; ``None`` without a stream.
        checkpoints: The values at which layers are compared.
        reference: What the compiled model must compute: the original, or, where layers are routed, the program with
            the routing alone.
        route: What is routed; ``None`` if nothing is.
        variants: The same at further capacities.
        deployed: What is written in place of ``program``, where another precision than fp32 was asked for.
    """

    program: Program
    structure: dict[str, Any] | None
    checkpoints: list[Checkpoint]
    reference: Program
    route: RouteParts | None = None
    variants: tuple[Variant, ...] = ()
    deployed: Deployed | None = None

    @property
    def written(self) -> Program:
        """The program to translate."""
        return self.program if self.deployed is None else self.deployed.program


def rewrite_stage(program: Program, recipe: Recipe, target: Target | None, stages: Stages) -> Rewritten:
    """Run the recipe's passes.

    Args:
        program: The captured program.
        recipe: What is lifted, and how reads are executed.
        target: Says whether attention stays one operator. Without one, as a program to train wants it, it does, and
            the reads stay single operators whose queries are parameters.
        stages: Where the stage is recorded.

    Raises:
        PassError: The structure of the model does not allow what the recipe asks for.
    """
    with stages.stage("rewrite", recipe.attn_res or "no lift") as stage:
        from depthwire.export.checkpoints import checkpoints
        from depthwire.passes._pipeline import Pipeline
        from depthwire.passes.route_tokens import RouteTokens
        from depthwire.passes.standard import canonical_pipeline, standard_pipeline

        front = canonical_pipeline()
        canonical = front.run(program, progress=stage.update)
        route = route_of(recipe.route, program, canonical)

        def passes_with(parts: RouteParts | None) -> tuple[Pass, ...]:
            return standard_pipeline(
                attn_res=recipe.attn_res,
                correction=recipe.correction,
                queries=recipe.queries,
                attention="op" if target is None else target.attention,
                collapse=recipe.collapse_zero_queries,
                route=parts,
                schedule=None if target is None else recipe.schedule,
            ).passes

        passes = passes_with(route)
        # The structure shows in the canonical program alone: stop there on the way, instead of going there twice.
        count = len(front.passes)
        if passes[:count] != front.passes:
            raise InternalError(
                "pass.order",
                "The standard passes do not start with the canonical ones",
                at="depthwire.passes.standard",
                want=", ".join(step.name for step in front.passes),
                got=", ".join(step.name for step in passes[:count]),
                todo="Report this.",
            )
        stream = _stream(canonical)
        routed = next((index for index, step in enumerate(passes) if isinstance(step, RouteTokens)), count - 1)
        reference = Pipeline(passes[count : routed + 1]).run(canonical, progress=stage.update)
        rewritten = Pipeline(passes[max(count, routed + 1) :]).run(reference, progress=stage.update)
        done = [f"{record.name} {record.rewrites}" for record in rewritten.history if record.rewrites]
        stage.detail = ": ".join(part for part in (stage.detail, ", ".join(done)) if part)
        structure = None if stream is None else stream.as_dict()
        kept = program if route is None else reference
        variants = []
        for parts in () if target is None else variants_of(recipe.route, route):
            steps = passes_with(parts)
            other = Pipeline(steps[count : routed + 1]).run(canonical, progress=stage.update)
            variants.append(Variant(parts, Pipeline(steps[routed + 1 :]).run(other, progress=stage.update), other))
        return Rewritten(rewritten, structure, checkpoints(canonical, stream), kept, route, tuple(variants))


def _stream(canonical: Program) -> ResidualStream | None:
    from depthwire.passes.analysis.residual_stream import find_residual_stream

    try:
        return find_residual_stream(canonical)
    except PassError:
        return None  # a model without a stream converts as it is; a lift would have named the reason itself


def source_dict(program: Program) -> dict[str, Any]:
    """Return where a program came from as JSON-ready values."""
    from depthwire.export.write import source_info

    return source_info(program).model_dump(mode="json")


def passes_list(program: Program) -> list[dict[str, Any]]:
    """Return what the passes did as JSON-ready values."""
    from depthwire.export.write import pass_infos

    return [info.model_dump(mode="json") for info in pass_infos(program)]


def recorded_recipe(artifact: Artifact) -> Recipe:
    """Return the recipe that an artefact was made with.

    Raises:
        ExportError: ``artifact.recipe``.
    """
    try:
        return Recipe.model_validate(artifact.manifest.recipe)
    except ValidationError as error:
        raise ExportError(
            "artifact.recipe",
            "The artefact's recipe cannot be read",
            at=str(artifact.root / MANIFEST),
            want="a recipe that this version understands",
            got=str(error).splitlines()[0],
            todo="Convert the model again; 'depthwire verify --goldens-only' needs no recipe.",
        ) from error


def window_bytes(program: Program) -> int:
    """Return the bytes of one window's inputs and outputs."""
    nodes = {node.name: node for node in program.exported.graph.nodes}
    values = [nodes[name].meta["val"] for name in (*program.input_names, *program.output_nodes)]
    return sum(int(value.numel()) * int(value.element_size()) for value in values)


def make_windows(program: Program, recipe: Recipe, count: int) -> Sequence[Window]:
    """Return inputs to compare on: from the recipe's text, all of its file, or random.

    Args:
        program: The captured program.
        recipe: ``goldens`` decides where they come from.
        count: How many; a file of inputs gives as many as it holds.
    """
    from depthwire.export.inputs import load_inputs, random_inputs, text_windows

    goldens = recipe.goldens
    if goldens.inputs is not None:
        return load_inputs(program, goldens.inputs)
    if goldens.text is not None:
        return text_windows(program, goldens.text, count=count)
    return random_inputs(program, count=count, seed=goldens.seed)


def precise(
    original: Program, rewritten: Rewritten, recipe: Recipe, *, target: Target, count: int, stages: Stages
) -> tuple[Sequence[Window], Rewritten]:
    """Make the windows to compare on, and bring the programs to the precision asked for.

    Args:
        original: The captured program.
        rewritten: What the passes made of it.
        recipe: The windows' origin, and the precision.
        target: What the graph is for.
        count: Windows to compare on; a file of inputs gives as many as it holds.
        stages: Where the stages are recorded.
    """
    from depthwire._precision import calibration_count, calibration_windows, precision_stage

    spare = calibration_count(recipe)
    windows = make_windows(original, recipe, count + spare)
    if recipe.precision.kind == "fp32":
        return windows, rewritten
    kept = windows[: len(windows) - spare]
    measured, origin = calibration_windows(original, recipe, windows[len(kept) :] or windows)
    return kept, precision_stage(rewritten, recipe, target, measured, origin=origin, stages=stages)


def inspect(source: Model, recipe: Recipe, stages: Stages, examples: Examples) -> Inspection:
    """See ``depthwire.api.inspect``."""
    if isinstance(source, (str, Path)) and (Path(source) / MANIFEST).is_file():
        with stages.stage("load", str(source)) as stage:
            artifact = Artifact.load(source)
            stage.bytes = sum(entry.bytes for entry in artifact.manifest.files.values())
            from depthwire.runtime.accounting import account_graphs

            compute = account_graphs(artifact) or None
        return Inspection(artifact.manifest.source.model_dump(mode="json"), artifact=artifact, compute=compute)
    program = capture_stage(source, recipe, stages, examples)
    with stages.stage("analyze") as stage:
        from depthwire.passes.analysis.reads import describe_reads
        from depthwire.passes.analysis.residual_stream import find_residual_stream
        from depthwire.passes.recognize_attn_res import RecognizeAttnRes
        from depthwire.passes.standard import canonical_pipeline

        canonical = canonical_pipeline().run(program, progress=stage.update)
        reads = describe_reads(RecognizeAttnRes().run(canonical).program.exported.graph)
        if reads:  # then there is no residual stream: what it was made of is read by attention
            stage.detail = f"{len(reads)} AttnRes reads of up to {max(len(read['sources']) for read in reads)} sources"
            return Inspection(source_dict(program), reads=reads)
        structure = find_residual_stream(canonical).as_dict()
        stage.detail = f"{len(structure['sublayers'])} sublayers, {len(structure['breaks'])} breaks"
    return Inspection(source_dict(program), structure=structure)


def explain(source: Model, recipe: Recipe, stages: Stages, examples: Examples) -> Explanation:
    """See ``depthwire.api.explain``."""
    from depthwire.runtime.target import load_target

    program = capture_stage(source, recipe, stages, examples)
    rewritten = rewrite_stage(program, recipe, load_target(recipe.target), stages)
    return Explanation(source_dict(program), passes_list(rewritten.program))


def rewrite(source: Model, recipe: Recipe, stages: Stages, out: Path | None, examples: Examples) -> Program:
    """See ``depthwire.api.rewrite``."""
    if out is not None:
        check_file(out, ".pt2")
    program = rewrite_stage(capture_stage(source, recipe, stages, examples), recipe, None, stages).program
    if out is not None:
        with stages.stage("write", str(out)) as stage:
            stage.bytes = _save(program, out)
    return program


def _save(program: Program, out: Path) -> int:
    """Write a ``.pt2`` under a temporary name beside its place, then rename; return its bytes."""
    needed = program.weight_bytes
    require_space(out, needed)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.pt2")
    try:
        with disk_full_as_error(out, needed):
            program.save(temporary)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return out.stat().st_size
