"""Fetch ONNX Runtime's C headers, which its Python wheels leave out, and unpack them: what ``make native`` builds with.

They come from the npm package ``com.github.asus4.onnxruntime`` (MIT), which carries the complete headers of a release
in its iOS framework. The archive (150 MB) is checked against its hash, the headers (1 MB) are kept and the rest is
thrown away. Those of an ONNX Runtime that is installed serve as well: ``make native ORT_INCLUDE_DIR=/its/include``.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from pathlib import Path, PurePosixPath

PACKAGE = "com.github.asus4.onnxruntime"
VERSION = "0.4.9"
SHA256 = "e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d"
FOLDER = "package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers"
REGISTRY = "https://registry.npmjs.org"


def download(folder: Path) -> Path:
    """Download the archive into a folder, through npm where it is there, so that its settings (mirror, proxy) hold.

    Raises:
        SystemExit: The archive is not the one that was pinned.
    """
    archive = folder / f"{PACKAGE}-{VERSION}.tgz"
    npm = shutil.which("npm")
    if npm is not None:
        command = [npm, "pack", "--silent", "--pack-destination", str(folder), f"{PACKAGE}@{VERSION}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - fixed arguments
    else:
        address = f"{REGISTRY}/{PACKAGE}/-/{archive.name}"
        with urllib.request.urlopen(address) as source, archive.open("wb") as sink:  # noqa: S310 - a fixed https address
            shutil.copyfileobj(source, sink)
    digest = _digest(archive)
    if digest != SHA256:
        raise SystemExit(f"{archive.name} has sha256 {digest}, wanted {SHA256}")
    return archive


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(archive: Path, target: Path) -> None:
    """Write the headers of the archive, and nothing else of it, into a folder."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if member.isfile() and str(path.parent) == FOLDER and path.suffix == ".h":
                source = tar.extractfile(member)
                assert source is not None  # noqa: S101 - a regular file has content
                with source, (part / path.name).open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def main() -> None:
    """Fetch and unpack, unless they are there already; print the include directory."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=root / ".cache" / "onnxruntime-headers")
    target: Path = parser.parse_args().cache / VERSION
    if not (target / "onnxruntime_c_api.h").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            unpack(download(Path(scratch)), target)
    print(target)  # noqa: T201 - the command's result


if __name__ == "__main__":
    main()
