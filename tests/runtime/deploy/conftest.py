"""A device and a bundle for it, shared by the tests of what runs there."""

from __future__ import annotations

import shutil
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest

from depthwire.runtime.bundle import BundleOptions, write_bundle
from depthwire.runtime.target import load_target
from tests.routed_tiny import write_routed
from tests.runtime.deploy.device import make_python

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire.artifact import Artifact


@pytest.fixture(scope="session")
def device_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device's interpreter."""
    return make_python(tmp_path_factory.mktemp("device") / "venv")


@pytest.fixture(scope="session")
def routed_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tiny routed decoder with graphs of two capacities; not to be changed."""
    folder = tmp_path_factory.mktemp("artefact")
    artifact = write_routed(folder / "routed", (Fraction(1, 4),), target="decomposed")
    artifact.manifest.source.task = "causal-lm"
    artifact.write_manifest()
    return artifact


@pytest.fixture(scope="session")
def rtx_bundle(routed_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle for TensorRT-RTX, both capacities; not to be changed."""
    out = tmp_path_factory.mktemp("bundle") / "rtx"
    return write_bundle(routed_artifact, load_target("rtx"), out).root


@pytest.fixture(scope="session")
def small_bundle(routed_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one capacity; not to be changed."""
    out = tmp_path_factory.mktemp("bundle") / "small"
    return write_bundle(routed_artifact, load_target("rtx"), out, BundleOptions(capacities=("50%",))).root


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the small one that may be changed."""
    return shutil.copytree(small_bundle, tmp_path / "bundle")
