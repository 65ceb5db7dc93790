"""The verbs as functions: what ``depthwire VERB`` does, without the printing.

Options are those of ``depthwire.recipe.OPTIONS``; every function that takes ``**options`` also takes ``recipe=``, a
``Recipe`` or the path of a YAML file, over which the options win. ``stages=`` takes a ``Stages`` that records what ran.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from depthwire._device_verbs import build, bundle, kernels, run_bundle, verify_result
from depthwire._options import Options, combine
from depthwire._results import DryRun, Explanation, Inspection, Result, VerificationError
from depthwire.errors import UsageError
from depthwire.stages import Stages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from typing_extensions import Unpack

    from depthwire._flow import Model
    from depthwire._plan import Plan
    from depthwire.artifact import Artifact
    from depthwire.program import Program
    from depthwire.recipe import Recipe
    from depthwire.runtime.doctor import Finding
    from depthwire.runtime.target import Target
    from depthwire.runtime.verify_report import VerifyReport

__all__ = [
    "DryRun",
    "Explanation",
    "Inspection",
    "Options",
    "Result",
    "VerificationError",
    "build",
    "bundle",
    "capture",
    "convert",
    "doctor",
    "dry_run",
    "explain",
    "export",
    "inspect",
    "kernels",
    "plan",
    "rewrite",
    "run_bundle",
    "targets",
    "verify",
    "verify_result",
]


def capture(
    source: Model | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    stages: Stages | None = None,
    example_inputs: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
    **options: Unpack[Options],
) -> Program:
    """Capture a model with static shapes.

    Args:
        source: A Hugging Face directory or cached id, ``package.module:factory``, a ``.pt2`` file or an ``nn.Module``.
        recipe: See the module's text.
        stages: See the module's text.
        example_inputs: Inputs of an ``nn.Module``; they fix the shapes.
        **options: Those of the recipe's ``source`` section.

    Raises:
        UsageError: An option cannot be meant.
        CaptureError: The model cannot be loaded, is unsafe to load, or ``torch.export`` refuses it.
    """
    from depthwire import _flow

    model, resolved = combine(source, None, recipe, options)
    return _flow.capture_stage(model, resolved, stages or Stages(), example_inputs)


def inspect(
    source: Model | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    stages: Stages | None = None,
    example_inputs: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
    depth_weights: bool = False,
    routing: bool = False,
    out: str | Path | None = None,
    **options: Unpack[Options],
) -> Inspection:
    """Return the residual stream of a model, the depth weights of its reads, or the manifest of an artefact.

    Args:
        source: A model as for ``capture``, a ``Program``, or the directory of an artefact.
        recipe: See the module's text.
        stages: See the module's text.
        example_inputs: Inputs of an ``nn.Module``.
        depth_weights: Run an AttnRes model on ``text`` or ``inputs`` and return, instead of the structure, the mean
            weight of every source of every read.
        routing: Run a routed model (or one that the ``route`` options route) on ``text`` or ``inputs`` and return which
            layer computes which token.
        out: Directory for ``report.json`` and the pictures of either.
        **options: Those of the recipe's ``source`` section; ``text``, ``inputs`` and ``windows`` for depth weights and
            routing.

    Raises:
        UsageError: An option cannot be meant, or the model does not read the depth.
        CaptureError: The model cannot be captured.
        PassError: The model has no residual stream.
        ExportError: The artefact is damaged.
    """
    from depthwire import _flow

    model, resolved = combine(source, None, recipe, options)
    if depth_weights and routing:
        raise UsageError(
            "capture.option-without-effect",
            "an inspection shows depth weights or the routing",
            at="routing",
            want="one of depth_weights and routing",
            got="both",
            todo="Inspect twice.",
        )
    if depth_weights or routing:
        from depthwire._depth_weights import inspect_depth_weights
        from depthwire._routing_map import inspect_routing

        look = inspect_routing if routing else inspect_depth_weights
        return look(model, resolved, stages or Stages(), example_inputs, None if out is None else Path(out))
    if out is not None:
        raise UsageError(
            "capture.option-without-effect",
            "only depth weights and routing are written to a directory",
            at="out",
            want="depth_weights=True, routing=True, or no 'out'",
            got=str(out),
            todo="Leave it out.",
        )
    return _flow.inspect(model, resolved, stages or Stages(), example_inputs)


def explain(
    source: Model | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    stages: Stages | None = None,
    example_inputs: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
    **options: Unpack[Options],
) -> Explanation:
    """Capture and rewrite a model in memory and say what each pass did, and what it left alone and why.

    Args:
        source: A model as for ``capture``, or a ``Program``.
        recipe: See the module's text.
        stages: See the module's text.
        example_inputs: Inputs of an ``nn.Module``.
        **options: As for ``convert``; those of the source, the rewrite and the target matter.

    Raises:
        UsageError: An option cannot be meant.
        CaptureError: The model cannot be captured.
        PassError: The structure of the model does not allow the rewrite.
    """
    from depthwire import _flow

    model, resolved = combine(source, None, recipe, options)
    return _flow.explain(model, resolved, stages or Stages(), example_inputs)


def rewrite(
    source: Model | None = None,
    out: str | Path | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    stages: Stages | None = None,
    example_inputs: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
    **options: Unpack[Options],
) -> Program:
    """Capture and rewrite a model; the result's queries are parameters of ``result.module()``.

    Args:
        source: A model as for ``capture``, or a ``Program``.
        out: A ``.pt2`` file to write (atomically) that ``convert`` and ``torch.export.load`` read.
        recipe: See the module's text.
        stages: See the module's text.
        example_inputs: Inputs of an ``nn.Module``.
        **options: Those of the recipe's ``source`` section, ``attn_res``, ``correction`` and ``queries``.

    Raises:
        UsageError: An option cannot be meant.
        CaptureError: The model cannot be captured.
        PassError: The structure of the model does not allow the rewrite.
        ExportError: The file cannot be written.
    """
    from depthwire import _flow

    model, resolved = combine(source, None, recipe, options)
    return _flow.rewrite(model, resolved, stages or Stages(), None if out is None else Path(out), example_inputs)


def export(
    source: Model | None = None,
    out: str | Path | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    stages: Stages | None = None,
    force: bool = False,
    example_inputs: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
    **options: Unpack[Options],
) -> Artifact:
    """Capture, rewrite and write the artefact, without verify and build.

    Args, errors: as ``convert``.
    """
    return convert(
        source,
        out,
        recipe=recipe,
        stages=stages,
        force=force,
        example_inputs=example_inputs,
        **{**options, "verify": False, "build": False},  # type: ignore[arg-type]
    ).artifact


def convert(
    source: Model | None = None,
    out: str | Path | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    stages: Stages | None = None,
    force: bool = False,
    example_inputs: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
    **options: Unpack[Options],
) -> Result:
    """Run all stages: capture, rewrite, goldens, export, verify, build, report.

    Nothing stays behind when a stage up to the export fails. When the comparison or the engine's build fails, the
    directory stays, its report marked as failed, and the error is raised.

    Args:
        source: A model as for ``capture``, or a ``Program``; the recipe's when absent.
        out: Directory to write: new, empty, or an artefact, which is replaced; the recipe's when absent.
        recipe: See the module's text.
        stages: See the module's text.
        force: Replace an artefact even if its manifest cannot be read.
        example_inputs: Inputs of an ``nn.Module``.
        **options: See ``Options``.

    Raises:
        UsageError: An option, the target or the output directory cannot be meant.
        CaptureError: The model cannot be captured.
        PassError: The structure of the model does not allow the rewrite.
        ExportError: The artefact cannot be written.
        ParityError: The written model computes something else.
        BuildError: The engine cannot be built.
    """
    from depthwire import _convert

    model, resolved = combine(source, out, recipe, options)
    return _convert.convert(model, resolved, stages or Stages(), force=force, examples=example_inputs)


def dry_run(
    source: Model | None = None,
    out: str | Path | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    stages: Stages | None = None,
    force: bool = False,
    example_inputs: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
    **options: Unpack[Options],
) -> DryRun:
    """Capture and rewrite in memory and say what ``convert`` would do; write nothing (``convert --dry-run``).

    Args, errors: as ``convert``; ``out`` may be absent.
    """
    from depthwire import _convert

    model, resolved = combine(source, out, recipe, options)
    return _convert.dry_run(model, resolved, stages or Stages(), force=force, examples=example_inputs)


def plan(
    directory: str | Path | Sequence[str | Path],
    *,
    target: str | Sequence[str] | None = None,
    stages: Stages | None = None,
) -> Plan:
    """Predict size and memory of an artefact's engines, for every capacity and precision; nothing is built.

    Args:
        directory: The artefact, or several: one for each bucket of shapes. Every hash is checked first.
        target: Where the engines are to run, one or several; each artefact's own target when absent.
        stages: See the module's text.

    Raises:
        UsageError: There is no such target.
        ExportError: An artefact is damaged.
        BuildError: A graph has shapes that are not static.
    """
    from depthwire import _plan

    directories = [directory] if isinstance(directory, (str, Path)) else directory
    targets = [target] if isinstance(target, str) else target or ()
    return _plan.plan([Path(each) for each in directories], targets, stages or Stages())


def verify(
    directory: str | Path,
    *,
    source: Model | None = None,
    text: str | Path | None = None,
    inputs: str | Path | None = None,
    windows: int | None = None,
    goldens_only: bool = False,
    stages: Stages | None = None,
) -> VerifyReport:
    """Compare an artefact with the model it came from, captured and rewritten again.

    Args:
        directory: The artefact; every hash is checked first.
        source: Where the model lies now; needed for an ``nn.Module``, else the recorded place.
        text: Text for the windows; the recorded one when absent.
        inputs: Inputs to compare on instead (``.safetensors`` or ``.npz``).
        windows: How many; the recorded number when absent.
        goldens_only: Compare with the stored outputs alone; needs no source.
        stages: See the module's text.

    Raises:
        UsageError: An option cannot be meant.
        ExportError: The artefact is damaged, or the source is not the one that was converted.
        CaptureError: The source cannot be captured again.
        ParityError: They differ; ``at`` names the first diverging layer.
    """
    from depthwire import _verify

    chosen = {"text": text, "inputs": inputs, "windows": windows}
    return _verify.verify(Path(directory), source, chosen, stages or Stages(), goldens_only=goldens_only)


def targets() -> list[Target]:
    """Return every target that can be built for."""
    from depthwire.runtime.target import list_targets

    return list_targets()


def doctor(*, deep: bool = False) -> list[Finding]:
    """Return what is installed, what is missing, and the command that gets it.

    Args:
        deep: Import every package (some seconds each), instead of reading its metadata only.
    """
    from depthwire.runtime.doctor import diagnose

    return diagnose(deep=deep)
