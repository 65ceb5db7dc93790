"""Find an OpenSSH server for the tests of ``depthwire bundle --on``, or fetch one: nothing is installed.

The system's ``sshd`` serves where there is one. Else, on Debian and Ubuntu, the packages are downloaded and unpacked
into ``.cache/sshd``, which needs no root; package lists that the system lacks are fetched into a temporary folder. On
other systems install OpenSSH's server, which need not run. The file ``.cache/sshd/path`` names what was found.
"""

from __future__ import annotations

import argparse
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

# sshd, and for root the library that lends it the user 'sshd', which only an installed server has.
PACKAGES = ("openssh-server", "libnss-wrapper")
HINT = "install OpenSSH's server (it need not run), then try again"


def libraries(root: Path) -> list[Path]:
    """Return the folders of the shared libraries in an unpacked tree."""
    return sorted({path.parent for path in root.glob("**/lib*.so*")})


def works(sshd: Path, root: Path) -> bool:
    """Whether a server starts so far that it prints its usage: all of its libraries are found."""
    paths = os.pathsep.join(str(path) for path in libraries(root))
    done = subprocess.run(  # noqa: S603 - fixed arguments
        [str(sshd), "-?"], env={**os.environ, "LD_LIBRARY_PATH": paths}, capture_output=True, text=True, check=False
    )
    return "OpenSSH" in done.stderr


def installed() -> Path | None:
    """Return the system's server where it can be used as it is; as root it also needs its user."""
    found = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
    if found is None:
        return None
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("sshd")
        except KeyError:
            return None
    return Path(found)


def download(folder: Path) -> list[Path]:
    """Download the packages that are missing, with what they need, into a folder.

    Raises:
        SystemExit: There is no apt, or it does not know the packages.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise SystemExit(f"no sshd, and no apt-get to fetch it with: {HINT}")
    options: list[str] = []
    names = _wanted(folder, options)
    if not names:
        (folder / "lists" / "partial").mkdir(parents=True)
        options = ["-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder}"]
        options += ["-o", "APT::Sandbox::User="]
        _apt(folder, options, "update")
        names = _wanted(folder, options)
    if not names:
        raise SystemExit(f"apt-get does not know {' '.join(PACKAGES)}: {HINT}")
    done = _apt(folder, ["-o", "APT::Sandbox::User=", *options], "download", *names)
    archives = sorted(folder.glob("*.deb"))
    if done.returncode or len(archives) != len(names):
        raise SystemExit(f"apt-get download failed: {done.stderr.strip()}")
    return archives


def _wanted(folder: Path, options: list[str]) -> list[str]:
    """Return the packages that an installation would bring; none where apt does not know them."""
    done = _apt(folder, options, "install", "--simulate", "--no-install-recommends", *PACKAGES)
    return re.findall(r"^Inst (\S+)", done.stdout, re.MULTILINE) if done.returncode == 0 else []


def _apt(folder: Path, options: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["apt-get", "-q", *options, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 - fixed


def main() -> None:
    """Find or fetch a server and print its path."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=root / ".cache" / "sshd")
    parser.add_argument("--download", action="store_true", help="fetch one even if the system has one")
    arguments = parser.parse_args()
    cache: Path = arguments.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    tree = cache / "root"
    sshd = None if arguments.download else installed()
    if sshd is None:
        sshd = tree / "usr" / "sbin" / "sshd"
        if not (sshd.is_file() and works(sshd, tree)):
            shutil.rmtree(tree, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                for archive in download(Path(scratch)):
                    subprocess.run(["dpkg", "-x", str(archive), str(tree)], check=True)  # noqa: S603, S607 - fixed
    if not works(sshd, tree):
        raise SystemExit(f"{sshd} does not start: {HINT}")
    (cache / "path").write_text(f"{sshd}\n", encoding="utf-8")
    print(sshd)  # noqa: T201 - the command's result


if __name__ == "__main__":
    main()
