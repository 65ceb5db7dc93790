"""Fetch TensorRT's C++ headers, which its Python wheels leave out: what ``depthwire_run_trt`` compiles against.

They come from NVIDIA's repository (Apache-2.0), of the releases that ``RELEASES`` names; each set is checked against
its hash. An installed TensorRT or TensorRT-RTX serves as well: ``-DTENSORRT_INCLUDE_DIR=/its/include``.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

REPOSITORY = "https://github.com/NVIDIA/TensorRT"
RELEASES = {
    "10.3.0": ("v10.3.0", "ee0a01adfe5bb99aa76526af716fcc81579be3d10c628051b9d62a65e5d509e8"),
    "11.1.0": ("v11.1", "3aa3476230f1d593d349e249011a8e5236190af316d59909db3d6a37eeca5f96"),
}
"""Of JetPack 6.2, and the newest: tag, and SHA-256 over names and contents of its headers."""


def digest(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of a folder's headers, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("NvInfer*.h")):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def fetch(version: str, target: Path, repository: str = REPOSITORY) -> None:
    """Check out the folder ``include`` of one release, and keep its headers.

    Raises:
        SystemExit: They are not those that were pinned.
    """
    tag, wanted = RELEASES[version]
    git = shutil.which("git") or "git"
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        clone = [git, "clone", "--quiet", "--depth", "1", "--branch", tag, "--filter=blob:none", "--sparse"]
        quiet = ["-c", "advice.detachedHead=false"]
        subprocess.run([*clone, *quiet, repository, scratch], check=True)  # noqa: S603 - fixed arguments
        subprocess.run([git, "-C", scratch, "sparse-checkout", "set", "include"], check=True)  # noqa: S603
        found = digest(Path(scratch) / "include")
        if found != wanted:
            raise SystemExit(f"headers of {tag} have sha256 {found}, wanted {wanted}")
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for path in sorted((Path(scratch) / "include").glob("NvInfer*.h")):
            shutil.copy(path, part)
        part.rename(target)


def main() -> None:
    """Fetch what is not there already; print the include directories."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=root / ".cache" / "tensorrt-headers")
    parser.add_argument("--repository", default=REPOSITORY, help="a mirror of NVIDIA's")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    for version in RELEASES:
        target: Path = arguments.cache / version
        if not target.is_dir():
            fetch(version, target, arguments.repository)
        print(target)  # noqa: T201 - the command's result


if __name__ == "__main__":
    main()
