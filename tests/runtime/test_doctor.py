from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from depthwire.runtime import doctor
from depthwire.runtime.doctor import PACKAGES, Finding, Package, diagnose

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[2]
DIAGNOSE = """
import json, sys
from depthwire.runtime.doctor import diagnose
found = [finding.as_dict() for finding in diagnose(deep="deep" in sys.argv)]
heavy = [name for name in ("torch", "onnx", "onnxruntime", "transformers", "tensorrt_rtx") if name in sys.modules]
print(json.dumps({"found": found, "heavy": heavy}))
"""


def distribution(folder: Path, name: str, version: str, module: str | None = None, code: str = "") -> None:
    """Install a distribution into a folder: the metadata that pip would write, and a module."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(text, encoding="utf-8")
    if module is not None:
        (folder / f"{module}.py").write_text(code, encoding="utf-8")


def diagnosed(folder: Path, *arguments: str, **environment: str) -> dict[str, dict[str, Any]]:
    """Run ``diagnose`` in an interpreter that finds the folder's packages before its own."""
    env: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(folder), **environment}
    command = [sys.executable, "-c", DIAGNOSE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=folder)
    content = json.loads(done.stdout)
    assert content["heavy"] == []
    return {finding["name"]: finding for finding in content["found"]}


def test_the_report_covers_everything_and_imports_nothing_heavy(tmp_path: Path) -> None:
    found = diagnosed(tmp_path)
    machine = {"NVIDIA GPU", "TensorRT provider", "memory", "disk"}
    names = {"python", "onnxruntime", "kernels", "polygraphy command", *machine}
    assert set(found) == names | {package.distribution for package in PACKAGES}
    assert found["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    for name in ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "polygraphy", "memory", "disk"):
        assert found[name]["status"] == "present", found[name]
    assert re.search(r"\((CPU|CUDA) build\)", found["torch"]["detail"])
    assert "cpu" in found["onnxruntime"]["detail"]


def test_whatever_is_not_well_has_a_remedy() -> None:
    for finding in diagnose():
        wanted = finding.status in {"missing", "broken"}
        assert (finding.remedy is not None) == wanted, finding


def test_a_missing_package_gets_its_install_line() -> None:
    package = Package("depthwire-no-such-package", "no_such_module", "tests", "pip install nothing")
    finding = doctor._package(package, deep=False)
    assert (finding.status, finding.version, finding.remedy) == ("missing", None, "pip install nothing")


def test_install_lines_of_the_optional_back_ends() -> None:
    remedy = {package.distribution: package.remedy for package in PACKAGES}
    assert remedy["tensorrt-rtx"] == "pip install 'depthwire[rtx]'"
    assert remedy["tensorrt"].startswith("pip install 'depthwire[tensorrt]' --extra-index-url https://pypi.nvidia.com")
    assert remedy["triton"] == "pip install 'depthwire[triton]'"
    assert remedy["transformers"] == remedy["gguf"] == remedy["accelerate"] == "pip install 'depthwire[hf]'"


def test_metadata_without_a_module_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "depthwire-hollow", "1.2")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._package(Package("depthwire-hollow", "hollow_module", "tests", "-"), deep=False)
    assert (finding.status, finding.version) == ("broken", "1.2")
    assert finding.remedy == "pip install --force-reinstall depthwire-hollow==1.2"


@pytest.mark.parametrize(("version", "status"), [("2.12.1", "broken"), ("2.13.0+cu130", "present"), ("2.14", "broken")])
def test_versions_outside_the_range_are_broken(tmp_path: Path, version: str, status: str) -> None:
    distribution(tmp_path, "torch", version)
    torch = diagnosed(tmp_path)["torch"]
    assert (torch["status"], torch["version"]) == (status, version)
    if status == "broken":
        assert "needs >=2.13,<2.14" in torch["detail"]
        assert torch["remedy"] == "pip install 'torch>=2.13,<2.14'"
    else:
        assert "CUDA build" in torch["detail"]


def test_both_onnxruntimes_at_once_are_broken(tmp_path: Path) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        distribution(tmp_path, name, "1.31.0")
    finding = diagnosed(tmp_path)["onnxruntime"]
    assert finding["status"] == "broken"
    assert "onnxruntime 1.31.0 and onnxruntime-gpu 1.31.0" in finding["detail"]
    assert finding["remedy"].startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install ")


def test_only_a_deep_look_sees_a_package_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "depthwire-rotten", "3.0", "rotten_module", "raise OSError('libfoo.so: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = Package("depthwire-rotten", "rotten_module", "tests", "-")
    assert doctor._package(package, deep=False).status == "present"
    finding = doctor._package(package, deep=True)
    assert finding.status == "broken"
    assert "libfoo.so: cannot open" in finding.detail


def test_an_import_that_hangs_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_IMPORT_SECONDS", 0.5)
    assert doctor._import_failure("import time; time.sleep(60)") == "no end after 0.5 s"


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for the driver's tool")
@pytest.mark.parametrize(
    ("script", "status", "text"),
    [
        ("echo '580.1, NVIDIA GeForce RTX 4090, 8.9, 24564 MiB'", "present", "NVIDIA GeForce RTX 4090, 8.9, 24564 MiB"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", "broken", "NVIDIA-SMI has failed"),
        ("true", "broken", "exit status 0"),
    ],
)
def test_the_drivers_tool_is_believed(tmp_path: Path, script: str, status: str, text: str) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    tool.chmod(0o755)
    finding = diagnosed(tmp_path, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")["NVIDIA GPU"]
    assert finding["status"] == status
    assert text in finding["detail"]
    assert finding["version"] == ("580.1" if status == "present" else None)


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").is_file(), reason="this machine has an NVIDIA driver")
def test_no_driver_hinders_no_build(tmp_path: Path) -> None:
    finding = diagnosed(tmp_path, PATH=str(tmp_path))["NVIDIA GPU"]
    assert finding["status"] == "not-applicable"
    assert finding["remedy"] is None


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._disk(tmp_path).status == "present"
    monkeypatch.setattr(doctor, "_LOW_DISK_BYTES", 10**18)
    finding = doctor._disk(tmp_path)
    assert finding.status == "broken"
    assert finding.remedy == f"du -sh {tmp_path}/*"


def test_ranges_are_those_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in PACKAGES:
        match = re.search(rf'"{re.escape(package.distribution)}>=([\d.]+)(?:,<([\d.]+))?(?:; [^"]+)?"', text)
        assert match is not None, package.distribution
        assert (match[1], match[2] or "") == (package.minimum, package.below), package.distribution
    assert '"onnxruntime-gpu>=1.24' in text


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("1.7.1.116", (1, 7, 1, 116)), ("5.0.0rc1", (5, 0, 0)), ("2.14.dev3", (2, 14))],
)
def test_release_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert doctor._numbers(version) == numbers


def test_a_finding_is_json() -> None:
    finding = Finding("disk", "present", None, "1 GB free")
    assert json.loads(json.dumps(finding.as_dict())) == {
        "name": "disk",
        "status": "present",
        "version": None,
        "detail": "1 GB free",
        "remedy": None,
    }


def test_the_kernels_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = doctor._kernels()
    assert found.status == "present"
    assert re.search(r"\((avx512|avx2|neon|baseline); .*libdepthwire_ort\.so\)", found.detail)
    monkeypatch.setattr("depthwire.runtime.native._LIBRARY", tmp_path / "absent.so")
    missing = doctor._kernels()
    assert (missing.status, missing.remedy) == ("missing", "make native")
    (tmp_path / "broken.so").write_bytes(b"no library")
    monkeypatch.setattr("depthwire.runtime.native._LIBRARY", tmp_path / "broken.so")
    broken = doctor._kernels()
    assert (broken.status, broken.remedy) == ("broken", "make native")
