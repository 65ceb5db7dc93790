"""``result.json``, as a device wrote it: read, matched with the artefact, and judged again.

The artefact holds the manifest of every bundle that was made from it (``bundles/``). A result names one by its hash,
so the budgets that it is judged by are ours, not the device's; what came back is numbers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from depthwire._hash import sha256_file
from depthwire.errors import ExportError, ParityError
from depthwire.runtime.deploy.manifest import SCHEMA_VERSION, Bundle, BundleError, decode
from depthwire.runtime.tolerances import EXACT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from depthwire.artifact import Artifact
    from depthwire.runtime.deploy.manifest import Model

BUNDLES = "bundles"
VERIFIED = "verified"


class _Open(BaseModel):
    # Later versions of the script may say more.
    model_config = ConfigDict(extra="allow", frozen=True)


class CheckRow(_Open):
    """One check of the device; see ``deploy.checks.Check``."""

    name: str
    passed: bool
    want: str
    got: str
    ignored: bool = False


class BuildRow(_Open):
    """One engine, in bytes and seconds; ``problem`` where it was not built."""

    model: str
    engine: str
    resumed: bool = False
    predicted_bytes: int | None = None
    bytes: int | None = None
    sha256: str | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    available_before: int | None = None
    lowest_available: int | None = None
    problem: str | None = None


class ComparisonRow(_Open):
    """One engine against the goldens; ``windows`` as ``deploy.judge.judge_window`` returned them."""

    model: str
    engine: str
    windows: list[dict[str, Any]]
    problem: str | None = None


class LatencyRow(_Open):
    """One engine's latency; ``variants`` as ``deploy.latency.measure`` returned them."""

    model: str
    engine: str
    protocol: dict[str, Any]
    variants: list[dict[str, Any]]
    problem: str | None = None


class DeviceResult(_Open):
    """The whole of ``result.json``; what a run did not come to is empty."""

    schema_version: int
    depthwire: str
    bundle_sha256: str
    target: str
    form: str
    precision: str
    package: str
    started: str
    seconds: float
    exit_code: int
    verdict: str
    reason: str
    environment: dict[str, Any] = Field(default_factory=dict)
    checks: list[CheckRow] = Field(default_factory=list)
    builds: list[BuildRow] = Field(default_factory=list)
    comparisons: list[ComparisonRow] = Field(default_factory=list)
    latency: list[LatencyRow] = Field(default_factory=list)
    power_before: dict[str, str] = Field(default_factory=dict)
    power_after: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """A result that belongs to an artefact.

    Attributes:
        result: What the device wrote.
        bundle: The manifest of the bundle that it ran.
        problems: Why the result is no proof, by our own judgement; empty where it is one.
    """

    result: DeviceResult
    bundle: Bundle
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the device's verdict is ``verified`` and the numbers say so, too."""
        return self.result.verdict == VERIFIED and not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return what the device wrote and our judgement of it, JSON-ready."""
        return {"passed": self.passed, "problems": list(self.problems), "result": self.result.model_dump(mode="json")}

    def require_passed(self) -> None:
        """Refuse a result that is no proof.

        Raises:
            ParityError: ``result.parity`` where the engine computes something else, ``result.not-verified`` where the
                run did not come to the comparison.
        """
        if self.passed:
            return
        compared = bool(self.result.comparisons)
        raise ParityError(
            "result.parity" if compared else "result.not-verified",
            "The engine on the device does not compute what the model computes"
            if compared
            else "The device did not come to verify the engine",
            at=f"target {self.result.target}",
            want=f"verdict {VERIFIED!r}, and numbers within the bundle's budgets",
            got=f"{self.result.verdict}: {'; '.join(self.problems[:4]) or self.result.reason}",
            todo="Do not use the engine. Numbers and device state are in the table above and in result.json."
            if compared
            else "Do what the reason says, run build_and_verify.py again, and bring its new result.json.",
        )


def judge_result(artifact: Artifact, path: Path) -> Judged:
    """Read a result and judge it by the bundle that it belongs to.

    Args:
        artifact: The artefact, whose hashes were checked.
        path: The ``result.json``.

    Raises:
        ExportError: ``result.unreadable``, ``result.schema``, ``result.other-artifact``.
    """
    result = read_result(path)
    bundle = _bundle_of(artifact, result, path)
    return Judged(result, bundle, tuple(_problems(bundle, result)))


def read_result(path: Path) -> DeviceResult:
    """Read a ``result.json``.

    Raises:
        ExportError: ``result.unreadable`` or ``result.schema``.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int):
        raise _unreadable(path, "no schema_version")
    if version != SCHEMA_VERSION:
        raise ExportError(
            "result.schema",
            "The result was written by another version of the script",
            at=str(path),
            want=f"schema version {SCHEMA_VERSION}",
            got=str(version),
            todo="Read it with the version of Depthwire that made the bundle, or make the bundle again.",
        )
    try:
        return DeviceResult.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise _unreadable(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _unreadable(path: Path, got: str) -> ExportError:
    return ExportError(
        "result.unreadable",
        "This is no result of build_and_verify.py",
        at=str(path),
        want="the result.json that the script wrote into its work directory",
        got=got,
        todo="Copy work/result.json from the device again, whole.",
    )


def _bundle_of(artifact: Artifact, result: DeviceResult, path: Path) -> Bundle:
    """Return the manifest of the result's bundle, from the artefact."""
    name = f"{BUNDLES}/{result.bundle_sha256[:16]}.json"
    entry = artifact.manifest.files.get(name)
    if entry is None or entry.sha256 != result.bundle_sha256:
        raise _foreign(artifact, result, path, f"a bundle {result.bundle_sha256[:16]}… that it does not know")
    try:
        bundle = decode(Bundle, json.loads(artifact.path(name).read_text(encoding="utf-8")))
    except (ValueError, BundleError) as error:
        raise _foreign(artifact, result, path, f"a bundle of another version: {error}") from error
    differing = [file for file, sha256 in bundle.artifact.files.items() if sha256_file(artifact.path(file)) != sha256]
    if differing:
        raise _foreign(artifact, result, path, f"a bundle of another {differing[0]}")
    return bundle


def _foreign(artifact: Artifact, result: DeviceResult, path: Path, got: str) -> ExportError:
    return ExportError(
        "result.other-artifact",
        "The result belongs to another artefact",
        at=f"{path}, target {result.target}",
        want=f"a result of a bundle that 'depthwire bundle {artifact.root}' made",
        got=got,
        todo="Name the artefact that the bundle was made from; one that was converted again needs a new bundle.",
    )


def _problems(bundle: Bundle, result: DeviceResult) -> Iterator[str]:
    """Yield why a result is no proof."""
    if result.target != bundle.target:
        yield f"the result is of target {result.target}, the bundle of {bundle.target}"
    if result.verdict != VERIFIED:
        yield result.reason
    compared = {row.model: row for row in result.comparisons}
    built = {row.model: row for row in result.builds}
    for model in bundle.models:
        row = compared.get(model.file)
        if row is None:
            if result.verdict == VERIFIED:
                yield f"{model.engine} was not compared"
            continue
        if model.file not in built or built[model.file].sha256 is None:
            yield f"{model.engine} was compared and never built"
        if row.problem is not None or len(row.windows) != model.windows:
            yield f"{model.engine}: {row.problem or f'{len(row.windows)} of {model.windows} windows'}"
        for number, window in enumerate(row.windows):
            yield from (f"{model.engine}, window {number}: {text}" for text in _wrong(model, window))


def _wrong(model: Model, window: dict[str, Any]) -> Iterator[str]:
    """Yield what is beyond its budget in a window, judged from the numbers alone."""
    found = {output.get("name"): output for output in window.get("outputs", [])}
    for output in model.outputs:
        row = found.get(output.name, {})
        if row.get("problem") is not None or "max_abs" not in row:
            yield f"{output.name}: {row.get('problem') or 'not compared'}"
            continue
        largest, difference = _number(row, "max_expected"), _number(row, "max_abs")
        allowed = output.atol + output.rtol * largest
        exact = output.dtype in EXACT_DTYPES
        if not (difference <= allowed and math.isfinite(allowed)) or (exact and _number(row, "unequal") != 0):
            yield f"{output.name} max|d| {difference:.2e}, allowed {allowed:.2e}"
        if output.kind == "logits":
            tokens = window.get("top1", {}).get(output.name, {})
            beyond = _number(tokens, "beyond")
            if beyond != 0:
                yield f"{output.name}: top-1 differs at {beyond:g} positions"
    budgets = [output.nll_atol for output in model.outputs if output.nll_atol is not None]
    if budgets and not abs(_number(window.get("nll") or {}, "difference")) <= budgets[0]:
        yield "the likelihood differs, or was not computed"
    routing = window.get("routing", {})
    if routing.get("units") != len(model.routing) or routing.get("problems"):
        yield f"selections: {'; '.join(routing.get('problems', [])) or 'not compared'}"


def _number(row: dict[str, Any], name: str) -> float:
    """Return a number; NaN, which passes no comparison, where there is none."""
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def record_result(artifact: Artifact, judged: Judged, path: Path) -> str:
    """Copy a result into the artefact, list it in the manifest, and return its name there."""
    name = f"engine/{judged.bundle.target}/result.json"
    place = artifact.path(name)
    place.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()
    temporary = place.with_name(f".{place.name}.new")
    temporary.write_bytes(content)
    temporary.replace(place)
    artifact.add_file(name)
    artifact.write_manifest()
    return name
