"""The compiled kernels of one model: a folder of cubins beside it, with an index that a launcher can read.

``kernels.tsv`` has a header line and one line a cubin, tab-separated: the key of the kernel (``KernelSpec.key``), the
compute capability as a number, the file, its SHA-256, the symbol, threads of a block, bytes of dynamic shared memory,
blocks a row (of a routing kernel: slots or tokens a block), and the number of the kernel's parameters.
``runtime/native/cuda`` reads it.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import astuple, dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from depthwire.errors import BuildError
from depthwire.runtime.triton.compile import compile_kernel
from depthwire.runtime.triton.routing_bundle import described_inputs, is_routing, routing_kernels
from depthwire.runtime.triton.spec import KernelSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from onnx import ModelProto, NodeProto

    from depthwire.runtime.triton.compile import Spec

INDEX: Final = "kernels.tsv"
HEADER: Final = "depthwire-kernels 1"

_DTYPES: Final = {1: "float32", 10: "float16", 16: "bfloat16"}


@dataclass(frozen=True)
class Entry:
    """One line of the index; the fields are its columns.

    Attributes:
        key: ``KernelSpec.key``.
        capability: Compute capability as a number, 87 for SM87.
        file: Name of the cubin in the folder.
        sha256: Of the cubin.
        symbol: Name of the kernel in the cubin.
        threads: Of a block.
        shared: Bytes of dynamic shared memory.
        programs: Blocks for each row of the sources; of a routing kernel, slots or tokens of a block, 1 where a block
            has a whole row.
        parameters: Number of inputs, outputs, T and K where a kernel takes them, and triton's hidden pointers, which
            are null.
    """

    key: str
    capability: int
    file: str
    sha256: str
    symbol: str
    threads: int
    shared: int
    programs: int
    parameters: int


def kernels_of(model: Path) -> list[Spec]:
    """Return the kernels of all depth-attention and routing operators of an ONNX file, each once, in their order.

    Raises:
        BuildError: ``triton.untyped`` if the file does not tell the width or dtype of an operator's operands.
        UsageError: ``triton.bad-spec`` for an operator of which there is no kernel.
    """
    import onnx

    nodes, types = operators_of(onnx.load(str(model), load_external_data=False))
    return list({spec.key: spec for node in nodes for spec in _specs(node, types)}.values())


def operators_of(model: ModelProto) -> tuple[list[NodeProto], dict[str, tuple[int, tuple[int, ...]]]]:
    """Return a file's depth-attention and routing operators, and element type and dimensions by value.

    A dimension that the file does not tell is 0.
    """
    import onnx

    types = _types(model)
    nodes = [node for node in model.graph.node if node.domain == "depthwire"]
    nodes = [node for node in nodes if node.op_type.startswith("AttnRes") or is_routing(node.op_type)]
    if any(name and name not in types for node in nodes for name in _needed(node)):
        types = _types(onnx.shape_inference.infer_shapes(model)) | types
    return nodes, types


def write_bundle(
    specs: Sequence[Spec],
    capabilities: Sequence[str],
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    replacing: Callable[[], None] | None = None,
) -> list[Entry]:
    """Compile kernels and write them to a folder, which appears only when it is whole.

    Args:
        specs: The operators.
        capabilities: Compute capabilities to compile each for, in any usual spelling.
        folder: Where to; replaced if it holds an earlier bundle.
        progress: Called after each cubin with the number of those done and of all.
        replacing: Called when all are compiled, before the folder changes.

    Raises:
        BuildError: As ``compile_kernel``; ``triton.not-a-bundle`` if the folder exists and holds something else.
        UsageError: As ``compile_kernel``.
    """
    if folder.exists() and not (folder / INDEX).is_file():
        raise _damaged(folder, "no folder yet, or one with an earlier bundle", "a folder without an index")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        fresh = Path(temporary) / "kernels"
        fresh.mkdir()
        entries: list[Entry] = []
        for spec, capability in product(specs, capabilities):
            entries.append(_write(fresh, spec, capability))
            if progress is not None:
                progress(len(entries), len(specs) * len(capabilities))
        lines = [HEADER, *("\t".join(map(str, astuple(entry))) for entry in entries)]
        (fresh / INDEX).write_text("\n".join(lines) + "\n", encoding="utf-8")
        if replacing is not None:
            replacing()
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    return entries


def read_bundle(folder: Path) -> list[Entry]:
    """Return the index of a bundle after checking every file against it.

    Raises:
        BuildError: ``triton.not-a-bundle``: no index, another version, or a file that is missing or another.
    """
    index = folder / INDEX
    if not index.is_file():
        raise _damaged(index, "the index of a bundle of kernels", "no such file")
    header, *lines = index.read_text(encoding="utf-8").splitlines() or [""]
    if header != HEADER:
        raise _damaged(index, repr(HEADER), repr(header))
    entries = []
    for line in lines:
        values = line.split("\t")
        kinds = [field.type for field in fields(Entry)]
        try:
            typed: list[Any] = [
                int(value) if kind == "int" else value for value, kind in zip(values, kinds, strict=True)
            ]
        except ValueError as error:
            raise _damaged(index, f"{len(kinds)} columns", repr(line)) from error
        entry = Entry(*typed)
        path = folder / entry.file
        if path.name != entry.file or not path.is_file():
            raise _damaged(path, "a cubin in the same folder", "no such file")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != entry.sha256:
            raise _damaged(path, f"sha256 {entry.sha256}", f"sha256 {found}")
        entries.append(entry)
    return entries


def _write(folder: Path, spec: Spec, capability: str) -> Entry:
    compiled = compile_kernel(spec, capability)
    file = f"{spec.key}-{compiled.capability.lower()}.cubin"
    (folder / file).write_bytes(compiled.cubin)
    return Entry(
        key=spec.key,
        capability=int(compiled.capability[2:]),
        file=file,
        sha256=hashlib.sha256(compiled.cubin).hexdigest(),
        symbol=compiled.symbol,
        threads=compiled.threads,
        shared=compiled.shared,
        programs=compiled.programs,
        parameters=len(compiled.parameters),
    )


def _types(model: ModelProto) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Element type and dimensions of every value that the file describes; 0 for an unknown dimension."""
    graph = model.graph
    found = {item.name: (int(item.data_type), tuple(item.dims)) for item in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        if tensor.elem_type and tensor.HasField("shape"):
            found.setdefault(value.name, (tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim)))
    return found


def _needed(node: NodeProto) -> Sequence[str]:
    return described_inputs(node) if is_routing(node.op_type) else node.input


def _specs(node: NodeProto, types: dict[str, tuple[int, tuple[int, ...]]]) -> Sequence[Spec]:
    if not is_routing(node.op_type):
        return [read_kernel(node, types)]
    found = routing_kernels(node, types)
    if found is None:
        raise untyped(node, types)
    return found


def read_kernel(node: NodeProto, types: Mapping[str, tuple[int, tuple[int, ...]]]) -> KernelSpec:
    """Return the kernel of a depth-attention operator.

    Raises:
        BuildError: ``triton.untyped``.
        UsageError: ``triton.bad-spec``.
    """
    import onnx

    given = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    attributes = {name: given[name] for name in ("eps", "scale", "last_bias", "norm_eps", "index") if name in given}
    query = types.get(node.input[0])
    # The last input is a source or delta; where a merge has neither it is the logsumexp, and the one before it counts.
    merge_0 = node.op_type.startswith("AttnResMerge") and node.op_type.endswith("_0")
    source = types.get(node.input[len(node.input) - 1 - merge_0])
    described = query is not None and source is not None and query[1] and query[1][-1] > 0 and query[1][0] > 0
    if not described or query is None or source is None:
        raise untyped(node, types)
    return KernelSpec(
        op_type=node.op_type,
        width=query[1][-1],
        dtype=_DTYPES.get(source[0], str(source[0])),  # type: ignore[arg-type]
        query_dtype=_DTYPES.get(query[0], str(query[0])),  # type: ignore[arg-type]
        queries=query[1][0] if len(query[1]) == 2 else 1,
        **attributes,
    )


def untyped(node: NodeProto, types: Mapping[str, tuple[int, tuple[int, ...]]]) -> BuildError:
    """Return the error about an operator on whose operands the file is silent."""
    return BuildError(
        "triton.untyped",
        "The file does not tell what this operator computes on",
        at=node.name or node.output[0],
        want="a dtype and shape of its inputs (value_info)",
        got=", ".join(name for name in _needed(node) if name not in types) or "an unknown width",
        todo="Convert the model with this version of Depthwire, which writes them.",
    )


def _damaged(at: Path, want: str, got: str) -> BuildError:
    return BuildError(
        "triton.not-a-bundle",
        "This is not a whole bundle of GPU kernels",
        at=str(at),
        want=want,
        got=got,
        todo="Write it again from the model, to a folder of its own.",
    )
