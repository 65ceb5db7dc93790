"""Build the wheels: Linux on x86-64 and aarch64 with the library of kernels, and one for any platform without it.

The libraries are compiled here by the package ``ziglang``, a C++ compiler that links for any CPU and glibc. The tag of
a wheel is read from the library in it: the newest symbol of glibc that it needs. See ``docs/wheels.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("passes", "export", "runtime", "models")
"""Packages that lie beside ``depthwire/`` and are linked into it."""
PROJECT = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
LIBRARY = "depthwire/runtime/native/lib/libdepthwire_ort.so"
CPUS = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}
"""Tag of each CPU, and how readelf calls it."""

GLIBC = "2.17"
"""What is linked for: that of manylinux2014, the oldest that ONNX Runtime's and torch's own wheels run on."""

_ADMITTED = re.compile(r"(libc|libm|librt|libdl|libpthread|ld-linux(-x86-64|-aarch64)?)\.so\.\d")


@dataclass(frozen=True)
class Needs:
    """What a shared library asks of the system that it is loaded on.

    Attributes:
        cpu: ``x86_64`` or ``aarch64``.
        libraries: Names of the libraries that it needs.
        glibc: The newest version of glibc that one of its symbols is from, as (2, 17).
        others: Versions of symbols of other libraries, such as ``GLIBCXX_3.4.30``.
    """

    cpu: str
    libraries: tuple[str, ...]
    glibc: tuple[int, int]
    others: tuple[str, ...]

    def platform(self) -> str:
        """Return the tag, ``manylinux_2_17_x86_64``.

        Raises:
            SystemExit: It needs what the manylinux policies (PEP 600) do not grant.
        """
        foreign = [name for name in self.libraries if not _ADMITTED.fullmatch(name)]
        if foreign or self.others:
            raise SystemExit(f"no manylinux library: it needs {', '.join([*foreign, *self.others])}")
        major, minor = max(self.glibc, (2, 17))
        return f"manylinux_{major}_{minor}_{self.cpu}"


def needs_of(library: Path) -> Needs:
    """Read a library's header, dynamic section and version needs.

    Raises:
        SystemExit: It is for another CPU.
    """
    text = _output("readelf", "--wide", "--file-header", "--dynamic", "--version-info", str(library))
    machine = re.search(r"Machine:\s+(.*)", text)
    found = "nothing" if machine is None else machine[1].strip()
    cpu = next((tag for tag, name in CPUS.items() if name == found), None)
    if cpu is None:
        raise SystemExit(f"{library} is for {found}, wanted {' or '.join(CPUS.values())}")
    libraries = tuple(sorted(re.findall(r"\(NEEDED\).*\[(.*)\]", text)))
    # "Name: GLIBC_2.17  Flags: none" stands under the versions that are needed, not under those that are defined.
    versions = set(re.findall(r"Name: (\S+)\s+Flags: \w+\s+Version:", text))
    numbers = {name: re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", name) for name in versions}
    glibc = max(((int(match[1]), int(match[2])) for match in numbers.values() if match is not None), default=(2, 0))
    others = tuple(sorted(name for name, match in numbers.items() if match is None))
    return Needs(cpu, libraries, glibc, others)


def compile_library(cpu: str, headers: Path) -> Path:
    """Compile the library of kernels for a CPU, whichever this machine has.

    Raises:
        SystemExit: The package ``ziglang`` is not installed.
    """
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise SystemExit("the package ziglang compiles the libraries: pip install ziglang, or give --library")
    build = ROOT / ".cache/native" / f"wheel-{cpu}"
    cmake = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_TOOLCHAIN_FILE": ROOT / "runtime/native/zig.cmake",
        "CMAKE_SHARED_LINKER_FLAGS": "-s",
        "ZIG": Path(spec.origin).with_name("zig"),
        "DEPTHWIRE_CPU": cpu,
        "DEPTHWIRE_GLIBC": GLIBC,
        "ORT_INCLUDE_DIR": headers.resolve(),
    }
    # Zig's cache beside the build: the home directory may not be writable where wheels are made.
    caches = {name: str(build.with_name("zig")) for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
    environment = {**os.environ, **caches}
    flags = [f"-D{name}={value}" for name, value in options.items()]
    _run([cmake, "-S", str(ROOT / "runtime/native"), "-B", str(build), *flags], environment)
    _run([cmake, "--build", str(build), "--parallel"], environment)
    return build / "libdepthwire_ort.so"


def sources() -> list[str]:
    """Return every file of the packages and of the project, relative to the root, without what git ignores."""
    listed = _output("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    names = sorted(set(listed.split("\0")))
    kept = [name for name in names if name in PROJECT or PurePosixPath(name).parts[:1] in {("depthwire",), *_parts()}]
    return [name for name in kept if (ROOT / name).is_file()]  # links to folders are none


def stage(folder: Path, library: Path | None) -> None:
    """Lay out a tree without links: the packages inside ``depthwire/``, the library if there is one."""
    for name in sources():
        inside = PurePosixPath(name).parts[:1] in _parts()
        target = folder / "depthwire" / name if inside else folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    if library is not None:
        target = folder / LIBRARY
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)
    for path in sorted(folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.suffix == ".so" else 0o644)


def build_wheel(out: Path, library: Path | None) -> Path:
    """Build one wheel.

    Args:
        out: Folder for it.
        library: The library of kernels in it; its needs decide the tag. ``None`` for the wheel of any platform.

    Returns:
        Its path.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        stage(tree, library)
        return pack(tree, out, library)


def pack(tree: Path, out: Path, library: Path | None) -> Path:
    """Build the wheel of a staged tree; the same tree gives the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    if library is not None:
        command += ["--config-settings", f"--build-option=--plat-name={needs_of(library).platform()}"]
    with tempfile.TemporaryDirectory() as made:
        _run([*command, "--wheel-dir", made, str(tree)], {**os.environ, "SOURCE_DATE_EPOCH": str(epoch())})
        (wheel,) = Path(made).iterdir()
        return Path(shutil.move(wheel, out / wheel.name))


def epoch() -> int:
    """Return the time that files in a wheel carry: ``SOURCE_DATE_EPOCH``, else that of the last commit."""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or _output("git", "-C", str(ROOT), "log", "-1", "--format=%ct"))


def _parts() -> set[tuple[str, ...]]:
    return {(folder,) for folder in FOLDERS}


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - fixed arguments


def _run(command: list[str], environment: dict[str, str]) -> None:
    subprocess.run(command, check=True, env=environment)  # noqa: S603 - fixed arguments


def main() -> None:
    """Build the wheels and print their paths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--only", choices=[*CPUS, "any"], action="append", help="one of the wheels; may be repeated")
    parser.add_argument(
        "--library", type=Path, action="append", default=[], help="take this, compile nothing for its CPU"
    )
    parser.add_argument("--ort-include-dir", type=Path, default=ROOT / ".cache/onnxruntime-headers/0.4.9")
    arguments = parser.parse_args()
    given = {needs_of(library).cpu: library for library in arguments.library}
    for kind in arguments.only or [*CPUS, "any"]:
        library = None if kind == "any" else given.get(kind) or compile_library(kind, arguments.ort_include_dir)
        print(build_wheel(arguments.out, library))  # noqa: T201 - the command's result


if __name__ == "__main__":
    main()
