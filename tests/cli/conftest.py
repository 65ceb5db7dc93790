"""A tiny model and one conversion of it, shared by the tests of the verbs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from depthwire.cli.main import main
from tests.cli.models import save_tiny_llama

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers as a Hugging Face directory; not to be changed."""
    return save_tiny_llama(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="session")
def converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artefact (full AttnRes, 16 tokens, verified); not to be changed."""
    out = tmp_path_factory.mktemp("artefact") / "tiny"
    assert main(["convert", str(tiny), "-o", str(out), "--attn-res", "full", "--seq-len", "16", "--quiet"]) == 0
    return out
