"""``plan``: how large the engines of artefacts will be, what memory they take, and whether a target has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from depthwire.artifact import MODEL, Artifact

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from depthwire.artifact import TensorInfo
    from depthwire.runtime.footprint import Footprint, ModelFacts
    from depthwire.runtime.target import Target
    from depthwire.stages import Stages


@dataclass(frozen=True)
class Row:
    """One graph in one precision on one target.

    Attributes:
        needs: What it takes.
        problems: Why it does not fit; nothing where it does.
    """

    needs: Footprint
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {**self.needs.as_dict(), "fits": not self.problems, "problems": list(self.problems)}


@dataclass(frozen=True)
class TargetPlan:
    """One graph on one target.

    Attributes:
        target: The target.
        rows: The graph's own precision first, then those that a new conversion could give it.
    """

    target: Target
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "target": self.target.name,
            "memory_bytes": self.target.memory_bytes,
            "reserved_bytes": self.target.reserved_bytes,
            "precisions": [row.as_dict() for row in self.rows],
        }


@dataclass(frozen=True)
class Measured:
    """What was measured of an engine that was built, beside what is predicted of it; bytes, ``None`` where unknown.

    Attributes:
        target: Name of the target.
        source: ``manifest`` for an engine built here, else the file with the device's result.
        graph: The ONNX file that it was built from.
        engine_bytes: Its size.
        predicted_engine_bytes: The size that this plan predicts.
        build_bytes: Peak resident set of the builder's process.
        predicted_build_bytes: What was predicted of it before the build.
        activation_bytes: Memory that the engine asks for beside its weights, where it was loaded.
        predicted_activation_bytes: The peak of the graph's values.
    """

    target: str
    source: str
    graph: str
    engine_bytes: int
    predicted_engine_bytes: int | None
    build_bytes: int | None
    predicted_build_bytes: int | None
    activation_bytes: int | None
    predicted_activation_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return dict(vars(self))


@dataclass(frozen=True)
class GraphPlan:
    """One graph of an artefact: one capacity.

    Attributes:
        file: Its name.
        capacity: Share of the tokens that routed layers compute, ``None`` where nothing is routed.
        facts: What was read from it.
        targets: What it takes where.
    """

    file: str
    capacity: str | None
    facts: ModelFacts
    targets: tuple[TargetPlan, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "graph": self.file,
            "capacity": self.capacity,
            "weight_bytes": self.facts.weights.stored,
            "targets": [target.as_dict() for target in self.targets],
        }


@dataclass(frozen=True)
class ArtifactPlan:
    """One artefact: one bucket of shapes.

    Attributes:
        directory: Where it lies.
        bucket: Its inputs with their static shapes.
        graphs: One for each capacity, ``model.onnx`` first.
        measured: Engines that were built from it.
    """

    directory: Path
    bucket: str
    graphs: tuple[GraphPlan, ...]
    measured: tuple[Measured, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "directory": str(self.directory),
            "bucket": self.bucket,
            "graphs": [graph.as_dict() for graph in self.graphs],
            "measured": [each.as_dict() for each in self.measured],
        }


@dataclass(frozen=True)
class Plan:
    """What ``plan`` found.

    Attributes:
        artifacts: In the order given.
    """

    artifacts: tuple[ArtifactPlan, ...]

    @property
    def fits(self) -> bool:
        """Whether every graph, as it is, fits every target that was asked for."""
        rows = (target.rows[0] for each in self.artifacts for graph in each.graphs for target in graph.targets)
        return not any(row.problems for row in rows)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {"fits": self.fits, "artifacts": [each.as_dict() for each in self.artifacts]}


def plan(directories: Sequence[Path], targets: Sequence[str], stages: Stages) -> Plan:
    """See ``depthwire.api.plan``."""
    from depthwire.runtime.target import load_target

    chosen = tuple(load_target(name) for name in dict.fromkeys(targets))
    found = []
    for directory in directories:
        with stages.stage("load", str(directory)) as stage:
            artifact = Artifact.load(directory)
            stage.bytes = sum(entry.bytes for entry in artifact.manifest.files.values())
        with stages.stage("plan", str(directory)):
            own = chosen or (load_target(str(artifact.manifest.recipe.get("target") or "rtx")),)
            found.append(_plan_artifact(artifact, own))
    return Plan(tuple(found))


def _plan_artifact(artifact: Artifact, targets: Sequence[Target]) -> ArtifactPlan:
    from depthwire.runtime.footprint import read_model

    route = artifact.manifest.route
    files = {graph.file: graph.capacity for graph in route.graphs} if route is not None else {MODEL: None}
    graphs = []
    for name, capacity in files.items():
        facts = read_model(artifact.path(name))
        graphs.append(GraphPlan(name, capacity, facts, tuple(_plan_target(facts, target) for target in targets)))
    measured = [*_built(artifact, graphs[0]), *_reported(artifact, {graph.file: graph for graph in graphs})]
    bucket = ", ".join(_shape(each) for each in artifact.manifest.inputs)
    return ArtifactPlan(artifact.root, bucket, tuple(graphs), tuple(measured))


def _plan_target(facts: ModelFacts, target: Target) -> TargetPlan:
    from depthwire.runtime.footprint import footprint, own_precision, problems
    from depthwire.runtime.target import Precision

    own = own_precision(facts)
    rows = []
    for precision in (own, *(each for each in get_args(Precision) if each != own)):
        if precision not in target.precisions and precision != own:
            continue
        needs = footprint(facts, target, precision)
        texts = [str(problem) for problem in problems(target, facts, needs)]
        if precision not in target.precisions:
            texts.insert(0, f"{precision} is no precision of target {target.name}")
        rows.append(Row(needs, tuple(texts)))
    return TargetPlan(target, tuple(rows))


def _built(artifact: Artifact, graph: GraphPlan) -> Iterator[Measured]:
    """Yield the engines that the manifest lists; they are built from the first graph."""
    from depthwire.runtime.footprint import footprint
    from depthwire.runtime.target import load_target

    for name, engine in artifact.manifest.engines.items():
        needs = footprint(graph.facts, load_target(name))
        yield Measured(
            target=name,
            source="manifest",
            graph=graph.file,
            engine_bytes=engine.bytes,
            predicted_engine_bytes=needs.engine_bytes,
            build_bytes=engine.peak_rss_bytes,
            predicted_build_bytes=engine.predicted_rss_bytes,
            activation_bytes=None,
            predicted_activation_bytes=needs.activation_bytes,
        )


def _reported(artifact: Artifact, graphs: Mapping[str, GraphPlan]) -> Iterator[Measured]:
    """Yield what devices have measured; ``verify --result`` has put it into the artefact."""
    from depthwire.runtime.device_result import read_result
    from depthwire.runtime.footprint import footprint
    from depthwire.runtime.target import load_target

    for name in sorted(artifact.manifest.files):
        if not name.startswith("engine/") or not name.endswith("/result.json"):
            continue
        result = read_result(artifact.path(name))
        ran = {each.model: (each.model_extra or {}).get("activation_bytes") for each in result.comparisons}
        for build in result.builds:
            if build.model not in graphs or build.bytes is None:
                continue
            needs = footprint(graphs[build.model].facts, load_target(result.target))
            yield Measured(
                target=result.target,
                source=name,
                graph=build.model,
                engine_bytes=build.bytes,
                predicted_engine_bytes=needs.engine_bytes,
                build_bytes=build.peak_rss_bytes,
                predicted_build_bytes=needs.build_bytes,
                activation_bytes=ran.get(build.model),
                predicted_activation_bytes=needs.activation_bytes,
            )


def _shape(tensor: TensorInfo) -> str:
    return f"{tensor.name} {tensor.shape}"
