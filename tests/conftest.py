"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
