"""Our own runner: it takes the kernels by itself, on demand or not at all, and both ways pass ``verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import depthwire
from depthwire.errors import BuildError
from depthwire.runtime.native import OPS_ENTRY
from depthwire.runtime.onnxruntime import reads_run_by, run_session, session_from_artifact
from depthwire.runtime.verify import format_report, verify
from tests.cli.models import save_tiny_llama

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire.artifact import Artifact


@pytest.fixture(scope="module")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("lifted")
    source = save_tiny_llama(folder / "tiny")
    return depthwire.export(source, folder / "out", attn_res="full", seq_len=16)


def test_kernels_and_bodies_compute_the_same(lifted: Artifact) -> None:
    ids = np.random.default_rng(0).integers(0, 90, (1, 16))
    ids = ids.astype(np.dtype(lifted.manifest.inputs[0].dtype))
    feeds = {lifted.manifest.inputs[0].name: ids}
    fused, bodies = (run_session(session_from_artifact(lifted, kernels=flag), feeds) for flag in (True, False))
    for name, value in bodies.items():
        np.testing.assert_allclose(fused[name], value, rtol=1e-4, atol=1e-5)
        assert not np.array_equal(fused[name], value)  # two ways of rounding: both really ran


@pytest.mark.parametrize("kernels", [True, False])
def test_both_verify_and_the_report_says_which_ran(lifted: Artifact, *, kernels: bool) -> None:
    report = verify(lifted, original=None, rewritten=None, windows=[], kernels=kernels)
    assert report.passed
    ran = report.tools["reads by"]
    assert ran.endswith(" kernels") if kernels else ran == "function bodies"
    assert f"reads by {ran}" in format_report(report)[0]


def test_kernels_are_taken_by_themselves(lifted: Artifact) -> None:
    options = session_from_artifact(lifted).get_session_options()
    assert options.get_session_config_entry(OPS_ENTRY).startswith("AttnRes")
    assert str(reads_run_by(lifted)).endswith(" kernels")
    assert reads_run_by(lifted, kernels=False) == "function bodies"


def test_without_the_library(lifted: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("depthwire.runtime.native._LIBRARY", tmp_path / "absent.so")
    assert reads_run_by(lifted) == "function bodies"
    session_from_artifact(lifted)
    with pytest.raises(BuildError, match=r"runtime\.no-kernels"):
        session_from_artifact(lifted, kernels=True)
