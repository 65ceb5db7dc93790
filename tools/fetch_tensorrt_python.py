"""Fetch the Python side of TensorRT's plugins and its type stubs, which the tests run and check against.

``tensorrt.plugin`` is Python, and lies in the wheels of TensorRT's bindings; TensorRT itself is not needed. Those
files are kept of the oldest release that takes plugins ahead of time and of a recent one (Apache-2.0), and the stubs of
``tensorrt-stubs`` (MIT). Nothing is installed: a package named ``tensorrt`` without TensorRT would mislead others.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

BINDINGS = {
    "10.9": ("tensorrt-cu12-bindings==10.9.0.34", "50c78fd66dbb515b135d5f4fe28790f2eda119756950b51a6a45a77736a14b47"),
    "11.4": ("tensorrt-cu13-bindings==11.4.0.106", "d072ac2a095e2be749fefc847adfb25d5ebe70303401df62ede8fe67a59f27fc"),
}
STUBS = ("tensorrt-stubs==10.13.0.35.1", "749a36a1f825db0800a82d0dabbf7ef49f3a9edc1e794c9545fb94a551613fea")
PLUGIN = "tensorrt_bindings/plugin"


def download(requirement: str, digest: str, folder: Path) -> Path:
    """Download a wheel for CPython 3.11 on Linux, of which only text is used, and return it."""
    listed = folder / "requirements.txt"
    listed.write_text(f"{requirement} --hash=sha256:{digest}\n", encoding="utf-8")
    target = ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:"]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, *target, "--requirement", str(listed)]
    subprocess.run(command, check=True)  # noqa: S603 - fixed arguments
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, target: Path, folders: tuple[str, ...]) -> None:
    """Write the Python files of some folders of a wheel, and its licence, into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if (path.suffix in (".py", ".pyi") and str(path.parent) in folders) or "LICENSE" in path.name:
                place = target / ("LICENSE.txt" if "LICENSE" in path.name else name)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(archive.read(name))


def exported(folder: Path) -> str:
    """Return a stub of the package ``tensorrt.plugin``, whose names are put into it as it is imported."""
    lines = []
    for path in sorted(folder.glob("_*.py")):
        if path.stem != "__init__":
            names = [
                node.name
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, (ast.ClassDef, ast.FunctionDef))
                and any(ast.unparse(decorator).startswith("public_api") for decorator in node.decorator_list)
            ]
            lines += [f"from tensorrt.plugin.{path.stem} import {name} as {name}" for name in names]
    return "\n".join(lines) + "\n"


def repaired(stub: str) -> str:
    """Return the stub of the bindings as Python: two of its signatures, made by a tool, are none."""
    stub = re.sub(r"\bin: list\[", "in_: list[", stub)
    return re.sub(r"(def .* = None, channel_axis: int)\)", r"\1 = ...)", stub)


def fetch(target: Path) -> None:
    """Fill a folder: ``10.9`` and ``11.4`` as ``tensorrt_bindings/plugin``, ``stubs`` for a type checker."""
    for version, (requirement, digest) in BINDINGS.items():
        with tempfile.TemporaryDirectory() as scratch:
            unpack(download(requirement, digest, Path(scratch)), target / version, (PLUGIN,))
    with tempfile.TemporaryDirectory() as scratch:
        unpack(download(*STUBS, Path(scratch)), target / "stubs", ("tensorrt", "tensorrt_bindings"))
    bindings = target / "stubs/tensorrt_bindings/tensorrt.pyi"
    bindings.write_text(repaired(bindings.read_text(encoding="utf-8")), encoding="utf-8")
    # The stubs have no tensorrt.plugin: its source serves, with its names told.
    plugin = target / "stubs/tensorrt/plugin"
    shutil.copytree(target / "11.4" / PLUGIN, plugin)
    (plugin / "__init__.py").unlink()
    (plugin / "__init__.pyi").write_text(exported(plugin), encoding="utf-8")


def main() -> None:
    """Fetch and unpack, unless they are there already; print the folder."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=root / ".cache" / "tensorrt-python")
    target: Path = parser.parse_args().cache
    if not target.is_dir():
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        fetch(part)
        part.rename(target)
    print(target)  # noqa: T201 - the command's result


if __name__ == "__main__":
    main()
