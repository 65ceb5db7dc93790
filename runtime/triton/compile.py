"""Compiling a kernel to a cubin for one GPU architecture; no GPU and no driver is needed.

What a kernel costs is read from the cubin itself: registers and stack of a thread with ``cuobjdump``, which the triton
package carries, and the launch's shared memory from triton's metadata. Nothing else of these kernels uses a stack, so
its bytes are those of spilled registers.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from depthwire.errors import BuildError, UsageError
from depthwire.runtime.target import parse_compute_capability
from depthwire.runtime.triton import launch, routing_launch
from depthwire.runtime.triton.routing_spec import RoutingSpec
from depthwire.runtime.triton.spec import TRITON_DTYPE

if TYPE_CHECKING:
    from depthwire.runtime.triton.spec import KernelSpec

    Spec = KernelSpec | RoutingSpec

CAPABILITIES: Final = ("SM75", "SM80", "SM86", "SM87", "SM89", "SM90", "SM100", "SM110", "SM120")
"""Compute capabilities that kernels are compiled and examined for."""

KNOWN: Final = tuple(sorted((*CAPABILITIES, "SM103", "SM121"), key=lambda name: int(name[2:])))
"""All that can be compiled for. One that LLVM does not know ends the whole process: it must never come that far."""

HIDDEN_PARAMETERS: Final = 2
"""Pointers that triton appends to the parameters: global and profile scratch. These kernels use neither: pass null."""

_ENTRY: Final = re.compile(r"\.visible \.entry (?P<symbol>\w+)\((?P<parameters>[^)]*)\)")
_RESOURCES: Final = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:\d+ LOCAL:(?P<local>\d+)")


@dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU architecture.

    Attributes:
        spec: The kernel.
        capability: Compute capability, as ``SM87``. Up to SM89 the cubin also runs on later minor versions of the same
            major; from SM90 on it is specific to this one.
        symbol: Name of the kernel in the cubin.
        cubin: The ELF file that ``cuModuleLoadData`` takes.
        ptx: What it was assembled from.
        parameters: PTX types of the kernel's parameters: the node's inputs, its outputs, numbers of tokens and slots
            where it takes them, and triton's two hidden ones.
        threads: Threads of a block.
        programs: Blocks a row of the sources; of a routing kernel, slots or tokens a block.
        registers: Of a thread.
        shared: Bytes of dynamic shared memory to launch with.
        spills: Bytes of a thread's stack, which only spilled registers use.
    """

    spec: Spec
    capability: str
    symbol: str
    cubin: bytes
    ptx: str
    parameters: tuple[str, ...]
    threads: int
    programs: int
    registers: int
    shared: int
    spills: int


def compile_kernel(spec: Spec, capability: str, *, ptx_version: int | None = None) -> Compiled:
    """Compile an operator's kernel.

    Args:
        spec: The kernel.
        capability: Compute capability in any usual spelling (``SM87``, ``8.7``).
        ptx_version: Version of the PTX language to keep to, 83 for 8.3; by default the newest that triton's assembler
            knows, which drivers older than it do not compile.

    Raises:
        UsageError: As ``capability_of``.
        BuildError: ``triton.missing``, ``triton.compile-failed``, or ``triton.parameters`` if the kernel's parameters
            are not the node's inputs and outputs.
    """
    capability = capability_of(capability)
    architecture = int(capability[2:])
    require_triton()
    for limit in _register_limits(spec):
        compiled = _triton_compile(spec, architecture, limit, ptx_version)
        ptx, cubin = str(compiled.asm["ptx"]), bytes(compiled.asm["cubin"])
        registers, spills = resources_of(cubin)
        if spills == 0:
            break
    entry = _ENTRY.search(ptx)
    parameters = tuple(re.findall(r"\.param (\.\w+)", entry["parameters"])) if entry else ()
    scalars = (".u32",) * len(spec.scalars)
    wanted = (".u64",) * (len(spec.inputs) + len(spec.outputs)) + scalars + (".u64",) * HIDDEN_PARAMETERS
    if entry is None or parameters != wanted:
        raise BuildError(
            "triton.parameters",
            "The compiled kernel does not take the node's inputs and outputs",
            at=f"{spec.key}, {capability}",
            want=" ".join(wanted),
            got=" ".join(parameters) or "no .entry in the PTX",
            todo="Use a triton release that Depthwire was tested with (constraints.txt).",
        )
    return Compiled(
        spec=spec,
        capability=capability,
        symbol=entry["symbol"],
        cubin=cubin,
        ptx=ptx,
        parameters=parameters,
        threads=32 * spec.launch.warps,
        programs=spec.launch.programs,
        registers=registers,
        shared=int(compiled.metadata.shared),
        spills=spills,
    )


def capability_of(text: str) -> str:
    """Return a compute capability as ``SM87`` if kernels can be compiled for it.

    Args:
        text: Any usual spelling (``SM87``, ``8.7``).

    Raises:
        UsageError: ``target.bad-compute-capability``; ``triton.compute-capability`` for one that is not in ``KNOWN``.
    """
    capability = parse_compute_capability(text)
    if capability not in KNOWN:
        raise UsageError(
            "triton.compute-capability",
            "The kernels cannot be compiled for this GPU",
            at="compute capability",
            want=f"one of {', '.join(KNOWN)}",
            got=capability if capability == text else f"{capability} (written {text!r})",
            todo="Run the function bodies there: leave the kernels out.",
        )
    return capability


def require_triton() -> str:
    """Return the version of triton.

    Raises:
        BuildError: ``triton.missing``.
    """
    try:
        import triton
    except ImportError as error:
        raise BuildError(
            "triton.missing",
            "GPU kernels are compiled by triton, which is not installed",
            at="import triton",
            want="triton 3.9 or later (Linux)",
            got=str(error),
            todo="pip install 'depthwire[triton]'",
        ) from error
    return str(triton.__version__)


def _triton_compile(spec: Spec, architecture: int, limit: int | None, ptx_version: int | None) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types: dict[str, Any] = {name: f"*{TRITON_DTYPE[spec.dtype_of(name)]}" for name in (*spec.inputs, *spec.outputs)}
    types |= dict.fromkeys(spec.scalars, "i32")
    if isinstance(spec, RoutingSpec):
        kernel, constants = routing_launch.kernel_of(spec), routing_launch.constants_of(spec)
        arguments = routing_launch.arguments_of(spec, types, absent="constexpr")
    else:
        kernel, constants = launch.kernel_of(spec), launch.constants_of(spec)
        arguments = launch.arguments_of(spec, types, absent="constexpr")
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    constants |= {name: None for name, kind in arguments.items() if kind == "constexpr"}  # type: ignore[misc]
    options: dict[str, Any] = {"num_warps": spec.launch.warps, "num_stages": spec.launch.stages}
    options |= {"enable_fp_fusion": True, "maxnreg": limit, "ptx_version": ptx_version}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # line tables would make up most of the cubin
        try:
            return triton.compile(
                ASTSource(kernel, signature, constexprs=constants, attrs=_alignment(arguments)),
                target=GPUTarget("cuda", architecture, 32),
                options=options,
            )
        except Exception as error:
            raise BuildError(
                "triton.compile-failed",
                "triton cannot compile this kernel",
                at=f"{spec.key}, SM{architecture}",
                want="a cubin",
                got=f"{type(error).__name__}: {error}",
                todo="Report it; until then leave this node to its function body.",
            ) from error


def _register_limits(spec: Spec) -> tuple[int | None, ...]:
    """Return the limits on a thread's registers to try in turn until nothing is spilled.

    Left to itself, the assembler at times spills a few bytes to fit one more block on an SM; told that a thread may use
    all the registers that the launch leaves it, it does not.
    """
    return None, min(255, 65536 // (32 * spec.launch.warps))


def _alignment(arguments: dict[str, Any]) -> dict[tuple[int, ...], list[list[str | int]]]:
    """Promise that every pointer is divisible by 16, as those of ONNX Runtime and TensorRT are; the launcher checks."""
    aligned: list[list[str | int]] = [["tt.divisibility", 16]]
    found: dict[tuple[int, ...], list[list[str | int]]] = {}
    for place, kind in enumerate(arguments.values()):
        if isinstance(kind, tuple):
            found |= {(place, index): aligned for index in range(len(kind))}
        elif kind.startswith("*"):
            found[place,] = aligned
    return found


def resources_of(cubin: bytes) -> tuple[int, int]:
    """Return registers and stack bytes of the one kernel of a cubin.

    Raises:
        BuildError: ``triton.compile-failed`` if it cannot be examined.
    """
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - triton's own tool
    match = _RESOURCES.search(done.stdout)
    if match is None:
        raise BuildError(
            "triton.compile-failed",
            "The compiled kernel cannot be examined",
            at=command[0],
            want="a line with REG, STACK, SHARED and LOCAL",
            got=(done.stderr or done.stdout).strip()[:400] or "no output",
            todo="Use a triton release that Depthwire was tested with (constraints.txt).",
        )
    return int(match["registers"]), max(int(match["stack"]), int(match["local"]))
