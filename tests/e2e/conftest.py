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


def _converted(model: Path, out: Path, *, length: int, windows: int, schedule: str) -> Path:
    """Convert SmolLM2 with eight blocks of AttnRes and verify it on real text, without an engine."""
    shape = ("--attn-res", "block:8", "--seq-len", str(length), "--windows", str(windows), "--schedule", schedule)
    done = run("convert", model, *shape, "--text", TEXT, "--target", "rtx", "--no-build", "-o", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def short_artifact(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model at 128 tokens, each read by itself, for the tests that verify again and again."""
    out = tmp_path_factory.mktemp("short") / "artifact"
    return _converted(smollm2_dir, out, length=128, windows=1, schedule="single")


@pytest.fixture(scope="session")
def smollm2_artifact(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model at 512 tokens, verified on four windows."""
    out = tmp_path_factory.mktemp("smollm2") / "artifact"
    return _converted(smollm2_dir, out, length=512, windows=4, schedule="auto")
