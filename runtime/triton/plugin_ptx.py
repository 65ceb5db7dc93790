"""A kernel's code as TensorRT launches it: parameters in TensorRT's order, and nothing else.

TensorRT passes to an ahead-of-time plugin the addresses of the node's inputs, then extra 32-bit integers, then the
addresses of its outputs. Triton's ``.entry`` has inputs, outputs, integers and two pointers of its own behind them, and
none for an input that the kernel does not read. So the declarations of the parameters are put into order: the code
refers to them by name, and stays as it is. What comes out is assembled again, which proves it and shows its resources.

Triton names a GPU's own instruction set as the target (``sm_90a``), which later GPUs do not take. Where the assembler
agrees that the code uses nothing of it, the target becomes the plain ``sm_90`` and the PTX itself is shipped; else the
cubin.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from depthwire.errors import BuildError
from depthwire.runtime.triton.compile import HIDDEN_PARAMETERS, Compiled, compile_kernel, resources_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from depthwire.runtime.triton.compile import Spec

LARGEST_SHARED: Final = 48 * 1024
"""Bytes of shared memory that a launch may ask for without an attribute of the kernel, which TensorRT does not set."""

_POINTER: Final = ".param .u64 .ptr .global .align 1"
_ENTRY: Final = re.compile(r"(?P<head>\.visible \.entry (?P<symbol>\w+)\(\n)(?P<parameters>[^)]*)\n\)")
_TARGET: Final = re.compile(r"^\.target sm_\d+[af]?$", re.MULTILINE)


@dataclass(frozen=True)
class PluginCode:
    """What a plugin hands to TensorRT.

    Attributes:
        spec: The kernel.
        capability: Compute capability, as ``SM87``.
        symbol: Name of the kernel in the code.
        form: ``ptx``, compiled by the device's driver, or ``cubin`` where the PTX is specific to one GPU.
        code: PTX text in ASCII, or an ELF file.
        ptx: The PTX with its parameters in order, of either form.
        parameters: Names of the ``.entry``'s parameters in their order.
        threads: Of a block.
        shared: Bytes of dynamic shared memory to launch with.
        registers: Of a thread.
        spills: Bytes of a thread's stack, which only spilled registers use.
        cubin: What ``ptx`` assembles to, whatever the form.
    """

    spec: Spec
    capability: str
    symbol: str
    form: Literal["ptx", "cubin"]
    code: bytes
    ptx: str
    parameters: tuple[str, ...]
    threads: int
    shared: int
    registers: int
    spills: int
    cubin: bytes


def plugin_code(spec: Spec, capability: str, parameters: Sequence[str]) -> PluginCode:
    """Compile a kernel for TensorRT's launcher.

    Args:
        spec: The kernel.
        capability: Compute capability in any usual spelling.
        parameters: Names of all that TensorRT passes, in its order: every pointer of the kernel by the kernel's own
            name, its numbers by ``argument_name``, and inputs that it does not read.

    Raises:
        UsageError: As ``compile_kernel``.
        BuildError: As ``compile_kernel``; ``plugin.parameters`` if the kernel does not fit, ``plugin.resources`` if it
            spills or asks for more shared memory than a launch may, ``plugin.assembler``.
    """
    number = int(capability.upper().removeprefix("SM").replace(".", ""))
    compiled = compile_kernel(spec, capability, ptx_version=language_version(number))
    ptx = ordered(compiled, parameters)
    plain = _TARGET.sub(f".target sm_{number}", ptx)
    architecture = int(compiled.capability[2:])
    cubin, refusal = assemble(plain, architecture, f"sm_{architecture}")
    form: Literal["ptx", "cubin"] = "cubin" if cubin is None else "ptx"
    if cubin is None:
        cubin, refusal = assemble(ptx, architecture, f"sm_{architecture}a")
    if cubin is None:
        raise BuildError(
            "plugin.assembler",
            "The code of this plugin cannot be assembled",
            at=f"{spec.key}, {compiled.capability}",
            want="a cubin",
            got=refusal,
            todo="Use a triton release that Depthwire was tested with (constraints.txt), or the form 'function'.",
        )
    registers, spills = resources_of(cubin)
    if spills or compiled.shared > LARGEST_SHARED or registers * compiled.threads > 65536:
        raise BuildError(
            "plugin.resources",
            "This kernel does not fit the GPU as a plugin",
            at=f"{spec.key}, {compiled.capability}",
            want=f"no spilled registers, at most {LARGEST_SHARED} bytes of shared memory, 65536 registers a block",
            got=f"{spills} bytes spilled, {compiled.shared} bytes, {registers * compiled.threads} registers",
            todo="Make the bundle with the form 'function'.",
        )
    shipped = plain if form == "ptx" else ptx
    return PluginCode(
        spec=spec,
        capability=compiled.capability,
        symbol=compiled.symbol,
        form=form,
        code=shipped.encode("ascii") if form == "ptx" else cubin,
        ptx=shipped,
        parameters=entry_parameters(shipped)[1],
        threads=compiled.threads,
        shared=compiled.shared,
        registers=registers,
        spills=spills,
        cubin=cubin,
    )


def language_version(architecture: int) -> int:
    """Return the version of the PTX language to write for a GPU: what the oldest drivers in question compile.

    8.3 is that of CUDA 12.3. Later GPUs came with later versions: 8.8 is CUDA 12.9's, which has all from 10.0 on but
    11.0 (Thor), and that one's name is as old as CUDA 13.0, 9.0.
    """
    return 83 if architecture <= 90 else 90 if architecture == 110 else 88


def argument_name(scalar: str) -> str:
    """Return the name of a kernel's number among TensorRT's parameters, where ``slots`` is a tensor already."""
    return f"number_of_{scalar}"


def ordered(compiled: Compiled, parameters: Sequence[str]) -> str:
    """Return a kernel's PTX with named parameters in the order that is asked for, and without triton's own.

    Raises:
        BuildError: ``plugin.parameters``: the kernel takes others, or reads triton's own.
    """
    spec, ptx = compiled.spec, compiled.ptx
    names = (*spec.inputs, *spec.outputs, *map(argument_name, spec.scalars))
    entry = _ENTRY.search(ptx)
    declared = [line.strip().rstrip(",") for line in entry["parameters"].splitlines()] if entry else []
    hidden = [f"{compiled.symbol}_param_{len(names) + place}" for place in range(HIDDEN_PARAMETERS)]
    body = ptx[entry.end() :] if entry else ""
    read = [name for name in hidden if re.search(rf"\b{name}\b", body)]
    wrong = entry is None or len(declared) != len(names) + HIDDEN_PARAMETERS or set(names) - set(parameters)
    if entry is None or wrong or read or len(set(parameters)) != len(parameters):
        raise BuildError(
            "plugin.parameters",
            "The kernel does not take what TensorRT passes",
            at=f"{spec.key}, {compiled.capability}",
            want=", ".join(parameters),
            got=f"{', '.join(names)}; {len(declared)} declared, {len(read)} of triton's own read",
            todo="Use a triton release that Depthwire was tested with (constraints.txt), or the form 'function'.",
        )
    by_name = dict(zip(names, declared, strict=False))
    places = {f"{compiled.symbol}_param_{place}": f"{compiled.symbol}_{name}" for place, name in enumerate(names)}
    lines = [by_name.get(name, f"{_POINTER} {compiled.symbol}_{name}") for name in parameters]
    listed = ptx[: entry.start("parameters")] + ",\n".join(f"\t{line}" for line in lines) + "\n)" + body
    return re.sub(rf"\b{compiled.symbol}_param_\d+\b", lambda match: places[match[0]], listed)


def entry_parameters(ptx: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Return symbol, names and PTX types of the parameters of the one ``.entry``.

    Raises:
        ValueError: There is none.
    """
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError("no .entry with parameters")
    found = re.findall(rf"\.param (\.\w+)[^,\n]* {entry['symbol']}_(\w+)", entry["parameters"])
    return entry["symbol"], tuple(name for _, name in found), tuple(kind for kind, _ in found)


def assemble(ptx: str, architecture: int, target: str) -> tuple[bytes | None, str]:
    """Assemble PTX with triton's ptxas: the cubin or ``None``, and what ptxas says.

    Args:
        ptx: The text.
        architecture: Number of the GPU, by which triton chooses the assembler.
        target: ``sm_90`` or ``sm_90a``.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="ascii")
        # The option is triton's own, against an error of ptxas 13.
        command = [get_ptxas(architecture).path, "--regAllocOptLevel=2", f"--gpu-name={target}", str(source)]
        done = subprocess.run([*command, "-o", str(result)], capture_output=True, text=True, check=False)  # noqa: S603
        said = (done.stderr or done.stdout).strip()
        return (result.read_bytes() if done.returncode == 0 else None), said[:400]
