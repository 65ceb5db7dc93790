"""The library of kernels for ONNX Runtime: where it lies, and how a session gets it.

``make native`` builds ``lib/libdepthwire_ort.so`` from the C++ sources beside this file. ONNX Runtime runs its kernels
in place of the function bodies that travel in the file; see ``docs/native.md``.
"""

from __future__ import annotations

import ctypes
import re
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from depthwire.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterable

ABI = 2
"""Version of the operators' interface; register.cpp returns the same number."""

OPS_ENTRY = "depthwire.ops"
"""Session configuration entry that names the operators to register; without it the library registers all."""

KERNELS_ENTRY = "depthwire.kernels"
"""Session configuration entry that names the folder of cubins; with it the CUDA provider gets kernels too."""

BUILD_COMMAND = "make native"

_LIBRARY = Path(__file__).resolve().parent / "lib" / "libdepthwire_ort.so"
_COUNTED = re.compile(r"(AttnRes[A-Za-z]+|SelectTokens|SelectTokensBudget)_(\d+)")
_PLAIN = frozenset({"GatherTokens", "ScatterTokens", "SurpriseScore"})


def library_path() -> Path | None:
    """Return the path of the library, or ``None`` where it is not built.

    Raises:
        BuildError: It was built from other sources, or cannot be loaded (``runtime.stale-kernels``).
    """
    if not _LIBRARY.is_file():
        return None
    try:
        found = int(ctypes.CDLL(str(_LIBRARY)).DepthwireAbi())
    except (OSError, AttributeError) as error:
        raise _stale(str(error)) from error
    if found != ABI:
        raise _stale(f"version {found} of the operators' interface")
    return _LIBRARY


def custom_ops_library() -> str:
    """Return the path of the library, for ``SessionOptions.register_custom_ops_library`` of a session of your own.

    Raises:
        BuildError: It is not built (``runtime.no-kernels``), or not usable (``runtime.stale-kernels``).
    """
    path = library_path()
    if path is None:
        raise BuildError(
            "runtime.no-kernels",
            "The library of kernels is not built",
            at=str(_LIBRARY),
            want="kernels for the depth-attention operators",
            got="no such file",
            todo=f"Build it in a checkout of Depthwire with '{BUILD_COMMAND}', or leave the kernels away: the function "
            "bodies in the file compute the same.",
        )
    return str(path)


def instruction_set() -> str | None:
    """Return what the kernels run on here: ``avx512``, ``avx2``, ``neon``, ``baseline``; ``None`` without library."""
    path = library_path()
    if path is None:
        return None
    function = ctypes.CDLL(str(path)).DepthwireInstructionSet
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def has_cuda_kernels() -> bool:
    """Whether the library is there and was built with the CUDA provider's kernels (``cuda.h`` was found)."""
    path = library_path()
    return path is not None and hasattr(ctypes.CDLL(str(path)), "DepthwireSelectCubin")


def ops_entry(names: Iterable[str]) -> str:
    """Return the value of ``OPS_ENTRY`` for some operators, counts in ranges: ``AttnResRead_2-9,GatherTokens``.

    Registering every operator takes ONNX Runtime most of a second in each session, those of a model some milliseconds.
    Names of operators that the library does not have are left out.
    """
    counts: dict[str, set[int]] = {}
    plain: set[str] = set()
    for name in names:
        own = name.rpartition("::")[2]
        match = _COUNTED.fullmatch(own)
        if match is not None:
            counts.setdefault(match[1], set()).add(int(match[2]))
        elif own in _PLAIN:
            plain.add(own)
    items = [f"{kind}_{span}" for kind in sorted(counts) for span in _spans(counts[kind])]
    return ",".join(items + sorted(plain))


def _spans(numbers: set[int]) -> list[str]:
    spans = []
    for _, pairs in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        spans.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return spans


def _stale(got: str) -> BuildError:
    return BuildError(
        "runtime.stale-kernels",
        "The library of kernels does not fit this version of Depthwire",
        at=str(_LIBRARY),
        want=f"version {ABI} of the operators' interface",
        got=got,
        todo=f"Build it again with '{BUILD_COMMAND}'.",
    )
