"""What the device is: board, L4T, GPU, TensorRT, memory, disk, power mode. Reads only, judges nothing.

Everything that is a file or a command of the system is looked up below a root directory, ``/`` by default.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from depthwire.runtime.deploy.cuda import Gpu, find_gpu

MODEL = "proc/device-tree/model"
COMPATIBLE = "proc/device-tree/compatible"
RELEASE = "etc/nv_tegra_release"
MEMORY = "proc/meminfo"
SWAPS = "proc/swaps"
_RELEASE = re.compile(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)")
_COMMAND_SECONDS = 20.0
_SMI_FIELDS = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks_event_reasons.active,power.draw,power.limit,"
    "temperature.gpu,persistence_mode"
)


@dataclass(frozen=True)
class Memory:
    """The machine's memory in bytes, from ``/proc/meminfo`` and ``/proc/swaps``.

    Attributes:
        total: All of it.
        available: What a new process can take without swapping.
        swap_free: Free swap of every kind.
        zram: The part of the swap that is compressed memory, not disk.
    """

    total: int
    available: int
    swap_free: int
    zram: int

    def as_dict(self) -> dict[str, int]:
        """Return it JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Device:
    """Everything that is known of the device before a build.

    Attributes:
        board: ``/proc/device-tree/model``; ``None`` where there is no device tree.
        compatible: ``/proc/device-tree/compatible``, which names the module by its part number.
        l4t: Release of Jetson Linux, ``36.4.3``.
        gpu: The first GPU.
        no_gpu: Why there is none.
        package: Module of the builder that was looked for.
        tensorrt: Its version; ``None`` where it cannot be imported.
        no_tensorrt: Why not.
        polygraphy: Version of Polygraphy, ``None`` where it is absent.
        numpy: Version of numpy.
        python: Version of Python.
        machine: Architecture and kernel.
        memory: ``None`` where ``/proc/meminfo`` cannot be read.
        disk_free: Bytes free for the work directory.
    """

    board: str | None
    compatible: str | None
    l4t: str | None
    gpu: Gpu | None
    no_gpu: str
    package: str
    tensorrt: str | None
    no_tensorrt: str
    polygraphy: str | None
    numpy: str | None
    python: str
    machine: str
    memory: Memory | None
    disk_free: int

    def as_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)


def probe(root: Path, package: str, work: Path) -> Device:
    """Look at the device.

    Args:
        root: Root directory of the system's files.
        package: ``tensorrt`` or ``tensorrt_rtx``.
        work: The work directory, which exists.
    """
    gpu, no_gpu = find_gpu()
    tensorrt, no_tensorrt = _tensorrt(package)
    return Device(
        board=_text(root / MODEL),
        compatible=_text(root / COMPATIBLE),
        l4t=read_l4t(root),
        gpu=gpu,
        no_gpu=no_gpu,
        package=package,
        tensorrt=tensorrt,
        no_tensorrt=no_tensorrt,
        polygraphy=_version("polygraphy"),
        numpy=_version("numpy"),
        python=platform.python_version(),
        machine=f"{platform.machine()}, {platform.system()} {platform.release()}",
        memory=read_memory(root),
        disk_free=shutil.disk_usage(work).free,
    )


def read_l4t(root: Path) -> str | None:
    """Return the release of Jetson Linux, ``36.4.3``, from ``/etc/nv_tegra_release``."""
    match = _RELEASE.search(_text(root / RELEASE) or "")
    return None if match is None else f"{match[1]}.{match[2]}"


def read_memory(root: Path) -> Memory | None:
    """Return the machine's memory now, ``None`` where the system does not tell it."""
    if sys.platform == "win32":
        return _windows_memory()
    text = _text(root / MEMORY)
    if text is None:
        return None
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    if not {"MemTotal", "MemAvailable"} <= set(fields):
        return None
    swaps = [line.split() for line in (_text(root / SWAPS) or "").splitlines()[1:]]
    zram = sum(int(row[2]) for row in swaps if len(row) > 2 and Path(row[0]).name.startswith("zram"))
    total, available, swap = (int(fields.get(name, 0)) for name in ("MemTotal", "MemAvailable", "SwapFree"))
    return Memory(total * 1024, available * 1024, swap * 1024, zram * 1024)


def _windows_memory() -> Memory | None:
    """Return the machine's memory from ``GlobalMemoryStatusEx``; not run: Depthwire's tests have no Windows."""
    import ctypes

    # MEMORYSTATUSEX of sysinfoapi.h: two DWORDs, then seven DWORDLONGs.
    names = ("total", "available", "total_page", "available_page", "total_virtual", "available_virtual", "extended")
    fields = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong), *((name, ctypes.c_uint64) for name in names)]
    status = type("MemoryStatus", (ctypes.Structure,), {"_fields_": fields})()
    status.length = ctypes.sizeof(status)
    kernel = getattr(ctypes, "windll", None)
    if kernel is None or not kernel.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    # The page file backs what is committed; what is free of it beyond memory is swap on disk.
    return Memory(status.total, status.available, max(status.available_page - status.available, 0), 0)


def read_power(root: Path) -> dict[str, str]:
    """Return what the system's own tools say of power mode and clocks, by command; empty where none is there."""
    commands = {
        "nvpmodel -q": ("nvpmodel", "-q"),
        "jetson_clocks --show": ("jetson_clocks", "--show"),
        "nvidia-smi": ("nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv"),
    }
    found = {}
    for name, (command, *arguments) in commands.items():
        places = (root / folder / command for folder in ("usr/bin", "usr/sbin"))
        program = next((place for place in places if os.access(place, os.X_OK)), None)
        if program is None:
            continue
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            # Root may be needed for jetson_clocks: what it says then is recorded as it is.
            done = subprocess.run(  # noqa: S603 - a tool of the system by its full path
                [str(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_COMMAND_SECONDS,
                check=False,
            )
            found[name] = done.stdout.decode("utf-8", "replace").strip()
    return found


def peak_rss(pid: int) -> int:
    """Return the largest resident set of a process so far in bytes (``VmHWM``), 0 when it is gone."""
    match = re.search(r"^VmHWM:\s+(\d+) kB", _text(Path(f"/proc/{pid}/status")) or "", re.MULTILINE)
    return 0 if match is None else int(match[1]) * 1024


def _tensorrt(package: str) -> tuple[str | None, str]:
    if importlib.util.find_spec(package) is None:
        return None, f"no module {package} in {sys.executable}"
    try:
        return str(importlib.import_module(package).__version__), ""
    except Exception as error:  # noqa: BLE001 - a native library can fail to load in any way; it is told, not hidden
        return None, f"{type(error).__name__}: {error}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        # Debian's packages of JetPack may lack the metadata.
        spec = importlib.util.find_spec(package)
        return None if spec is None else str(getattr(importlib.import_module(package), "__version__", "unknown"))


def _text(path: Path) -> str | None:
    """Return a file's text without the NULs that end the strings of a device tree."""
    try:
        return path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return None
