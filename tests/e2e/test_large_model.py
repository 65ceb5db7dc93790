"""A model of 1.5 billion parameters: past protobuf's 2 GB, within the memory of an ordinary machine."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import psutil
import pytest

from depthwire.artifact import MODEL, WEIGHTS, Artifact
from depthwire.errors import BuildError
from depthwire.runtime.target import load_target
from depthwire.runtime.tensorrt_rtx import build
from tests.e2e.conftest import run
from tools.make_large_model import write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GIB = 1 << 30
NEEDED_DISK, NEEDED_MEMORY = 14 * GIB, 14 * GIB

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("large")]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The converted model, verified on one window of 64 tokens."""
    root = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(root).free < NEEDED_DISK:
        pytest.skip(f"needs {NEEDED_DISK / GIB:.0f} GiB of disk")
    if psutil.virtual_memory().available < NEEDED_MEMORY:
        pytest.skip(f"needs {NEEDED_MEMORY / GIB:.0f} GiB of memory")
    count = write(root / "model")
    assert count > 1_500_000_000
    arguments = ("--attn-res", "block:8", "--seq-len", "64", "--windows", "1", "--target", "rtx", "--no-build")
    done = run("convert", root / "model", *arguments, "-o", root / "out")
    assert done.returncode == 0, done.stderr
    yield root / "out"
    shutil.rmtree(root)


def test_it_converts_verifies_and_stays_within_memory(large: Path) -> None:
    report = json.loads((large / "report.json").read_text(encoding="utf-8"))
    peaks = {stage["name"]: stage["peak_rss_bytes"] for stage in report["stages"]}
    assert report["verify"]["passed"] is True
    assert (large / WEIGHTS).stat().st_size > 6_000_000_000
    assert (large / MODEL).stat().st_size < 1 << 20
    assert max(peaks.values()) < 16 * GIB
    # The weights are mapped and let go of again: converting needs a fraction of them.
    assert max(peaks[name] for name in ("capture", "rewrite", "goldens", "export")) < 2 * GIB


def test_the_engine_is_refused_beforehand_where_memory_is_short(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with 8 GB the builder must not start; the message says what it would need."""
    from depthwire.runtime import memory

    monkeypatch.setattr(memory, "available_bytes", lambda: 8 * GIB)
    artifact = Artifact.load(large, check_hashes=False)
    with pytest.raises(BuildError) as caught:
        build(artifact, load_target("rtx"), compute_capabilities=["SM89"])
    assert caught.value.code == "build.out-of-memory"
    assert "GB" in str(caught.value.want) + str(caught.value.got)
    assert not (large / "engine").exists()
