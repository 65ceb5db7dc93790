"""What the verbs return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from depthwire.errors import ParityError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from depthwire.artifact import Artifact, EngineInfo
    from depthwire.recipe import Recipe
    from depthwire.runtime.verify_report import VerifyReport
    from depthwire.stages import Stages


@dataclass(frozen=True)
class Result:
    """What ``convert`` made.

    Attributes:
        artifact: The directory with its manifest.
        report: The content of ``report.json``.
        verdict: What ``verify`` found, ``None`` when it was left out.
        engine: Facts of the engine, ``None`` when none was built.
        stages: What ran, with seconds and memory.
    """

    artifact: Artifact
    report: Mapping[str, Any]
    verdict: VerifyReport | None
    engine: EngineInfo | None
    stages: Stages


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` found: the structure of a model, or an artefact.

    Attributes:
        source: What was inspected, JSON-ready.
        structure: ``ResidualStream.as_dict()``, or ``None`` for an artefact and for a model with AttnRes reads.
        reads: One entry per read of such a model: node, module, the module that takes it, sources, options.
        artifact: The artefact, or ``None`` for a model.
        depth_weights: ``DepthWeights.as_dict()``, if they were asked for.
        routing: ``RoutingMap.as_dict()``, if it was asked for.
        compute: Of a routed artefact: the work of every graph by layer (``runtime.accounting``).
    """

    source: Mapping[str, Any]
    structure: Mapping[str, Any] | None = None
    reads: Sequence[Mapping[str, Any]] | None = None
    artifact: Artifact | None = None
    depth_weights: Mapping[str, Any] | None = None
    routing: Mapping[str, Any] | None = None
    compute: Sequence[Mapping[str, Any]] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as JSON-ready values."""
        manifest = None if self.artifact is None else self.artifact.manifest.model_dump(mode="json")
        reads = None if self.reads is None else [dict(read) for read in self.reads]
        found = {"source": dict(self.source), "structure": self.structure, "reads": reads, "manifest": manifest}
        compute = None if self.compute is None else [*self.compute]
        more = {"depth_weights": self.depth_weights, "routing": self.routing, "compute": compute}
        return {**found, **{name: value for name, value in more.items() if value is not None}}


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found: each pass of a rewrite with what it did and what it left alone.

    Attributes:
        source: The model, JSON-ready.
        passes: One entry per pass in order: name, options, rewrites, declines (code, at, want, got), notes, seconds.
    """

    source: Mapping[str, Any]
    passes: Sequence[Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as JSON-ready values."""
        return {"source": dict(self.source), "passes": [dict(each) for each in self.passes]}


@dataclass(frozen=True)
class DryRun:
    """What ``convert`` would do.

    Attributes:
        recipe: The resolved recipe.
        source: The source, JSON-ready.
        target: Name, builder and opset of the target, and whether an engine would be built.
        structure: ``ResidualStream.as_dict()`` of the model, or ``None`` if it has no residual stream.
        passes: What each pass rewrote (in memory) and declined.
        bytes_by_part: Estimated bytes of the weights and goldens that would be written.
        free_bytes: Free bytes where they would go, ``None`` without an output directory.
        stages: What ran for it.
    """

    recipe: Recipe
    source: Mapping[str, Any]
    target: Mapping[str, Any]
    structure: Mapping[str, Any] | None
    passes: list[dict[str, Any]]
    bytes_by_part: Mapping[str, int]
    free_bytes: int | None
    stages: Stages = field(repr=False)

    @property
    def fits(self) -> bool | None:
        """Whether the disk has room, ``None`` without an output directory."""
        return None if self.free_bytes is None else sum(self.bytes_by_part.values()) <= self.free_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "recipe": self.recipe.resolved(),
            "source": dict(self.source),
            "target": dict(self.target),
            "structure": self.structure,
            "passes": self.passes,
            "bytes": dict(self.bytes_by_part),
            "free_bytes": self.free_bytes,
            "fits": self.fits,
            "stages": self.stages.as_list(),
        }


class VerificationError(ParityError):
    """A failed comparison, with all its numbers.

    Attributes:
        report: What ``depthwire.runtime.verify.verify`` found.
    """

    report: VerifyReport
