"""``bundle.json``: what a bundle holds and what the device must be. One definition for both sides.

Dataclasses of the standard library: the device has no pydantic. ``decode`` checks every field, so that a file that was
damaged or written by hand is one clear error.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from depthwire._hash import sha256_file

SCHEMA_VERSION = 1
BUNDLE = "bundle.json"
RESULT = "result.json"
SCRIPT = "build_and_verify.py"
GOLDENS = "goldens"
LIBRARY = "lib"

_T = TypeVar("_T")


class BundleError(Exception):
    """The bundle is not what it should be."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ArtifactId:
    """The artefact that a bundle was made from, by what no later verb changes.

    Attributes:
        created: When it was converted.
        files: SHA-256 of its graphs, weights and goldens, by name.
    """

    created: str
    files: dict[str, str]


@dataclass(frozen=True)
class Tensor:
    """Name, static shape and numpy dtype of an input."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Output:
    """An output and the budget it is judged by.

    Attributes:
        name: Its name.
        shape: Its static shape.
        dtype: numpy spelling.
        kind: ``logits``, ``hidden`` or ``integer``.
        computed: dtype that the values behind it are computed in: the row of the table of tolerances.
        rtol: Budget relative to the largest magnitude of the golden.
        atol: Absolute budget.
        reason: Why this much, from the table.
        nll_atol: Budget on the mean negative log-likelihood, in nats; ``None`` where there is no likelihood.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    computed: str
    rtol: float
    atol: float
    reason: str
    nll_atol: float | None


@dataclass(frozen=True)
class RoutingUnit:
    """A selection of tokens whose result is an output of the network, so that flips are seen.

    Attributes:
        module: The routed module.
        layer: Number of its layer, where it has one.
        tokens: T.
        index: Name of the output with the slots' tokens, ``[B, K]``.
        taken: Name of the output that says which slots hold a token, ``[B, K]``.
    """

    module: str
    layer: int | None
    tokens: int
    index: str
    taken: str


@dataclass(frozen=True)
class Model:
    """One graph, the engine that is built from it, and what it is compared with.

    Attributes:
        file: The ONNX file.
        engine: Name of the engine in the work directory.
        plugins: Module to import before the graph is parsed, ``None`` with form ``function``.
        capacity: Share of the tokens that routed layers compute, as a fraction; ``None`` where nothing is routed.
        opset: Of the standard domain.
        inputs: The network's inputs.
        outputs: What is judged by value.
        routing: Selections that are compared token by token.
        windows: Number of goldens.
        goldens: Folder with ``<side>.<name>.npy``, each with a leading axis over windows.
        reference: What computed the goldens.
        routing_reference: What computed the selections; why there are none where ``routing`` is empty.
        weight_bytes: Bytes of the graph's weights.
        predicted_bytes: Predicted peak memory of the build, ``None`` where nothing predicts it.
    """

    file: str
    engine: str
    plugins: str | None
    capacity: str | None
    opset: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Output, ...]
    routing: tuple[RoutingUnit, ...]
    windows: int
    goldens: str
    reference: str
    routing_reference: str
    weight_bytes: int
    predicted_bytes: int | None


@dataclass(frozen=True)
class Platform:
    """What the device must be.

    Attributes:
        boards: One of these must occur, as a whole word, in ``/proc/device-tree/compatible`` of a Jetson module, or in
            the name that CUDA reports for another GPU; empty where any will do.
        jetpack: The JetPack release, for the reader.
        l4t: Its L4T release, ``36.4``; the device's must have the same major number and at least this minor.
        compute_capabilities: The GPU must have one of these, as ``SM87``.
        package: Python module of the builder: ``tensorrt`` or ``tensorrt_rtx``.
        tensorrt_at_least: Lowest version that will do.
        tensorrt_below: First version that will not.
        memory_bytes: Memory of the board, ``None`` where it varies.
    """

    boards: tuple[str, ...]
    jetpack: str | None
    l4t: str | None
    compute_capabilities: tuple[str, ...]
    package: str
    tensorrt_at_least: str
    tensorrt_below: str
    memory_bytes: int | None


@dataclass(frozen=True)
class BuilderOptions:
    """How the engine is built.

    Attributes:
        workspace_bytes: Limit of the builder's workspace, ``None`` for its default.
        optimization_level: 0 to 5, ``None`` for the builder's default.
        tf32: Whether float32 products may be rounded to TF32. Never: their errors are fifty times the budget.
        compute_capabilities: What TensorRT-RTX compiles for; empty for TensorRT, which builds for the GPU it finds.
        floor_bytes: A build is ended when the machine's free memory falls below this.
        disk_bytes: Room that engines, cache and outputs need.
    """

    workspace_bytes: int | None
    optimization_level: int | None
    tf32: bool
    compute_capabilities: tuple[str, ...]
    floor_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class LatencyProtocol:
    """How latency is measured.

    Attributes:
        warmup_runs: Runs that are not counted, at least.
        warmup_seconds: Warm-up goes on for at least this long, so that clocks settle.
        runs: Runs that are counted.
    """

    warmup_runs: int
    warmup_seconds: float
    runs: int


@dataclass(frozen=True)
class Proxy:
    """A check that stands in for the target's own TensorRT.

    Attributes:
        model: The ONNX file.
        label: What it is, and what it is not.
        version: Of the parser; ``None`` where it was not installed.
        passed: ``None`` where it was not run.
        detail: The parser's complaint, or why it was not run.
    """

    model: str
    label: str
    version: str | None
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Bundle:
    """The whole of ``bundle.json``.

    Attributes:
        schema_version: Of this file.
        depthwire: Version that wrote it.
        target: Name of the target.
        title: The hardware in words.
        artifact: Where it came from.
        platform: What the device must be.
        form: ``function`` (bodies in the file) or ``plugin``.
        precision: What was asked for: ``fp32``, ``fp16``, …
        task: ``causal-lm``, … of the source model.
        builder: How the engines are built.
        models: One or more; the first is the artefact's ``model.onnx`` unless a capacity was chosen.
        latency: How latency is measured.
        proxies: What was checked in place of the device.
        notes: For the reader.
        files: Every other file of the bundle.
    """

    schema_version: int
    depthwire: str
    target: str
    title: str
    artifact: ArtifactId
    platform: Platform
    form: str
    precision: str
    task: str | None
    builder: BuilderOptions
    models: tuple[Model, ...]
    latency: LatencyProtocol
    proxies: tuple[Proxy, ...]
    notes: tuple[str, ...]
    files: dict[str, FileEntry]


def encode(value: Any) -> str:
    """Return a dataclass as the text of its file; the same value gives the same bytes."""
    return json.dumps(dataclasses.asdict(value), indent=2) + "\n"


def decode(kind: type[_T], raw: Any, at: str = "") -> _T:
    """Return a dataclass from parsed JSON.

    Args:
        kind: A dataclass, or the annotation of a field.
        raw: What ``json.loads`` returned.
        at: Where it stands, for the message.

    Raises:
        BundleError: A field is missing, unknown, or of another type.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, raw, at)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    result: Any
    if origin in {types.UnionType, typing.Union}:
        inner = next(argument for argument in arguments if argument is not type(None))
        result = None if raw is None else decode(inner, raw, at)
    elif origin is tuple:
        _require(isinstance(raw, list), at, "a list", raw)
        result = tuple(decode(arguments[0], item, f"{at}[{index}]") for index, item in enumerate(raw))
    elif origin is dict:
        _require(isinstance(raw, dict), at, "an object", raw)
        result = {name: decode(arguments[1], item, f"{at}.{name}") for name, item in raw.items()}
    elif kind is float:
        _require(isinstance(raw, (int, float)) and not isinstance(raw, bool), at, "a number", raw)
        result = float(raw)
    else:
        _require(type(raw) is kind, at, kind.__name__, raw)
        result = raw
    return typing.cast("_T", result)


def _dataclass(kind: type[_T], raw: Any, at: str) -> _T:
    _require(isinstance(raw, dict), at, "an object", raw)
    hints = typing.get_type_hints(kind)
    differing = set(hints) ^ set(raw)
    if differing:
        name = min(differing)
        raise BundleError(f"{at or 'the file'}: field {name!r} is {'missing' if name in hints else 'unknown'}")
    prefix = f"{at}." if at else ""
    return kind(**{name: decode(hint, raw[name], prefix + name) for name, hint in hints.items()})


def _require(holds: bool, at: str, want: str, got: object) -> None:  # noqa: FBT001 - a condition
    if not holds:
        raise BundleError(f"{at or 'the file'}: {want} was expected, found {type(got).__name__}")


def read_bundle(root: Path) -> Bundle:
    """Read ``bundle.json`` of a directory; no other file is touched.

    Raises:
        BundleError: It is absent, damaged, of another schema, or names a file outside the bundle.
    """
    path = root / BUNDLE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(f"{path} has schema version {version}, this script reads {SCHEMA_VERSION}")
    bundle = decode(Bundle, raw)
    if not bundle.models:
        raise BundleError(f"{path} names no model")
    for name in bundle.files:
        inside(root, name)
    for model in bundle.models:
        used = [model.file, *([] if model.plugins is None else [model.plugins])]
        for name in (*used, model.goldens):
            inside(root, name)
        if PurePosixPath(model.engine).name != model.engine or model.engine.startswith("."):
            raise BundleError(f"{BUNDLE} names an engine outside the work directory: {model.engine}")
        missing = [name for name in used if name not in bundle.files]
        if missing:
            raise BundleError(f"{BUNDLE} uses {missing[0]} without its hash")
    return bundle


def inside(root: Path, name: str) -> Path:
    """Return the path of a member.

    Raises:
        BundleError: The name leaves the bundle.
    """
    pure = PurePosixPath(name)
    path = root / pure
    plain = name and not pure.is_absolute() and ".." not in pure.parts and "\\" not in name
    if not plain or not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{BUNDLE} names a file outside the bundle: {name!r}")
    return path


def wrong_files(root: Path, bundle: Bundle) -> list[str]:
    """Return what differs from ``bundle.json``, one line a file; empty where all is as it was written."""
    wrong = []
    for name, entry in bundle.files.items():
        path = inside(root, name)
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != entry.bytes:
            wrong.append(f"{name} has {path.stat().st_size} bytes instead of {entry.bytes}")
        elif sha256_file(path) != entry.sha256:
            wrong.append(f"{name} has another content (sha256)")
    return wrong
