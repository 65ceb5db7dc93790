"""What a device found, as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.cli._show import pairs_table, rows_table
from depthwire.reporters import megabytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.console import RenderableType

    from depthwire.runtime.device_result import Judged


def show_device_result(judged: Judged) -> Iterator[RenderableType]:
    """Yield verdict and device, builds, comparison and latency."""
    result = judged.result
    device = result.environment
    gpu: Mapping[str, Any] = device.get("gpu") or {}
    yield pairs_table(
        [
            ("verdict", f"{result.verdict}: {result.reason}"),
            ("judged again here", "; ".join(judged.problems) or "passed"),
            ("target", f"{result.target}, {result.precision}, custom ops as {result.form}s"),
            ("run", f"{result.started}, {result.seconds:.0f} s"),
            ("board", device.get("board")),
            ("L4T", device.get("l4t")),
            (
                "GPU",
                f"{gpu['name']} ({gpu['capability']}), driver CUDA {gpu['driver']}" if gpu else device.get("no_gpu"),
            ),
            ("builder", f"{result.package} {device.get('tensorrt')}"),
            ("checks", _checks(judged)),
            ("power before", _power(result.power_before)),
            ("power after", _power(result.power_after)),
        ],
        "device",
    )
    builds = [
        (
            row.engine,
            _size(row.bytes),
            row.problem or f"{row.seconds or 0:.1f} s{' (earlier)' if row.resumed else ''}",
            _size(row.predicted_bytes),
            _size(row.peak_rss_bytes),
            _size(row.lowest_available),
        )
        for row in result.builds
    ]
    if builds:
        yield rows_table(builds, ("engine", "size", "build", "predicted", "peak", "least free"), "builds")
    windows = [cells for row in result.comparisons for cells in _windows(row.engine, row.windows)]
    if windows:
        yield rows_table(
            windows, ("engine", "window", "output", "max|d|", "allowed", "top-1", "NLL", "flips"), "parity"
        )
    latency = [cells for row in result.latency for cells in _latency(row.engine, row.variants)]
    if latency:
        columns = ("engine", "CUDA graph", "transfers", "GPU median", "GPU p99", "host median", "host p99")
        yield rows_table(latency, columns, "latency in ms")


def _checks(judged: Judged) -> str:
    failed = [
        f"{check.name}: wanted {check.want}, found {check.got}" for check in judged.result.checks if not check.passed
    ]
    ignored = [check.name for check in judged.result.checks if check.ignored]
    text = "; ".join(failed) or f"{len(judged.result.checks)} passed"
    return f"{text} (ignored at the user's request: {', '.join(ignored)})" if ignored else text


def _power(found: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {' '.join(text.split())}" for name, text in found.items())


def _size(count: int | None) -> str:
    return "" if count is None else megabytes(count)


def _windows(engine: str, windows: list[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    for number, window in enumerate(windows):
        flips = window.get("routing", {}).get("flips", "")
        nll = (window.get("nll") or {}).get("difference")
        for output in window.get("outputs", []):
            name = output.get("name")
            tokens = window.get("top1", {}).get(name)
            top = "" if tokens is None else f"{tokens.get('flips')} of {tokens.get('positions')} differ"
            found = output.get("problem") or _exponent(output.get("max_abs"))
            row = (engine, str(number), name, found, _exponent(output.get("allowed")), top, _exponent(nll), str(flips))
            yield row


def _exponent(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, (int, float)) else ""


def _latency(engine: str, variants: list[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    for variant in variants:
        switches = ["on" if variant.get(name) else "off" for name in ("cuda_graph", "transfers")]
        if "not_measured" in variant:
            yield (engine, *switches, f"not measured: {variant['not_measured']}", "", "", "")
            continue
        times = [f"{variant[clock][share]:.3f}" for clock in ("gpu_ms", "host_ms") for share in ("p50", "p99")]
        yield (engine, *switches, *times)
