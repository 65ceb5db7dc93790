"""The kernels of every instruction set that this CPU has, by the self-test that comes with the library."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BUILDS = Path(__file__).resolve().parents[3] / ".cache/native"
QEMU = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]


def selftest(build: str, *emulator: str) -> set[str]:
    """Run it; return the instruction sets that it went through."""
    path = BUILDS / build / "kernels_selftest"
    if not path.is_file():
        pytest.skip(f"not built: make native{'' if build == 'release' else '-' + build}")
    done = subprocess.run([*emulator, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = re.findall(r"^(\w+) element [012]: (\d+) comparisons, 0 failed$", done.stdout, re.MULTILINE)
    assert all(int(number) > 200 for _, number in lines)
    assert len(lines) == 3 * len({name for name, _ in lines}) > 0
    routing = re.findall(r"^(\w+) routing: (\d+) comparisons, 0 failed$", done.stdout, re.MULTILINE)
    assert all(int(number) > 200 for _, number in routing)
    assert {name for name, _ in routing} == {name for name, _ in lines}
    return {name for name, _ in lines}


@pytest.mark.parametrize("build", ["release", "asan"])
def test_every_instruction_set_of_this_cpu(build: str) -> None:
    assert selftest(build) & {"baseline", "neon"}


@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="qemu-user is not installed")
def test_neon_under_emulation() -> None:
    assert selftest("aarch64", *QEMU) == {"neon"}
