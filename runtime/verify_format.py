"""The report of ``verify`` as lines for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from depthwire.runtime.compare import TensorResult
    from depthwire.runtime.logits import Top1
    from depthwire.runtime.verify_report import CheckpointResult, Divergence, PairResult, VerifyReport, WindowResult

_COLUMNS = ("output", "max|d|", "mean|d|", "p99|d|", "max|d|/max|ref|", "budget", "cosine", "passes from rtol")
_FLIPS_SHOWN = 5


def format_report(report: VerifyReport) -> list[str]:
    """Return the report as plain lines: verdict, one block per pair, the first differing layer, how to repeat it."""
    versions = ", ".join(f"{name} {number}" for name, number in report.tools.items())
    lines = [
        (
            f"verify {_verdict(passed=report.passed)}: {report.windows} windows, "
            f"{len(report.comparisons)} comparisons, {report.seconds:.1f} s ({versions})"
        )
    ]
    for pair in report.comparisons:
        lines += _pair(pair)
    if report.first_divergence is not None:
        lines += _divergence(report.first_divergence)
    if not report.polygraphy:  # a twin is compared, which is not kept
        return lines
    return [*lines, "repeat the first window without depthwire:", f"  {report.polygraphy}"]


def _pair(pair: PairResult) -> list[str]:
    lines = [
        (
            f"{pair.expected} -> {pair.actual}: {_verdict(passed=bool(pair))}, "
            f"{sum(map(bool, pair.windows))} of {pair.asked} windows pass"
        )
    ]
    lines += [f"  problem: {problem}" for problem in pair.problems]
    if not pair.windows:
        return lines
    by_name: dict[str, list[TensorResult]] = {}
    for result in (result for window in pair.windows for result in window.tensors.tensors):
        by_name.setdefault(result.name, []).append(result)
    worst = [_worst(results) for results in by_name.values()]
    good = [result for result in worst if result.problem is None]
    if good:
        lines += _table([_COLUMNS, *(_numbers(result) for result in good)])
    lines += [f"  {result.name}: {result.problem}" for result in worst if result.problem is not None]
    for name in dict.fromkeys(name for window in pair.windows for name in window.top1):
        lines += _tokens(name, [window.top1[name] for window in pair.windows if name in window.top1])
    return [*lines, *_likelihood(pair.windows)]


def _worst(results: Sequence[TensorResult]) -> TensorResult:
    """The window to show for an output: one that could not be compared, or else the one closest to its budget."""
    return max(results, key=lambda result: (result.problem is not None, _closeness(result)))


def _closeness(result: TensorResult) -> float:
    if result.stats is None or not result.allowed:
        return float(not result)
    return result.stats.max_abs / result.allowed


def _numbers(result: TensorResult) -> tuple[str, ...]:
    stats, tolerance = result.stats, result.tolerance
    if stats is None or tolerance is None:
        return (result.name,)
    return (
        result.name,
        *(f"{value:.2e}" for value in (stats.max_abs, stats.mean_abs, stats.p99_abs)),
        "-" if stats.max_rel is None else f"{stats.max_rel:.2e}",
        f"{tolerance.rtol:g}",
        "-" if stats.cosine is None else f"{stats.cosine:.9f}",
        "-" if result.required_rtol is None else f"{result.required_rtol:.2e}",
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return [f"  {line.rstrip()}" for line in lines]


def _tokens(name: str, results: Sequence[Top1]) -> list[str]:
    positions, flips = sum(r.positions for r in results), sum(r.flips for r in results)
    line = f"  top-1 of {name}: {positions - flips} of {positions} positions agree, {flips} flips"
    if not flips:
        return [line]
    beyond, gap = sum(r.beyond for r in results), max(r.largest_gap for r in results)
    lines = [f"{line}, {beyond} of them no near-ties; largest gap {gap:.2e}"]
    for window, result in enumerate(results):
        for flip in result.listed[:_FLIPS_SHOWN]:
            verdict = "near-tie" if flip.gap < result.allowed else "FAIL"
            lines.append(
                f"    window {window}, position {list(flip.position)}: token {flip.expected} -> {flip.actual}, "
                f"gap {flip.gap:.2e} (budget {result.allowed:.2e}) {verdict}"
            )
    return lines


def _likelihood(windows: Sequence[WindowResult]) -> list[str]:
    notes = [f"  {note}" for note in dict.fromkeys(note for window in windows for note in window.notes)]
    scores = [window.nll for window in windows if window.nll is not None]
    if not scores:
        return notes
    tokens = sum(score.tokens for score in scores)
    expected = sum(score.expected * score.tokens for score in scores) / tokens
    actual = sum(score.actual * score.tokens for score in scores) / tokens
    worst = max(scores, key=lambda score: abs(score.difference))
    return [
        (
            f"  NLL of {tokens} tokens: {expected:.6f} -> {actual:.6f} nats; largest difference of a window "
            f"{worst.difference:+.2e} (budget {worst.tolerance.atol:g}) {_verdict(passed=all(scores))}"
        ),
        *notes,
    ]


def _divergence(divergence: Divergence) -> list[str]:
    lines = [f"where it starts (window {divergence.window}): {divergence.note}"]
    if divergence.first is not None:
        lines.append(f"  {_checkpoint(divergence.first)}")
    return [*lines, f"  {divergence.checked} checkpoints compared, {divergence.skipped} missing in a graph"]


def _checkpoint(entry: CheckpointResult) -> str:
    at, result = entry.checkpoint, entry.result
    place = f"layer {at.layer} {at.role} {at.module}, value {at.value}, {entry.pair}"
    if result.stats is None or result.allowed is None:
        return f"{place}: {result.problem}"
    return (
        f"{place}: max|d| {result.stats.max_abs:.2e} of max|ref| {result.stats.max_expected:.2e}, allowed "
        f"{result.allowed:.2e}, at {list(result.stats.worst_index)}"
    )


def _verdict(*, passed: bool) -> str:
    return "PASSED" if passed else "FAILED"
