"""Prove an artefact: the original in torch, the rewritten program in torch and the file in ONNX Runtime, compared.

Polygraphy runs the three; Depthwire judges (``compare``, one table of tolerances). Runners are active one after the
other, so the torch weights and the session are never both held by us, and windows go through in groups, so that the
outputs held at a time stay below ``_windows.RESULT_BYTES``.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from itertools import combinations
from typing import TYPE_CHECKING, Any

from depthwire.errors import BuildError, DepthwireError
from depthwire.runtime._goldens import Goldens
from depthwire.runtime._judge import Judged, output_kinds
from depthwire.runtime._reproduce import write_reproduction
from depthwire.runtime._windows import window_feeds, window_groups
from depthwire.runtime.tolerances import QUANTIZED
from depthwire.runtime.verify_format import format_report
from depthwire.runtime.verify_report import Divergence, PairResult, VerifyReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from depthwire.artifact import Artifact
    from depthwire.program import Program

    Arrays = Mapping[str, NDArray[Any]]

__all__ = ["VerifyReport", "format_report", "verify"]

ORIGINAL, ROUTED, REWRITTEN, DEPLOYED = "original", "routed", "rewritten", "deployed"
ONNXRUNTIME, GOLDENS = "onnxruntime", "goldens"
_NUMPY = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def verify(
    artifact: Artifact,
    *,
    original: Program | None,
    rewritten: Program | None,
    windows: Sequence[Arrays],
    progress: Callable[[str], None] | None = None,
    kernels: bool | None = None,
    deployed: Program | None = None,
    file: bool = True,
) -> VerifyReport:
    """Compare what an artefact computes with what it was made from.

    With both programs: original with rewritten, rewritten with ONNX Runtime, and original with ONNX Runtime. With one:
    that one with ONNX Runtime. With none: the artefact's own goldens with ONNX Runtime, on their inputs. A failed
    comparison is walked down to its first differing layer. Writes ``verify/inputs.json`` and ``verify/outputs.json``
    into the artefact.

    Args:
        artifact: The artefact.
        original: The captured program, before any pass; for a model that was told to route, with its routing.
        rewritten: The program that was exported.
        windows: Inputs, each by name with the shape and dtype of the manifest. Empty if no program is given.
        progress: Receives one line per step.
        kernels: As in ``session_from_artifact``; which of the two ran is in the report.
        deployed: The fp32 twin of what was exported, where that is another precision; the artefact is then a twin, too.
        file: Whether ONNX Runtime runs the artefact's graph; without it the programs are compared with each other.

    Returns:
        The report. A comparison that fails is in it; it is not raised.

    Raises:
        UsageError: The windows do not fit the artefact, or there is nothing to compare with.
        BuildError: A runner cannot run at all.
        ExportError: The goldens are unusable, or the artefact cannot be written to.
    """
    started, tell = time.perf_counter(), progress or _silent
    # What must be computed is the original, or, where the user had layers routed, the original with that routing alone.
    chosen = artifact.manifest.route is not None and artifact.manifest.route.spec is not None
    first = ROUTED if chosen else ORIGINAL
    labelled = ((first, original), (REWRITTEN, rewritten), (DEPLOYED, deployed))
    programs = {name: p for name, p in labelled if p is not None}
    goldens = None if programs else Goldens(artifact)
    feeds = window_feeds(artifact, windows, goldens)
    labels = [*(programs or [GOLDENS]), *([ONNXRUNTIME] if file else [])]
    kinds = output_kinds(artifact.manifest)
    # Goldens hold what half precision made of the values; everything else that is compared computes as the file does.
    precision = artifact.manifest.precision
    rounded = None
    if goldens is not None and precision is not None:
        rounded = QUANTIZED if precision.asked == "int8" else _NUMPY[precision.rest]
    judged: dict[tuple[str, str], Judged] = {pair: Judged() for pair in _pairs(labels)}
    polygraphy = ""
    for group in window_groups(artifact, feeds, len(labels)):
        tell(f"windows {group[0] + 1}-{group[-1] + 1} of {len(feeds)}: {', '.join(labels)}")
        outputs = _run(artifact, programs, [feeds[index] for index in group], kernels=kernels, file=file)
        if goldens is not None:
            outputs[GOLDENS] = [goldens.outputs(index) for index in group]
        for (expected, actual), results in judged.items():
            chosen_feeds = [feeds[i] for i in group]
            results.add(outputs[expected], outputs[actual], chosen_feeds, kinds, artifact.manifest, rounded=rounded)
        if not polygraphy and file:
            reference = outputs[labels[0]][0]
            tell("files for polygraphy")
            polygraphy = write_reproduction(artifact, inputs=feeds[0], expected=reference, kinds=kinds, label=labels[0])
    pairs = tuple(results.pair(names, len(feeds)) for names, results in judged.items())
    return VerifyReport(
        comparisons=pairs,
        first_divergence=_place(artifact, programs, pairs, feeds, tell, kernels=kernels, file=file),
        polygraphy=polygraphy,
        windows=len(feeds),
        seconds=time.perf_counter() - started,
        tools={name: version(name) for name in ("torch", "polygraphy", "numpy")}
        | (_runtime(artifact, kernels=kernels) if file else {}),
    )


def _run(
    artifact: Artifact, programs: Mapping[str, Program], feeds: Sequence[Arrays], *, kernels: bool | None, file: bool
) -> dict[str, list[Arrays]]:
    """Run every runner on the windows, one runner at a time, through Polygraphy."""
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    from depthwire.runtime.onnxruntime import session_from_artifact
    from depthwire.runtime.torch_exported import TorchExportedRunner

    runners = [TorchExportedRunner(program, name=label) for label, program in programs.items()]
    if file:
        runners.append(OnnxrtRunner(lambda: session_from_artifact(artifact, kernels=kernels), name=ONNXRUNTIME))
    try:
        # Above CRITICAL: what Polygraphy would print and raise is told once, by the error below.
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            results = Comparator.run(runners, data_loader=[dict(feed) for feed in feeds])
    except DepthwireError:
        raise
    except Exception as error:
        raise BuildError(
            "verify.run-failed",
            "A runner failed on the windows",
            at=f"{artifact.model} ({', '.join(runner.name for runner in runners)})",
            want="an inference of every runner on every window",
            got=f"{type(error).__name__}: {error}",
            todo="Check that the artefact opens ('depthwire inspect') and that the windows fit its inputs.",
        ) from error
    outputs: dict[str, list[Arrays]] = {}
    route = artifact.manifest.route
    carried = None if route is None else route.states_out  # the file's alone: programs have no such output
    for label, iterations in results.items():
        outputs[label] = [{name: item for name, item in each.items() if name != carried} for each in iterations]
    return outputs


def _pairs(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Neighbours first, in the order of the compiler, then end to end."""
    pairs = list(combinations(labels, 2))
    return sorted(pairs, key=lambda pair: labels.index(pair[1]) - labels.index(pair[0]))


def _place(
    artifact: Artifact,
    programs: Mapping[str, Program],
    pairs: Sequence[PairResult],
    feeds: Sequence[Arrays],
    tell: Callable[[str], None],
    *,
    kernels: bool | None,
    file: bool,
) -> Divergence | None:
    failed = [pair for pair in pairs if not pair]
    if not failed:
        return None
    window = min((p.first_failed for p in failed if p.first_failed is not None), default=0)
    if not programs:
        note = "Goldens hold outputs only: give the source model to find the layer."
        return Divergence(None, note, window, 0, len(artifact.manifest.checkpoints), ())
    from depthwire.runtime._localize import first_divergence

    return first_divergence(artifact, programs, feeds[window], window=window, tell=tell, kernels=kernels, file=file)


def _runtime(artifact: Artifact, *, kernels: bool | None) -> dict[str, str]:
    import onnxruntime

    from depthwire.runtime.onnxruntime import operators_run_by

    ran_by = operators_run_by(artifact, kernels=kernels)
    return {"onnxruntime": str(onnxruntime.__version__)} | ({} if ran_by is None else {"operators by": ran_by})


def _silent(_: str) -> None:
    return None
