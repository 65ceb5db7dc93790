"""A device to run bundles on: a Python without torch and Depthwire, and a root directory with a system's files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthwire.runtime.deploy.manifest import SCRIPT

if TYPE_CHECKING:
    from collections.abc import Sequence

NEEDED = ("numpy*", "polygraphy*", "tensorrt_rtx*")
ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: …\n",
}


def make_python(folder: Path) -> Path:
    """Create a virtual environment with nothing but numpy, polygraphy and tensorrt-rtx; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    spec = importlib.util.find_spec("numpy")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parent.parent
    for pattern in NEEDED:
        found = list(installed.glob(pattern))
        assert found, pattern
        for path in found:
            (packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


def make_system(
    root: Path, *, available: int = 8 << 30, total: int = 16 << 30, swap: int = 0, files: dict[str, str] | None = None
) -> Path:
    """Write the files of a system that the script reads; sizes in bytes."""
    fields = {"MemTotal": total, "MemFree": available, "MemAvailable": available, "SwapTotal": swap, "SwapFree": swap}
    meminfo = "".join(f"{name}: {size // 1024} kB\n" for name, size in fields.items())
    for name, text in {"proc/meminfo": meminfo, **(files or {})}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@dataclass(frozen=True)
class Ran:
    """How the script ended.

    Attributes:
        code: Its exit code.
        lines: What it printed for people.
        result: The JSON it printed.
    """

    code: int
    lines: str
    result: dict[str, Any]

    def check(self, name: str) -> dict[str, Any]:
        """Return one of its checks."""
        found: dict[str, Any] = next(check for check in self.result["checks"] if check["name"] == name)
        return found

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [check["name"] for check in self.result["checks"] if not check["passed"]]


def command(python: Path, bundle: Path, *arguments: str) -> list[str]:
    """Return the command line that a user of the device types, with ``--json``."""
    return [str(python), str(bundle / SCRIPT), "--json", *arguments]


def run(python: Path, bundle: Path, *arguments: str, environment: dict[str, str] | None = None, **options: Any) -> Ran:
    """Run the script, from another directory than the bundle's and without anything of ours in the environment."""
    done = subprocess.run(
        command(python, bundle, *arguments),
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **(environment or {})},
        timeout=300,
        check=False,
        **options,
    )
    assert done.stdout, done.stderr
    return Ran(done.returncode, done.stderr, json.loads(done.stdout))


def edit(bundle: Path, **fields: Any) -> None:
    """Change fields of ``bundle.json``, dotted names as ``platform__package``."""
    path = bundle / "bundle.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    for name, value in fields.items():
        *parents, last = name.split("__")
        place = raw
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place[parent]
        place[last] = value
    path.write_text(json.dumps(raw), encoding="utf-8")


def files_of(folder: Path, ignore: Sequence[str] = ()) -> set[str]:
    """Return the names of all files below a folder."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if name not in ignore and "__pycache__" not in name}
