"""What ``verify`` found: every number that its verdict rests on, so that it can be judged again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from depthwire.artifact import Checkpoint
    from depthwire.runtime.compare import Comparison, TensorResult
    from depthwire.runtime.logits import NegativeLogLikelihood, Top1
    from depthwire.runtime.routing_flips import RoutingFlip

Pair = Literal["rewrite", "export/runtime", "compile"]
"""Which step two graphs lie on either side of: original and rewritten in torch; rewritten in torch and the file in
ONNX Runtime; original and the file, where no rewritten program is at hand."""


@dataclass(frozen=True)
class WindowResult:
    """One runner against another on one window.

    Attributes:
        tensors: The outputs.
        top1: Agreement of the most likely token, for each output of logits that could be compared.
        nll: Likelihood of the window's own tokens, for causal language models.
        notes: What was not computed, and why.
    """

    tensors: Comparison
    top1: Mapping[str, Top1]
    nll: NegativeLogLikelihood | None
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.tensors) and all(self.top1.values()) and (self.nll is None or bool(self.nll))

    def as_dict(self) -> dict[str, Any]:
        """Return the window JSON-ready."""
        return {
            "passed": bool(self),
            "outputs": [result.as_dict() for result in self.tensors.tensors],
            "top1": {name: result.as_dict() for name, result in self.top1.items()},
            "nll": None if self.nll is None else self.nll.as_dict(),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class PairResult:
    """One runner against another on all windows.

    Attributes:
        expected: The reference's label.
        actual: The label of what is judged.
        asked: Number of windows that were to be compared.
        problems: What went wrong beyond the windows, such as a missing iteration.
        windows: One result per window.
    """

    expected: str
    actual: str
    asked: int
    problems: tuple[str, ...]
    windows: tuple[WindowResult, ...]

    def __bool__(self) -> bool:
        return not self.problems and len(self.windows) == self.asked > 0 and all(self.windows)

    @property
    def first_failed(self) -> int | None:
        """Index of the first window that fails, or ``None``."""
        return next((index for index, window in enumerate(self.windows) if not window), None)

    def as_dict(self) -> dict[str, Any]:
        """Return the pair JSON-ready."""
        return {
            "expected": self.expected,
            "actual": self.actual,
            "passed": bool(self),
            "windows_asked": self.asked,
            "problems": list(self.problems),
            "windows": [window.as_dict() for window in self.windows],
        }


@dataclass(frozen=True)
class CheckpointResult:
    """One value inside the graphs, compared across one step."""

    checkpoint: Checkpoint
    pair: Pair
    result: TensorResult

    def as_dict(self) -> dict[str, Any]:
        """Return the checkpoint JSON-ready."""
        return {**self.checkpoint.model_dump(), "pair": self.pair, "result": self.result.as_dict()}


@dataclass(frozen=True)
class Divergence:
    """Where a failed comparison starts.

    Attributes:
        first: The first checkpoint, in layer order, that exceeds its budget; ``None`` where none does.
        note: One sentence for the reader.
        window: Index of the window that was walked.
        checked: Checkpoints that were compared across at least one step.
        skipped: Checkpoints that at least one graph lacks.
        trail: Every comparison made, in layer order.
        flips: Tokens that the two graphs route differently, in order of execution; the first unit's are causes.
    """

    first: CheckpointResult | None
    note: str
    window: int
    checked: int
    skipped: int
    trail: tuple[CheckpointResult, ...]
    flips: tuple[RoutingFlip, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the divergence JSON-ready."""
        return {
            "first": None if self.first is None else self.first.as_dict(),
            "note": self.note,
            "window": self.window,
            "checked": self.checked,
            "skipped": self.skipped,
            "trail": [entry.as_dict() for entry in self.trail],
            "flips": [flip.as_dict() for flip in self.flips],
        }


@dataclass(frozen=True)
class VerifyReport:
    """The verdict on an artefact.

    Attributes:
        comparisons: Every pair of runners.
        first_divergence: Where a failure starts; ``None`` if everything passes.
        polygraphy: A command line that repeats the reference's comparison with ONNX Runtime on the first window,
            without Depthwire. It exits with 0 exactly if every output of the file is within its budget.
        windows: Number of windows run.
        seconds: Wall time.
        tools: Versions of what ran.
    """

    comparisons: tuple[PairResult, ...]
    first_divergence: Divergence | None
    polygraphy: str
    windows: int
    seconds: float
    tools: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether there is a comparison and every one of them passes."""
        return bool(self.comparisons) and all(self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        """Return the report JSON-ready."""
        return {
            "passed": self.passed,
            "windows": self.windows,
            "seconds": self.seconds,
            "comparisons": [pair.as_dict() for pair in self.comparisons],
            "first_divergence": None if self.first_divergence is None else self.first_divergence.as_dict(),
            "polygraphy": self.polygraphy,
            "tools": dict(self.tools),
        }
