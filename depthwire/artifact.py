"""The artefact: a directory that describes, and can prove, itself.

::

    out/
      model.onnx  model.onnx.data     the graph and its weights (external data)
      model.c25.onnx  …               graphs of other capacities over the same weights
      goldens.safetensors             example inputs and the original model's outputs
      manifest.json                   this module's ``Manifest``; names and hashes every other file
      report.json  report.html        stages, parity, engine facts
      verify/…  engine/<target>/…     written by ``verify`` and ``build``
      kernels/…                       GPU kernels of the depth-attention operators, written by ``kernels``

Reading checks every hash and says which file differs. Paths inside are relative and may not leave the directory.
"""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from depthwire._hash import sha256_file
from depthwire.errors import ExportError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
GOLDENS = "goldens.safetensors"
REPORT = "report.json"
KERNELS = "kernels"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=False)


class FileEntry(_Strict):
    """Size in bytes and hash of one file of the artefact."""

    bytes: int
    sha256: str


class TensorInfo(_Strict):
    """Name, static shape and dtype (numpy spelling; ``bfloat16`` for bf16) of a graph input or output."""

    name: str
    shape: list[int]
    dtype: str


class SourceInfo(_Strict):
    """``depthwire.program.Source`` as it stands in the manifest."""

    kind: str
    reference: str
    revision: str | None = None
    sha256: dict[str, str] = Field(default_factory=dict)
    task: str | None = None
    model: str | None = None
    tokenizer: str | None = None


class Checkpoint(_Strict):
    """A value that the original, the rewritten and the ONNX graph share by name: where layers are compared.

    Attributes:
        value: FX node name, equal to the ONNX value name.
        layer: Position in the residual stream: 0 is the first sublayer; the final reader comes last.
        role: ``norm`` (the input of a sublayer, after its norm) or ``write`` (its output).
        module: Module path in the source model.
    """

    value: str
    layer: int
    role: str
    module: str


class PassInfo(_Strict):
    """What one pass did."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    rewrites: int = 0
    declines: list[dict[str, str]] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    seconds: float = 0.0


class CustomOp(_Strict):
    """One custom op of the graph: number of nodes and whether a function body travels with the file."""

    count: int
    body: bool


class EngineInfo(_Strict):
    """Facts of one built engine, as far as its builder tells."""

    target: str
    builder: str
    version: str
    file: str
    compute_capabilities: list[str]
    bytes: int
    seconds: float
    peak_rss_bytes: int
    predicted_rss_bytes: int | None = None
    layers: dict[str, int] = Field(default_factory=dict)
    dtypes: dict[str, int] = Field(default_factory=dict)
    profile: dict[str, list[list[int]]] = Field(default_factory=dict)
    """Least, tuned-for and greatest shape of every input whose shape is not static."""
    weights: dict[str, int] = Field(default_factory=dict)
    """Bytes of the network's constants by dtype, as the builder holds them."""
    checked_dtypes: int = 0
    """Values and weights of the graph whose dtype in the network was compared with the graph's."""
    stripped: bool = False
    """Whether the weights were left out, to be put back from the graph where the engine is loaded."""
    route_inputs: bool = False
    all_capacities: bool = False
    max_batch: int | None = None
    notes: list[str] = Field(default_factory=list)


class KernelsInfo(_Strict):
    """Facts of the compiled GPU kernels in ``kernels/``.

    Attributes:
        compiler: What compiled them.
        version: Its version.
        compute_capabilities: Of the GPUs that they were compiled for, as ``SM87``.
        kernels: Different kernels; one serves all operators with the same name, width, dtypes and attributes.
        bytes: Of all cubins.
        seconds: Wall time of the compilation; little where the compiler had them in its cache.
        notes: What was not tried.
    """

    compiler: str
    version: str
    compute_capabilities: list[str]
    kernels: int
    bytes: int
    seconds: float
    notes: list[str] = Field(default_factory=list)


class RouteUnit(_Strict):
    """One selection of tokens in a graph.

    Attributes:
        module: Path of the routed module.
        layer: Number of its layer.
        tokens: T.
        slots: K, the most that are computed.
        taken: Name of the value ``[B, K]`` that says which slots hold a selected token.
        state: Name of the value ``[B, 2]`` with the counts behind the last token, under a running budget.
    """

    module: str
    layer: int | None
    tokens: int
    slots: int
    taken: str
    state: str | None


class RouteGraph(_Strict):
    """One of the graphs of a routed model.

    Attributes:
        file: Its name in the artefact.
        capacity: Share of the tokens that its routed layers compute, as a fraction; ``None`` where layers differ, and
            where the model's own code decides.
        units: Its selections, in the order of ``route_thresholds``.
    """

    file: str
    capacity: str | None
    units: list[RouteUnit]


class RouteInfo(_Strict):
    """How layers are routed over tokens.

    Attributes:
        spec: ``RouteSpec.as_dict()``; ``None`` for a model that came routed.
        inputs: Inputs of every graph that have defaults: thresholds, budgets and counts.
        states_out: Name of the output with the counts behind the last token, if the graphs carry them.
        graphs: ``model.onnx`` first, then those of the other capacities.
    """

    spec: dict[str, Any] | None
    inputs: list[TensorInfo] = Field(default_factory=list)
    states_out: str | None = None
    graphs: list[RouteGraph]


class PrecisionInfo(_Strict):
    """In which dtypes the graphs compute, and what that costs.

    Attributes:
        asked: ``fp16``, ``bf16``, ``int8`` or ``int4-weights``.
        rest: Dtype of what is not quantised: ``fp32``, ``fp16`` or ``bf16``.
        logits: Whether the product behind the logits is kept in ``fp32``.
        islands: Calls that are kept in fp32, by reason.
        quantized: Linear layers by what became of them: ``int8``, ``int8 weights``, ``int4 weights``, or left.
        census: Values of the written graph by dtype.
        calibration: What ranges were measured on.
        largest: Largest magnitude that a value of the low dtype had there.
        largest_at: Module of that value.
        weight_bytes: Stored bytes of the weights but for embeddings.
        embedding_bytes: Stored bytes of the tables that tokens index.
        quality: What the change of precision cost on the windows, as ``report.json`` has it.
    """

    asked: str
    rest: str
    logits: str
    islands: dict[str, int] = Field(default_factory=dict)
    quantized: dict[str, int] = Field(default_factory=dict)
    census: dict[str, int] = Field(default_factory=dict)
    calibration: str | None = None
    largest: float | None = None
    largest_at: str | None = None
    weight_bytes: int = 0
    embedding_bytes: int = 0
    quality: dict[str, Any] = Field(default_factory=dict)


class Manifest(_Strict):
    """Everything a reader needs to trust, rebuild or refuse the artefact."""

    schema_version: int = SCHEMA_VERSION
    depthwire: str
    created: str
    source: SourceInfo
    recipe: dict[str, Any]
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    opsets: dict[str, int]
    ops: dict[str, int] = Field(default_factory=dict)
    custom_ops: dict[str, CustomOp] = Field(default_factory=dict)
    dtypes: dict[str, int] = Field(default_factory=dict)
    weight_bytes: int = 0
    passes: list[PassInfo] = Field(default_factory=list)
    checkpoints: list[Checkpoint] = Field(default_factory=list)
    tools: dict[str, str] = Field(default_factory=dict)
    files: dict[str, FileEntry] = Field(default_factory=dict)
    engines: dict[str, EngineInfo] = Field(default_factory=dict)
    kernels: KernelsInfo | None = None
    route: RouteInfo | None = None
    precision: PrecisionInfo | None = None


class Artifact:
    """An artefact directory on disk with its manifest."""

    def __init__(self, root: Path, manifest: Manifest, graph: str = MODEL) -> None:
        """Hold a directory, its manifest and the name of the graph to look at; ``load`` is the checked way in."""
        self.root = root
        self.manifest = manifest
        self._graph = graph

    @classmethod
    def load(cls, root: str | Path, *, check_hashes: bool = True) -> Artifact:
        """Read an artefact and check it.

        Args:
            root: The directory.
            check_hashes: Hash every listed file (about 1 s per GB); the command line always does.

        Raises:
            ExportError: Not an artefact, written by another schema, a file missing, added in its place or changed.
        """
        root = Path(root)
        path = root / MANIFEST
        if not path.is_file():
            raise ExportError(
                "artifact.not-an-artifact",
                "This directory is not a Depthwire artefact",
                at=str(root),
                want=f"a directory with {MANIFEST}",
                got="no such directory" if not root.exists() else f"no {MANIFEST} in it",
                todo="Give the directory that 'depthwire convert -o' wrote.",
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            manifest = Manifest.model_validate(raw)
        except (ValueError, ValidationError) as error:
            raise ExportError(
                "artifact.bad-manifest",
                "The manifest cannot be read",
                at=str(path),
                want=f"a manifest of schema version {SCHEMA_VERSION}",
                got=str(error).splitlines()[0],
                todo="Convert the model again with this version of Depthwire.",
            ) from error
        if manifest.schema_version != SCHEMA_VERSION:
            raise ExportError(
                "artifact.schema-version",
                "The artefact was written by another version of Depthwire",
                at=str(path),
                want=f"schema_version {SCHEMA_VERSION}",
                got=f"schema_version {manifest.schema_version} (depthwire {manifest.depthwire})",
                todo="Convert the model again, or use the version that wrote it.",
            )
        artifact = cls(root, manifest)
        artifact._check_files(check_hashes=check_hashes)
        return artifact

    def path(self, name: str) -> Path:
        """Return the path of a member; refuses names that leave the directory."""
        pure = PurePosixPath(name)
        inside = not pure.is_absolute() and ".." not in pure.parts and "\\" not in name
        target = self.root / pure
        if not inside or not target.resolve().is_relative_to(self.root.resolve()):
            raise ExportError(
                "artifact.path-outside",
                "The manifest names a file outside the artefact",
                at=str(self.root / MANIFEST),
                want="relative paths inside the directory",
                got=name,
                todo="Do not use this artefact: it was tampered with.",
            )
        return target

    @property
    def model(self) -> Path:
        """Path of ``model.onnx``, or of the graph that ``with_graph`` has chosen."""
        return self.path(self._graph)

    def with_graph(self, name: str) -> Artifact:
        """Return the artefact with another of its graphs as its model; manifest and files are the same."""
        return Artifact(self.root, self.manifest, name)

    def _check_files(self, *, check_hashes: bool) -> None:
        for name, entry in self.manifest.files.items():
            path = self.path(name)
            if not path.is_file():
                raise ExportError(
                    "artifact.file-missing",
                    "A file of the artefact is missing",
                    at=str(path),
                    want=f"{entry.bytes} bytes, sha256 {entry.sha256[:16]}…",
                    got="nothing",
                    todo="Copy the artefact again, whole, or convert again.",
                )
            size = path.stat().st_size
            found = f"{size} bytes"
            same = size == entry.bytes
            if same and check_hashes:
                digest = sha256_file(path)
                same, found = digest == entry.sha256, f"sha256 {digest[:16]}…"
            if not same:
                raise ExportError(
                    "artifact.hash-mismatch",
                    "A file of the artefact is not what the manifest says",
                    at=str(path),
                    want=f"{entry.bytes} bytes, sha256 {entry.sha256[:16]}…",
                    got=found,
                    todo="Copy the artefact again, or convert again; do not use it as it is.",
                )

    def add_file(self, name: str) -> None:
        """Hash a member that was just written and list it in the manifest (``write_manifest`` makes it durable)."""
        path = self.path(name)
        self.manifest.files[name] = FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))

    def write_manifest(self) -> None:
        """Write ``manifest.json`` atomically (temporary sibling, then rename)."""
        path = self.root / MANIFEST
        temporary = path.with_name(f".{MANIFEST}.{os.getpid()}")
        temporary.write_text(self.manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
