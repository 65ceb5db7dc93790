"""Our own runner: it takes the kernels by itself, on demand or not at all, and both ways pass ``verify``."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest

import depthwire
from depthwire.artifact import Artifact
from depthwire.errors import BuildError
from depthwire.runtime import native
from depthwire.runtime.native import KERNELS_ENTRY, OPS_ENTRY
from depthwire.runtime.onnxruntime import (
    CPU,
    CUDA,
    KernelOptions,
    kernel_options,
    operators_run_by,
    run_session,
    session_from_artifact,
)
from depthwire.runtime.verify import format_report, verify
from tests.cli.models import save_tiny_llama

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@pytest.fixture(scope="module")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("lifted")
    source = save_tiny_llama(folder / "tiny")
    return depthwire.export(source, folder / "out", attn_res="full", seq_len=16)


@pytest.fixture(scope="module")
def with_cubins(lifted: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same artefact after ``depthwire kernels``."""
    out = shutil.copytree(lifted.root, tmp_path_factory.mktemp("cubins") / "out")
    depthwire.kernels(out, compute_capabilities=["SM87"])
    return Artifact.load(out)


def feeds_of(artifact: Artifact) -> dict[str, NDArray[Any]]:
    (ids,) = artifact.manifest.inputs
    return {ids.name: np.random.default_rng(0).integers(0, 90, (1, 16)).astype(np.dtype(ids.dtype))}


def test_kernels_and_bodies_compute_the_same(lifted: Artifact) -> None:
    feeds = feeds_of(lifted)
    fused, bodies = (run_session(session_from_artifact(lifted, kernels=flag), feeds) for flag in (True, False))
    for name, value in bodies.items():
        np.testing.assert_allclose(fused[name], value, rtol=1e-4, atol=1e-5)
        assert not np.array_equal(fused[name], value)  # two ways of rounding: both really ran


@pytest.mark.parametrize("kernels", [True, False])
def test_both_verify_and_the_report_says_which_ran(lifted: Artifact, *, kernels: bool) -> None:
    report = verify(lifted, original=None, rewritten=None, windows=[], kernels=kernels)
    assert report.passed
    ran = report.tools["operators by"]
    assert ran.endswith(" kernels") if kernels else ran == "function bodies"
    assert f"operators by {ran}" in format_report(report)[0]


def test_kernels_are_taken_by_themselves(lifted: Artifact) -> None:
    options = session_from_artifact(lifted).get_session_options()
    assert options.get_session_config_entry(OPS_ENTRY).startswith("AttnRes")
    assert str(operators_run_by(lifted)).endswith(" kernels")
    assert operators_run_by(lifted, kernels=False) == "function bodies"


def test_without_the_library(lifted: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("depthwire.runtime.native._LIBRARY", tmp_path / "absent.so")
    assert operators_run_by(lifted) == "function bodies"
    session_from_artifact(lifted)
    with pytest.raises(BuildError, match=r"runtime\.no-kernels"):
        session_from_artifact(lifted, kernels=True)


needs_cuda_part = pytest.mark.skipif(
    not native.has_cuda_kernels(),
    reason="the library was built without cuda.h, and so without the CUDA provider's kernels",
)


@needs_cuda_part
@pytest.mark.parametrize("providers", [(CUDA,), (CUDA, CPU)])
@pytest.mark.parametrize("kernels", [True, None])
def test_a_cuda_session_gets_the_cubins(
    with_cubins: Artifact,
    providers: tuple[str, ...],
    *,
    kernels: bool | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = with_cubins.root.resolve() / "kernels"
    monkeypatch.chdir(with_cubins.root)
    chosen = kernel_options(Artifact.load("."), providers, kernels=kernels)
    monkeypatch.chdir(tmp_path)
    entry = native.ops_entry(with_cubins.manifest.custom_ops)
    assert chosen == KernelOptions(native.custom_ops_library(), {OPS_ENTRY: entry, KERNELS_ENTRY: str(folder)})
    # The library takes them; without a GPU only its kernels for the CPU can run.
    options = onnxruntime.SessionOptions()
    chosen.apply(options)
    session = onnxruntime.InferenceSession(str(with_cubins.model), options, providers=[CPU])
    feeds = feeds_of(with_cubins)
    wanted = run_session(session_from_artifact(with_cubins, kernels=True), feeds)
    for name, value in run_session(session, feeds).items():
        np.testing.assert_array_equal(value, wanted[name])


def test_a_cuda_session_without_cubins_runs_function_bodies(lifted: Artifact) -> None:
    for providers in ((CUDA,), (CUDA, CPU)):
        assert kernel_options(lifted, providers) is None
        with pytest.raises(BuildError, match=r"runtime\.no-kernels") as caught:
            kernel_options(lifted, providers, kernels=True)
        assert f"depthwire kernels {lifted.root} --cc" in (caught.value.todo or "")


def test_cubins_are_for_the_cuda_provider_alone(with_cubins: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = kernel_options(with_cubins, (CPU,))
    assert on_cpu is not None
    assert set(on_cpu.entries) == {OPS_ENTRY}
    assert kernel_options(with_cubins, ("TensorrtExecutionProvider", CUDA)) is None
    assert kernel_options(with_cubins, (CUDA,), kernels=False) is None
    monkeypatch.setattr(native, "has_cuda_kernels", lambda: False)  # a library that was built without cuda.h
    assert kernel_options(with_cubins, (CUDA,)) is None
    with pytest.raises(BuildError, match=r"runtime\.no-kernels"):
        kernel_options(with_cubins, (CUDA,), kernels=True)


@needs_cuda_part
def test_cubins_that_the_library_cannot_read_are_refused(with_cubins: Artifact, tmp_path: Path) -> None:
    damaged = Artifact(shutil.copytree(with_cubins.root, tmp_path / "out"), with_cubins.manifest)
    (damaged.root / "kernels" / "kernels.tsv").write_text("no index", encoding="utf-8")
    with pytest.raises(BuildError) as caught:
        session_from_artifact(damaged, providers=(CUDA,))
    assert caught.value.code == "runtime.kernels-refused"
    assert "wanted 'depthwire-kernels 1'" in (caught.value.got or "")
