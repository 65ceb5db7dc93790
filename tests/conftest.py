"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if _WORKER is not None and hasattr(os, "sched_setaffinity"):
    # Workers that each ran a thread on every CPU would wait for each other's. torch is not imported yet.
    _CPUS = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_CPUS[int(_WORKER.removeprefix("gw")) % len(_CPUS)]})
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory."""
    directory = Path(os.environ.get("DEPTHWIRE_SMOLLM2", MODELS / "smollm2-135m-instruct"))
    if not (directory / "config.json").is_file():
        pytest.fail(f"the test model is not at {directory}: fetch it first, or set DEPTHWIRE_SMOLLM2")
    return directory


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The same model as a GGUF file."""
    files = sorted(MODELS.glob("*.gguf"))
    if not files:
        pytest.skip(f"no .gguf file in {MODELS}")
    return files[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests on real models: a worker that came to them last would leave the others idle."""
    items.sort(key=lambda item: "/e2e/" not in str(item.path))
