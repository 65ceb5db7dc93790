"""The trained SmolLM2-135M, converted once for all tests of this folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TEXT = Path(__file__).parent.parent / "data" / "sotu-2000.txt"


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "depthwire", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="session")
def short_artifact(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model at 128 tokens, for the tests that verify again and again."""
    out = tmp_path_factory.mktemp("short") / "artifact"
    arguments = ("--attn-res", "block:8", "--seq-len", "128", "--text", TEXT, "--windows", "1", "--target", "rtx")
    done = run("convert", smollm2_dir, *arguments, "--no-build", "-o", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def smollm2_artifact(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M lifted to Block AttnRes with eight blocks, exported and verified on four windows of real text."""
    out = tmp_path_factory.mktemp("smollm2") / "artifact"
    arguments = ("--attn-res", "block:8", "--seq-len", "512", "--text", TEXT, "--windows", "4", "--target", "rtx")
    done = run("convert", smollm2_dir, *arguments, "--no-build", "-o", out)
    assert done.returncode == 0, done.stderr
    return out
