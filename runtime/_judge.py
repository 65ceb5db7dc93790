"""Judge the outputs of two runners, window by window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.runtime.compare import compare_runs
from depthwire.runtime.logits import NegativeLogLikelihood, token_nll, top1
from depthwire.runtime.tolerances import EXACT_DTYPES, Kind, tolerance
from depthwire.runtime.verify_report import PairResult, WindowResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from depthwire.artifact import Manifest
    from depthwire.runtime.compare import Comparison, TensorResult

    Arrays = Mapping[str, NDArray[Any]]


class Judged:
    """The results of one pair of runners as they come in."""

    def __init__(self) -> None:
        """Start with no window."""
        self.problems: list[str] = []
        self.windows: list[WindowResult] = []

    def add(
        self,
        expected: Sequence[Arrays],
        actual: Sequence[Arrays],
        feeds: Sequence[Arrays],
        kinds: Mapping[str, Kind],
        manifest: Manifest,
        *,
        rounded: str | None = None,
    ) -> None:
        """Judge some windows and keep the verdicts; the arrays are not kept.

        ``rounded`` is the dtype that fp32 outputs were rounded to inside the graph: its budgets are granted.
        """
        runs = compare_runs(expected, actual, kinds=kinds, rounded=rounded)
        if runs.problem is not None:
            self.problems.append(runs.problem)
        task = manifest.source.task
        rows = zip(runs.iterations, expected, actual, feeds, strict=False)  # unequal lengths are a problem already
        self.windows += [_judge(tensors, (e, a), feed, task, rounded) for tensors, e, a, feed in rows]

    def pair(self, names: tuple[str, str], asked: int) -> PairResult:
        """Return the pair's result; ``asked`` is the number of windows there should be."""
        return PairResult(*names, asked, tuple(self.problems), tuple(self.windows))


def _judge(
    tensors: Comparison, sides: tuple[Arrays, Arrays], feed: Arrays, task: str | None, rounded: str | None
) -> WindowResult:
    """Add the two judgements that only logits have; both need values that passed the structural checks."""
    expected, actual = sides
    comparable = [r for r in tensors.tensors if r.kind == "logits" and r.allowed is not None]
    tokens = {r.name: top1(expected[r.name], actual[r.name], allowed=r.allowed or 0.0) for r in comparable}
    if task != "causal-lm":
        return WindowResult(tensors, tokens, None)
    if not comparable:
        return WindowResult(tensors, tokens, None, ("NLL not computed: no output of logits could be compared",))
    first = comparable[0]
    obstacle = _nll_obstacle(first, feed)
    if obstacle is not None:
        return WindowResult(tensors, tokens, None, (f"NLL not computed: {obstacle}",))
    return WindowResult(tensors, tokens, _nll(expected[first.name], actual[first.name], feed, rounded))


def _nll_obstacle(logits: TensorResult, feed: Arrays) -> str | None:
    ids = feed.get("input_ids")
    if ids is None:
        return "the model has no input named input_ids"
    if len(logits.shape) != 3 or logits.shape[:2] != ids.shape or ids.shape[1] < 2:
        return f"logits {list(logits.shape)} do not score every token of input_ids {list(ids.shape)}"
    return None


def _nll(expected: NDArray[Any], actual: NDArray[Any], feed: Arrays, rounded: str | None) -> NegativeLogLikelihood:
    mask = feed.get("attention_mask")
    usable = mask if mask is not None and mask.shape == feed["input_ids"].shape else None
    (left, count), (right, _) = (token_nll(side, feed["input_ids"], usable) for side in (expected, actual))
    return NegativeLogLikelihood(count, left, right, tolerance(rounded or expected.dtype.name, "nll"))


def output_kinds(manifest: Manifest) -> dict[str, Kind]:
    """Return the row of the table of tolerances for each output; logits are told by their name."""
    kinds: dict[str, Kind] = {}
    for info in manifest.outputs:
        logits = info.name == "logits" or info.name.endswith(("_logits", ".logits"))
        kinds[info.name] = "integer" if info.dtype in EXACT_DTYPES else "logits" if logits else "hidden"
    return kinds
