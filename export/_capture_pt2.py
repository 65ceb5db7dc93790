"""A ``.pt2`` file is checked member by member, and only then loaded, from the very bytes that were checked."""

from __future__ import annotations

import importlib
import io
import json
import logging
import zipfile
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from depthwire._hash import sha256_file
from depthwire._logs import logs_disabled
from depthwire.errors import CaptureError
from depthwire.export._outputs import named_tensors
from depthwire.export._pt2_archive import Archive, invalid, unsafe
from depthwire.export._pt2_graph import check_model, check_payloads
from depthwire.export._pt2_rules import Refused
from depthwire.export._torch_export import functional, require_static
from depthwire.program import METADATA, Program, Source

if TYPE_CHECKING:
    from pathlib import Path

    from torch.export import ExportedProgram

    from depthwire.export._options import CaptureOptions

_NO_EFFECT = ("batch", "seq_len", "task", "dtype", "trust_remote_code", "image_size", "example_inputs", "padding")
_PLAIN_LEAVES = (Tensor, int, float, bool, str, type(None))


def capture_pt2(file: Path, options: CaptureOptions, *, reference: str) -> Program:
    """Load a program that ``torch.export.save`` or ``Program.save`` wrote.

    Raises:
        CaptureError: ``capture.pt2-unsafe``, ``capture.pt2-invalid``, ``capture.dynamic-shapes`` or
            ``capture.non-tensor``.
        UsageError: An option that would change a program which is fixed already.
    """
    options.refuse("a .pt2 file", _NO_EFFECT, "The program is fixed already: capture its model instead.")
    loaded, metadata = load_pt2(file)
    exported = functional(loaded)
    require_static(exported)
    leaves = [torch.empty(0) for _ in exported.graph_signature.user_outputs]
    spec = exported.call_spec.out_spec
    names = tuple(name for name, _ in named_tensors(tree_unflatten(leaves, spec)))
    if metadata.output_names:
        if len(set(metadata.output_names)) != len(names) or len(metadata.output_names) != len(names):
            raise invalid(file, f"{METADATA} names the outputs {metadata.output_names}, the program has {len(names)}")
        names = tuple(metadata.output_names)
    source = Source(
        "pt2",
        reference,
        sha256={file.name: sha256_file(file)},
        task=metadata.task,
        model=metadata.model,
        tokenizer=metadata.tokenizer,
    )
    return Program(exported, source, _example_inputs(exported), names)


class _Metadata(BaseModel):
    """What ``Program.save`` adds; a file that ``torch.export.save`` wrote has none of it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    output_names: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$")]] = []
    task: Literal["causal-lm", "encoder", "vision"] | None = None
    model: str | None = None
    tokenizer: str | None = None


def _metadata(archive: Archive) -> _Metadata:
    member = f"extra/{METADATA}"
    if member not in archive.sizes:
        return _Metadata()
    try:
        return _Metadata.model_validate_json(archive.read(member))
    except ValidationError as error:
        raise invalid(archive.path, f"{member}: {error.errors()[0]['msg']}") from error


def load_pt2(file: Path) -> tuple[ExportedProgram, _Metadata]:
    """Check a ``.pt2`` file and load the one program in it; nothing in it is executed.

    Raises:
        CaptureError: See ``capture_pt2``.
    """
    with file.open("rb") as opened:
        archive = Archive(file, opened)
        name = _program_name(archive)
        types, metadata = _check_documents(archive, name), _metadata(archive)
        _check_sample_inputs(archive, f"data/sample_inputs/{name}.pt")
        _register_types(types)
        # Below torch.export.load, which falls back to the unpickling loader of the older format.
        from torch.export.pt2_archive import _package

        archive.file.seek(0)
        try:
            with logs_disabled(logging.CRITICAL):
                contents = _package.load_pt2(cast("IO[bytes]", archive.file))
        except Exception as error:
            lines = str(error).splitlines()
            raise invalid(file, f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}") from error
    return contents.exported_programs[name], metadata


def _program_name(archive: Archive) -> str:
    models = [name for name in archive.sizes if name.startswith("models/")]
    if len(models) != 1:
        raise invalid(archive.path, f"{len(models)} programs in the archive, where one is wanted")
    for name, wanted in (("archive_format", b"pt2"), ("byteorder", b"little")):
        if name in archive.sizes and archive.read(name) != wanted:
            raise invalid(archive.path, f"{name} {archive.read(name)[:20]!r}")
    name = models[0].removeprefix("models/").removesuffix(".json")
    others = [member for member in archive.sizes if member.startswith("data/") and not _belongs(member, name)]
    if others:
        raise unsafe(archive.path, others[0], "it belongs to no program of the archive")
    return name


def _belongs(member: str, name: str) -> bool:
    return member in {
        f"data/weights/{name}_weights_config.json",
        f"data/constants/{name}_constants_config.json",
        f"data/sample_inputs/{name}.pt",
    } or not member.endswith((".json", ".pt"))


def _check_documents(archive: Archive, name: str) -> set[str]:
    """Check the three JSON members and return the types that the tree specs name."""
    member = f"models/{name}.json"
    try:
        types = check_model(_json(archive, member))
        for folder, kind in (("weights", "weight"), ("constants", "tensor")):
            member = f"data/{folder}/{name}_{folder}_config.json"
            prefix = f"data/{folder}/"
            sizes = {path.removeprefix(prefix): archive.sizes[path] for path in archive.payloads if prefix in path}
            check_payloads(_json(archive, member), kind, sizes)
    except RecursionError as error:
        raise unsafe(archive.path, member, "it is nested too deeply") from error
    except Refused as refused:
        if refused.dynamic:
            raise CaptureError(
                "capture.dynamic-shapes",
                "the program has shapes that are known only when it runs",
                at=f"{archive.path}: {member} {refused.where}",
                want="static shapes",
                got=refused.why,
                todo="Export it again without dynamic_shapes.",
            ) from refused
        raise unsafe(archive.path, f"{member} {refused.where}", refused.why) from refused
    return types


def _json(archive: Archive, member: str) -> Any:
    try:
        return json.loads(archive.read(member).decode("utf-8"))
    except ValueError as error:
        raise invalid(archive.path, f"{member} is not JSON: {error}") from error


def _check_sample_inputs(archive: Archive, member: str) -> None:
    """Require a pickle of plain tensors: torch, on any failure here, would load it again without restriction."""
    data = archive.read(member)
    if not data:
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as inner:
            stored = all(info.compress_type == zipfile.ZIP_STORED for info in inner.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise unsafe(archive.path, member, f"it is not what torch.save writes: {error}") from error
    if not stored:
        raise unsafe(archive.path, member, "it is compressed, which torch never does")
    try:
        inputs = torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise unsafe(archive.path, member, f"it is a pickle of more than tensors: {reason[:160]}") from error
    if not isinstance(inputs, tuple) or not all(isinstance(leaf, _PLAIN_LEAVES) for leaf in tree_leaves(inputs)):
        raise unsafe(archive.path, member, "it holds more than tensors and numbers")


def _register_types(types: set[str]) -> None:
    """Let torch know the output classes of transformers, which register themselves where they are defined."""
    if any(name.startswith("transformers.") for name in types) and importlib.util.find_spec("transformers"):
        importlib.import_module("transformers.modeling_outputs")


def _example_inputs(exported: ExportedProgram) -> dict[str, Tensor]:
    """Return the inputs saved with the program where they fit it, else deterministic ones of its shapes."""
    names = exported.graph_signature.user_inputs
    fakes = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    saved = tree_leaves(exported.example_inputs) if exported.example_inputs is not None else []
    if len(saved) == len(names) and all(
        isinstance(value, Tensor) and value.shape == fakes[name].shape and value.dtype == fakes[name].dtype
        for name, value in zip(names, saved, strict=True)
    ):
        return {str(name): value for name, value in zip(names, saved, strict=True)}
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in names:
        fake = fakes[name]
        shape = tuple(fake.shape)
        value = torch.randn(shape, generator=generator) if fake.dtype.is_floating_point else torch.zeros(shape)
        made[str(name)] = value.to(fake.dtype)
    return made
