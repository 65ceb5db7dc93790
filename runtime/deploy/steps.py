"""Build, compare and measure one model of a bundle; each returns what it found, JSON-ready."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from depthwire._hash import sha256_file
from depthwire.runtime.deploy.manifest import inside
from depthwire.runtime.deploy.supervise import run_child

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from depthwire.runtime.deploy.manifest import Bundle, Model
    from depthwire.runtime.deploy.probe import Device
    from depthwire.runtime.deploy.state import State

CACHE = "timing.cache"


@dataclass(frozen=True)
class Run:
    """What every step needs.

    Attributes:
        root: The bundle.
        work: The work directory.
        bundle: Its manifest.
        device: What the device is.
        system: Root directory of the system's files.
        say: Prints one line.
        log: Where children log.
        script: ``build_and_verify.py``.
    """

    root: Path
    work: Path
    bundle: Bundle
    device: Device
    system: Path
    say: Callable[[str, str, str], None]
    log: BinaryIO
    script: Path


def build(run: Run, model: Model, state: State, inputs: str) -> dict[str, Any]:
    """Build an engine unless it is finished; ``problem`` in what is returned says that it failed."""
    head = {"model": model.file, "engine": model.engine, "predicted_bytes": model.predicted_bytes}
    known = state.finished(model, inputs)
    if known is not None:
        run.say("ok", model.engine, f"built earlier, {known['bytes'] / 1e6:.1f} MB, unchanged")
        return {**head, "resumed": True, **known}
    options = run.bundle.builder
    partial = run.work / f".{model.engine}.partial"
    request = {
        "kind": "build",
        "package": run.bundle.platform.package,
        "model": str(inside(run.root, model.file)),
        "engine": str(partial),
        "cache": str(run.work / CACHE),
        "plugins": None if model.plugins is None else str(inside(run.root, model.plugins)),
        **asdict(options),
    }
    run.say("..", model.engine, f"building from {model.file} ({model.weight_bytes / 1e6:.1f} MB of weights)")
    outcome = run_child(
        run.script,
        request,
        run.log,
        system=run.system,
        floor_bytes=options.floor_bytes,
        progress=lambda phase: run.say("..", model.engine, phase),
    )
    measured = {
        "seconds": outcome.seconds,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "available_before": outcome.available_before,
        "lowest_available": outcome.lowest_available,
    }
    if outcome.result is None or outcome.problem:
        partial.unlink(missing_ok=True)
        return {**head, "resumed": False, **measured, "problem": outcome.problem}
    facts = {
        "bytes": partial.stat().st_size,
        "sha256": sha256_file(partial),
        **measured,
        **outcome.result,
    }
    partial.replace(run.work / model.engine)
    state.finish(model, inputs, facts)
    peak, seconds = outcome.peak_rss_bytes / 1e6, outcome.seconds
    run.say("ok", model.engine, f"{facts['bytes'] / 1e6:.1f} MB in {seconds:.1f} s, peak {peak:.0f} MB")
    return {**head, "resumed": False, **facts}


def compare(run: Run, model: Model) -> dict[str, Any]:
    """Run an engine on every window and judge it; ``problem`` says that it could not be run."""
    import numpy as np

    from depthwire.runtime.deploy.judge import judge_window

    routing = [name for unit in model.routing for name in (unit.index, unit.taken)]
    names = [*(output.name for output in model.outputs), *dict.fromkeys(routing)]
    goldens, out = inside(run.root, model.goldens), run.work / f"outputs-{os.getpid()}"
    out.mkdir()
    try:
        request = {
            "kind": "run",
            "package": run.bundle.platform.package,
            "engine": str(run.work / model.engine),
            "goldens": str(goldens),
            "out": str(out),
            "inputs": [tensor.name for tensor in model.inputs],
            "outputs": names,
            "windows": model.windows,
        }
        outcome = run_child(run.script, request, run.log, system=run.system)
        head = {"model": model.file, "engine": model.engine, "seconds": outcome.seconds}
        if outcome.result is None or outcome.problem:
            return {**head, "passed": False, "windows": [], "problem": outcome.problem}
        windows = []
        for window in range(model.windows):
            expected = {name: _golden(goldens, "output", name)[window] for name in names}
            feed = {tensor.name: _golden(goldens, "input", tensor.name)[window] for tensor in model.inputs}
            actual = {name: np.load(out / f"{window}.{name}.npy", mmap_mode="r") for name in names}
            windows.append(judge_window(model, run.bundle.task, expected, actual, feed))
            run.say("ok" if windows[-1]["passed"] else "FAIL", f"window {window}", describe(windows[-1]))
        passed = bool(windows) and all(window["passed"] for window in windows)
        peak = outcome.peak_rss_bytes
        return {**head, "passed": passed, "windows": windows, "peak_rss_bytes": peak, **outcome.result}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _golden(goldens: Path, side: str, name: str) -> Any:
    import numpy as np

    return np.load(goldens / f"{side}.{name}.npy", mmap_mode="r")


def latency(run: Run, model: Model) -> dict[str, Any]:
    """Measure an engine; ``problem`` says that it could not be."""
    protocol = asdict(run.bundle.latency)
    request = {
        "kind": "latency",
        "package": run.bundle.platform.package,
        "engine": str(run.work / model.engine),
        "goldens": str(inside(run.root, model.goldens)),
        "inputs": [tensor.name for tensor in model.inputs],
        **protocol,
    }
    outcome = run_child(run.script, request, run.log, system=run.system)
    head = {"model": model.file, "engine": model.engine, "protocol": protocol}
    if outcome.result is None or outcome.problem:
        run.say("FAIL", "latency", outcome.problem)
        return {**head, "variants": [], "problem": outcome.problem}
    for variant in outcome.result["variants"]:
        name = f"latency, CUDA graph {_on(variant['cuda_graph'])}, transfers {_on(variant['transfers'])}"
        if "not_measured" in variant:
            run.say("skip", name, variant["not_measured"])
        else:
            gpu, host = variant["gpu_ms"], variant["host_ms"]
            run.say("ok", name, f"GPU median {gpu['p50']:.3f} ms, p99 {gpu['p99']:.3f}; host median {host['p50']:.3f}")
    return {**head, **outcome.result}


def _on(value: object) -> str:
    return "on" if value else "off"


def describe(window: dict[str, Any]) -> str:
    """Return a judged window as one line."""
    parts = []
    for output in window["outputs"]:
        if output["problem"] is not None:
            parts.append(f"{output['name']}: {output['problem']}")
        elif output["allowed"] is not None:
            parts.append(f"{output['name']} max|d| {output['max_abs']:.2e} (allowed {output['allowed']:.2e})")
    for name, tokens in window["top1"].items():
        parts.append(f"top-1 of {name}: {tokens['flips']} of {tokens['positions']} differ, {tokens['beyond']} beyond")
    if window["nll"] is not None:
        parts.append(f"NLL {window['nll']['difference']:+.2e} nats")
    routing = window["routing"]
    if routing["units"]:
        parts.append(f"{routing['flips']} routing flips in {routing['units']} units")
    return "; ".join([*parts, *routing["problems"], *window["notes"]])


def explain(comparison: dict[str, Any]) -> str:
    """Return why a comparison failed."""
    number, window = next((i, w) for i, w in enumerate(comparison["windows"]) if not w["passed"])
    return f"{comparison['engine']}, window {number}: {describe(window)}"
