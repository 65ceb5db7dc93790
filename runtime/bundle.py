"""Writes a device bundle: everything that a device needs to build an engine, prove it and measure it, without us.

::

    out/
      bundle.json              ``deploy.manifest.Bundle``: what the device must be; names and hashes every other file
      model.onnx  model.onnx.data   the graph in the form that the target's TensorRT reads, and its weights
      goldens/<graph>/*.npy    inputs and expected outputs
      build_and_verify.py lib/ the script and its modules; plugins/ where the form is ``plugin``
      README.md
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from depthwire._hash import sha256_file
from depthwire._whole import put_in_place, temporary_sibling
from depthwire.artifact import GOLDENS, MODEL, WEIGHTS
from depthwire.errors import UsageError
from depthwire.runtime._bundle_folder import check_bundle_out, list_files
from depthwire.runtime._bundle_goldens import ONNX_RUNTIME, TORCH, TWIN, outputs_of, write_goldens
from depthwire.runtime._bundle_graph import Graph, check_graph, expose_routing, graphs_of, write_plugin_form
from depthwire.runtime._bundle_platform import (
    builder_options,
    form_of,
    platform_of,
    require_target,
    with_flavour,
)
from depthwire.runtime._bundle_proxy import parse_as_proxy
from depthwire.runtime._bundle_readme import readme
from depthwire.runtime._bundle_script import write_script
from depthwire.runtime._onnx_lower import lower
from depthwire.runtime.deploy.manifest import (
    BUNDLE,
    SCHEMA_VERSION,
    ArtifactId,
    Bundle,
    LatencyProtocol,
    Model,
    Tensor,
    encode,
)
from depthwire.runtime.footprint import own_precision, read_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from depthwire.artifact import Artifact
    from depthwire.runtime.footprint import Footprint
    from depthwire.runtime.target import Target

__all__ = ["LATENCY_RUNS", "BundleInfo", "BundleOptions", "artifact_id", "check_bundle_out", "write_bundle"]

LATENCY_RUNS = 200
_WORK = "work"  # what the script wrote there, engines among it, belongs to the newer bundle too
_WARMUP_RUNS, _WARMUP_SECONDS = 20, 1.0


@dataclass(frozen=True)
class BundleInfo:
    """A bundle that was written.

    Attributes:
        root: Its directory.
        sha256: Of its ``bundle.json``.
        bytes: Of all its files.
        bundle: Its manifest.
    """

    root: Path
    sha256: str
    bytes: int
    bundle: Bundle

    def as_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {"root": str(self.root), "sha256": self.sha256, "bytes": self.bytes, **asdict(self.bundle)}


@dataclass(frozen=True)
class BundleOptions:
    """What may be chosen of a bundle.

    Attributes:
        form: ``function`` or ``plugin``; the target's when ``None``.
        flavour: ``tensorrt`` or ``tensorrt_rtx``; the target's when ``None``.
        capacities: Of the graphs to bundle; all when empty.
        latency_runs: Runs that are counted.
        workspace_bytes: Limit of the builder's workspace; the target's when ``None``.
        optimization_level: 0 to 5; the target's when ``None``.
    """

    form: str | None = None
    flavour: str | None = None
    capacities: tuple[str, ...] = ()
    latency_runs: int = LATENCY_RUNS
    workspace_bytes: int | None = None
    optimization_level: int | None = None


def write_bundle(
    artifact: Artifact,
    target: Target,
    out: Path,
    options: BundleOptions | None = None,
    *,
    progress: Callable[[str], None] | None = None,
) -> BundleInfo:
    """Write the bundle of an artefact for a target; a directory that is there is replaced when the new one is whole.

    Args:
        artifact: The artefact.
        target: For which device.
        out: The directory (``check_bundle_out`` says whether it may be written).
        options: What may be chosen.
        progress: Called with the name of each step.

    Raises:
        UsageError: Nothing is built for the target, or an option does not fit it.
        BuildError: The model does not fit the device.
        ParityError: The graph, in the form it would travel in, does not compute the goldens (``bundle.self-check``).
    """
    options, notes = options or BundleOptions(), list(target.notes)
    _require_runs(options.latency_runs)
    say = progress or (lambda _step: None)
    target = with_flavour(target, options.flavour)
    form = form_of(target, options.form, artifact.manifest.custom_ops)
    chosen = graphs_of(artifact, options.capacities)
    needs = [require_target(artifact.with_graph(graph.file), target) for graph in chosen]
    with temporary_sibling(out) as root:
        # A copy, not a hard link: onnx.checker refuses weights that have two names, the artefact's own from then on.
        shutil.copyfile(artifact.path(WEIGHTS), root / WEIGHTS)
        models = []
        for graph, footprint in zip(chosen, needs, strict=True):
            written, done = _write_model(_Place(artifact, target, root, form, say), graph, footprint)
            models.append(written)
            notes += [f"{graph.file}: {note}" for note in done]
        say("script")
        write_script(root)
        bundle = Bundle(
            schema_version=SCHEMA_VERSION,
            depthwire=artifact.manifest.depthwire,
            target=target.name,
            title=target.title,
            artifact=artifact_id(artifact),
            platform=platform_of(target),
            form=form,
            precision=_precision(artifact),
            task=artifact.manifest.source.task,
            builder=builder_options(
                target,
                workspace_bytes=options.workspace_bytes,
                optimization_level=options.optimization_level,
                disk_bytes=_disk(models),
            ),
            models=tuple(models),
            latency=LatencyProtocol(_WARMUP_RUNS, _WARMUP_SECONDS, options.latency_runs),
            proxies=tuple(parse_as_proxy(root / model.file, model.file) for model in models),
            notes=(*notes, *target.unconfirmed),
            files={},
        )
        (root / "README.md").write_text(readme(bundle), encoding="utf-8")
        say("hashes")
        bundle.files.update(list_files(root))
        (root / BUNDLE).write_text(encode(bundle), encoding="utf-8")
        put_in_place(root, out, keep=_WORK)
    size = sum(entry.bytes for entry in bundle.files.values())
    return BundleInfo(out, sha256_file(out / BUNDLE), size, bundle)


def artifact_id(artifact: Artifact) -> ArtifactId:
    """Return what tells an artefact from every other: its graphs, weights and goldens, by hash."""
    lasting = {name: entry.sha256 for name, entry in artifact.manifest.files.items() if "/" not in name}
    files = {name: sha for name, sha in sorted(lasting.items()) if name.endswith((".onnx", ".data")) or name == GOLDENS}
    return ArtifactId(artifact.manifest.created, files)


def _require_runs(runs: int) -> None:
    if runs < 1:
        raise UsageError(
            "bundle.latency-runs",
            "Latency cannot be measured with this number of runs",
            at="--latency-runs",
            want="1 or more",
            got=str(runs),
            todo=f"Leave it out for {LATENCY_RUNS}, or run the script with --skip-latency.",
        )


@dataclass(frozen=True)
class _Place:
    """What every model of a bundle is written with."""

    artifact: Artifact
    target: Target
    root: Path
    form: str
    say: Callable[[str], None]


def _write_model(place: _Place, graph: Graph, needs: Footprint) -> tuple[Model, tuple[str, ...]]:
    """Write one graph with its goldens and plugins; return what was done to it, too."""
    import onnx

    artifact, target, root = place.artifact, place.target, place.root
    place.say(f"graph {graph.file}")
    proto = onnx.load(str(artifact.path(graph.file)), load_external_data=False)
    routing = expose_routing(proto, graph)
    # The builders behind some parsers die of an Attention that the parser reads.
    unwanted = ("Attention",) if target.attention == "decomposed" else ()
    lowered = lower(
        proto,
        missing={*target.operators_missing, *unwanted},
        expand_functions=target.expand_functions,
        parser_opset=target.parser_opset,
    )
    stem = graph.file.removesuffix(".onnx")
    (root / graph.file).write_bytes(lowered.model.SerializeToString(deterministic=True))
    check_graph(root / graph.file)
    plugins = None
    if place.form == "plugin":
        place.say(f"plugins of {graph.file}")
        plugins = write_plugin_form(lowered.model, root / graph.file, target)
    inputs = tuple(Tensor(info.name, tuple(info.shape), info.dtype) for info in artifact.manifest.inputs)
    runtime = ONNX_RUNTIME if artifact.manifest.precision is None else TWIN
    place.say(f"goldens of {graph.file}")
    model = Model(
        file=graph.file,
        engine=f"{stem}.engine",
        plugins=plugins,
        capacity=graph.capacity,
        opset=next(entry.version for entry in lowered.model.opset_import if entry.domain == ""),
        inputs=inputs,
        outputs=outputs_of(artifact),
        routing=routing,
        windows=0,
        goldens=f"goldens/{stem}",
        reference=TORCH if graph.file == MODEL else runtime,
        routing_reference=runtime if routing else "nothing is routed",
        weight_bytes=needs.weight_bytes,
        predicted_bytes=needs.build_bytes,
    )
    return write_goldens(artifact, model, root), lowered.notes


def _precision(artifact: Artifact) -> str:
    precision = artifact.manifest.precision
    return own_precision(read_model(artifact.model)) if precision is None else precision.asked


def _disk(models: Sequence[Model]) -> int:
    # Engines are about as large as their weights; each is written beside the one it replaces; outputs are small.
    return sum(model.weight_bytes for model in models) * 2 + 256 * 2**20
