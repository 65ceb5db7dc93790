"""ONNX Runtime's TensorRT providers: which are chosen, with which options, and how their absence is told."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from depthwire import api
from depthwire.artifact import Artifact
from depthwire.errors import BuildError, UsageError
from depthwire.runtime import ort_tensorrt
from depthwire.runtime.deploy.cuda import find_gpu
from depthwire.runtime.doctor import Finding, diagnose
from depthwire.runtime.onnxruntime import session_from_artifact
from depthwire.runtime.ort_context import build_context, open_context
from depthwire.runtime.ort_tensorrt import (
    CPU,
    CUDA,
    NV_TENSORRT_RTX,
    PLUGIN,
    PLUGIN_MODULE,
    TENSORRT,
    ProviderSettings,
    choose_providers,
    provider_options,
    session_entries,
    settings_of,
)
from tests.runtime import engine_models as models

if TYPE_CHECKING:
    from depthwire.runtime._route_network import Profile
    from depthwire.runtime.doctor import Status

NO_GPU = find_gpu()[0] is None
PROFILE: Profile = {"input_ids": ((1, 16), (8, 16), (8, 16)), "mask": ((1, 16), (8, 16), (8, 16))}


def machine(
    capability: str | None, *, plugin: Status = "missing", tensorrt: Status = "missing", cuda: bool = True
) -> list[Finding]:
    """Describe a machine as the doctor would."""
    gpu = Finding("NVIDIA GPU", "not-applicable", None, "no NVIDIA driver")
    if capability is not None:
        gpu = Finding("NVIDIA GPU", "present", "580.65", f"NVIDIA GPU, {capability}, 24564 MiB")
    inside = "cpu, cuda, tensorrt" if cuda else "cpu"
    return [
        Finding("onnxruntime", "present", "1.31.1", f"runs ONNX models (onnxruntime-gpu; providers in it: {inside})"),
        gpu,
        Finding(PLUGIN, plugin, None, ""),
        Finding("TensorRT provider", tensorrt, None, ""),
    ]


@pytest.mark.parametrize(
    ("findings", "names"),
    [
        (machine(None), [CPU]),
        (machine(None, plugin="present", tensorrt="present"), [CPU]),
        (machine("8.9"), [CUDA, CPU]),
        (machine("8.9", plugin="present", tensorrt="present"), [NV_TENSORRT_RTX, CUDA, CPU]),
        (machine("12.1", plugin="present", cuda=False), [NV_TENSORRT_RTX, CPU]),
        (machine("8.7", plugin="present", tensorrt="present"), [TENSORRT, CUDA, CPU]),
        (machine("9.0", plugin="present"), [CUDA, CPU]),
        (machine("9.0", tensorrt="present"), [TENSORRT, CUDA, CPU]),
        (machine("8.9", plugin="broken", tensorrt="broken"), [CUDA, CPU]),
    ],
)
def test_the_best_provider_of_a_machine_comes_first(findings: list[Finding], names: list[str]) -> None:
    assert choose_providers(findings) == [(name, {}) for name in names]


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
def test_this_machine_runs_on_the_cpu_and_the_doctor_says_why(tmp_path: Path) -> None:
    findings = diagnose()
    assert choose_providers(findings) == [(CPU, {})]
    found = {finding.name: finding for finding in findings}
    assert found["TensorRT provider"].status == "not-applicable"
    assert "libnvinfer.so.10" in found["TensorRT provider"].detail
    assert found[PLUGIN].remedy == ort_tensorrt.PLUGIN_LINE
    models.tiny(tmp_path)
    artifact = models.artifact_of(tmp_path)
    for provider in ("auto", "tensorrt", "nv-tensorrt-rtx"):
        with pytest.raises(BuildError) as caught:
            build_context(artifact, provider, findings=findings)
        assert caught.value.code == "build.no-tensorrt-provider"
        assert "no NVIDIA driver" in (caught.value.got or "")
    assert not (tmp_path / ort_tensorrt.FOLDER).exists()


def names_in_library() -> set[str]:
    """Return the options that ONNX Runtime's own TensorRT provider holds, by their names in its binary."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    library = Path(spec.origin).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    if not library.is_file():
        pytest.skip("this onnxruntime has no TensorRT provider")
    return {name.decode() for name in re.findall(rb"\0(trt_[a-z0-9_]+)(?=\0)", library.read_bytes())}


@pytest.mark.parametrize("context", [False, True])
def test_tensorrt_gets_options_that_its_provider_knows(tmp_path: Path, *, context: bool) -> None:
    settings = ProviderSettings(tmp_path, frozenset({"float16", "int8", "float32"}), PROFILE, context)
    options = provider_options(TENSORRT, settings)
    assert set(options) <= names_in_library()
    assert len(options) == (13 if context else 10)
    assert options["trt_fp16_enable"] == options["trt_int8_enable"] == options["trt_engine_cache_enable"] == "1"
    assert options["trt_bf16_enable"] == "0"
    assert options["trt_profile_min_shapes"] == "input_ids:1x16,mask:1x16"
    assert options["trt_profile_max_shapes"] == options["trt_profile_opt_shapes"] == "input_ids:8x16,mask:8x16"
    # The provider refuses an absolute path of its engines while it writes a compiled model.
    assert options["trt_engine_cache_path"] == ("engines" if context else str(tmp_path))
    assert options["trt_timing_cache_path"] == str(tmp_path)
    if context:
        assert options["trt_ep_context_file_path"] == str(tmp_path / "model_ctx.onnx")
        assert options["trt_dump_ep_context_model"] == options["trt_ep_context_embed_mode"] == "1"
    assert session_entries(TENSORRT, settings) == {}


def test_the_plugin_gets_its_options_and_the_session_its_entries(tmp_path: Path) -> None:
    settings = ProviderSettings(tmp_path, frozenset({"float32"}), PROFILE, context=True, embed=False)
    options = provider_options(NV_TENSORRT_RTX, settings)
    assert options == {
        "nv_runtime_cache_path": str(tmp_path / "runtime"),
        "nv_profile_min_shapes": "input_ids:1x16,mask:1x16",
        "nv_profile_opt_shapes": "input_ids:8x16,mask:8x16",
        "nv_profile_max_shapes": "input_ids:8x16,mask:8x16",
    }
    assert session_entries(NV_TENSORRT_RTX, settings) == {
        "ep.context_enable": "1",
        "ep.context_file_path": str(tmp_path / "model_ctx.onnx"),
        "ep.context_embed_mode": "0",
    }
    assert session_entries(NV_TENSORRT_RTX, ProviderSettings(tmp_path)) == {}
    assert provider_options(CPU, settings) == provider_options(CUDA, settings) == {}


@pytest.mark.skipif(importlib.util.find_spec(PLUGIN_MODULE) is None, reason=ort_tensorrt.PLUGIN_LINE)
def test_the_plugin_knows_its_options(tmp_path: Path) -> None:
    spec = importlib.util.find_spec(PLUGIN_MODULE)
    assert spec is not None
    assert spec.origin is not None
    header = (Path(spec.origin).parent / "tensorrt_rtx_provider_options.h").read_text(encoding="utf-8")
    options = provider_options(NV_TENSORRT_RTX, ProviderSettings(tmp_path, profile=PROFILE))
    assert set(options) <= set(re.findall(r'"(nv_[a-z_]+)"', header))


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
@pytest.mark.parametrize("name", [TENSORRT, NV_TENSORRT_RTX])
def test_a_provider_that_is_not_there_is_an_error_and_not_the_cpu(name: str, tmp_path: Path) -> None:
    models.tiny(tmp_path)
    artifact = models.artifact_of(tmp_path)
    options = provider_options(name, settings_of(artifact))
    with pytest.raises(BuildError) as caught:
        session_from_artifact(artifact, providers=[(name, options), CPU])
    assert caught.value.code == "runtime.no-provider"
    assert name in (caught.value.want or "")


def test_caches_lie_in_the_artefact(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    settings = settings_of(models.artifact_of(tmp_path), PROFILE, context=True)
    assert settings.folder == (tmp_path / "engine/ort-tensorrt").resolve()
    assert (settings.profile, settings.context, settings.embed) == (PROFILE, True, True)


def test_there_must_be_a_compiled_model_to_open(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    with pytest.raises(BuildError) as caught:
        open_context(Artifact.load(models.artifact_of(tmp_path).root))
    assert caught.value.code == "build.no-context"
    assert "--provider" in (caught.value.todo or "")


def test_a_session_takes_options_of_its_provider(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    session = session_from_artifact(models.artifact_of(tmp_path), providers=[(CPU, {})])
    assert session.get_providers() == [CPU]


def test_only_onnxruntime_on_a_gpu_has_providers_to_choose_from(tmp_path: Path) -> None:
    models.tiny(tmp_path)
    models.artifact_of(tmp_path)
    with pytest.raises(UsageError) as caught:
        api.build(tmp_path, target="rtx", provider="auto")
    assert caught.value.code == "build.provider"
