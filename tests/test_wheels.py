"""The wheels: tags that the libraries in them bear out, everything in its place, and one of them installed and used."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.tags import platform_tags
from packaging.utils import parse_wheel_filename

from tests.cli.models import save_tiny_llama
from tests.conftest import ROOT
from tools.build_wheels import LIBRARY, Needs, build_wheel, needs_of, pack, sources, stage

HERE = ROOT / "runtime/native/lib/libdepthwire_ort.so"
ELSEWHERE = ROOT / ".cache/native/aarch64/libdepthwire_ort.so"
WHEELS = ROOT / ".cache/native/wheel-x86_64/libdepthwire_ort.so"
PACKAGES = ("passes/", "export/", "runtime/", "models/", "depthwire/")

needs_library = pytest.mark.skipif(not HERE.is_file(), reason="not built: make native")


@pytest.fixture(scope="module")
def with_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("kernels"), HERE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("plain"), None)


def members(wheel: Path) -> dict[str, zipfile.ZipInfo]:
    with zipfile.ZipFile(wheel) as file:
        assert file.testzip() is None
        return {info.filename: info for info in file.infolist()}


def read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as file:
        return file.read(next(member for member in file.namelist() if member.endswith(name))).decode()


def test_every_file_of_the_packages_is_in_the_wheel(plain: Path) -> None:
    # The kernels' C++ is built in a checkout; what begins with a dot is for tools.
    wanted = {
        name if name.startswith("depthwire/") else f"depthwire/{name}"
        for name in sources()
        if name.startswith(PACKAGES)
        and not (name.startswith("runtime/native/") and not name.endswith(".py"))
        and not Path(name).name.startswith(".")
    }
    found = {name for name in members(plain) if not name.startswith("depthwire-")}
    assert found == wanted
    assert {
        "depthwire/passes/standard.py",
        "depthwire/runtime/targets/rtx.toml",
        "depthwire/templates/report.html.j2",
        "depthwire/models/maps/paper.yaml",
        "depthwire/runtime/deploy/build_and_verify.py",
        "depthwire/runtime/deploy/cpp/CMakeLists.txt",
        "depthwire/runtime/deploy/cpp/common/tolerances.inc",
    } <= found


@needs_library
def test_only_the_library_sets_the_wheels_apart(plain: Path, with_kernels: Path) -> None:
    assert set(members(with_kernels)) - set(members(plain)) == {LIBRARY}
    assert set(members(plain)) - set(members(with_kernels)) == set()
    assert members(with_kernels)[LIBRARY].external_attr >> 16 & 0o777 == 0o755


@needs_library
def test_tags_say_where_a_wheel_can_be_installed(plain: Path, with_kernels: Path) -> None:
    tags = {wheel: parse_wheel_filename(wheel.name)[3] for wheel in (plain, with_kernels)}
    assert {str(tag) for tag in tags[plain]} == {"py3-none-any"}
    assert "Root-Is-Purelib: true" in read(plain, ".dist-info/WHEEL")
    needs = needs_of(HERE)
    assert {str(tag) for tag in tags[with_kernels]} == {f"py3-none-{needs.platform()}"}
    assert "Root-Is-Purelib: false" in read(with_kernels, ".dist-info/WHEEL")
    if sys.platform == "linux":
        assert needs.platform() in set(platform_tags())  # what pip asks for on the machine that compiled it


@pytest.mark.skipif(needs_of(HERE).cpu != "x86_64" if HERE.is_file() else True, reason="no library for x86-64 here")
@pytest.mark.parametrize("library", [HERE, WHEELS], ids=["make native", "make wheels"])
def test_the_best_instruction_set_is_used_whichever_compiler_made_it(library: Path) -> None:
    if not library.is_file():
        pytest.skip("not built: make wheels")
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split("flags", 1)[1].split("\n", 1)[0].split())
    avx2 = {"avx2", "fma", "f16c"} <= flags
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags
    function = ctypes.CDLL(str(library)).DepthwireInstructionSet
    function.restype = ctypes.c_char_p
    assert function().decode() == ("avx512" if avx512 else "avx2" if avx2 else "baseline")


@pytest.mark.skipif(not ELSEWHERE.is_file(), reason="not built: make native-aarch64")
def test_a_wheel_for_another_cpu(tmp_path: Path) -> None:
    needs = needs_of(ELSEWHERE)
    assert needs.cpu == "aarch64"
    wheel = build_wheel(tmp_path, ELSEWHERE)
    assert wheel.name.endswith(f"-py3-none-manylinux_2_{needs.glibc[1]}_aarch64.whl")
    with zipfile.ZipFile(wheel) as file:
        assert file.read(LIBRARY) == ELSEWHERE.read_bytes()


@pytest.mark.parametrize(
    ("needs", "tag"),
    [
        (Needs("x86_64", ("libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"), (2, 28), ()), "manylinux_2_28_x86_64"),
        (Needs("aarch64", ("libc.so.6", "ld-linux-aarch64.so.1"), (2, 4), ()), "manylinux_2_17_aarch64"),
        (Needs("x86_64", ("libc.so.6", "libcuda.so.1"), (2, 17), ()), None),
        (Needs("x86_64", ("libc.so.6", "libstdc++.so.6"), (2, 17), ("GLIBCXX_3.4.30",)), None),
        (Needs("x86_64", ("libc.so.6",), (2, 17), ("GLIBC_PRIVATE",)), None),
    ],
)
def test_a_library_that_asks_for_more_gets_no_tag(needs: Needs, tag: str | None) -> None:
    if tag is not None:
        assert needs.platform() == tag
        return
    with pytest.raises(SystemExit, match="no manylinux library"):
        needs.platform()


def test_needs_are_read_from_the_file(tmp_path: Path) -> None:
    source = tmp_path / "new.cpp"
    source.write_text("#include <string>\nstd::string f(int x) { return std::to_string(x) + 'a'; }\n", encoding="utf-8")
    library = tmp_path / "new.so"
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    needs = needs_of(library)
    assert "libstdc++.so.6" in needs.libraries
    assert any(name.startswith("GLIBCXX_") for name in needs.others)
    with pytest.raises(SystemExit, match=r"libstdc\+\+"):
        needs.platform()


def test_the_same_files_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    stage(tmp_path / "first", None)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    first, second = (pack(tmp_path / name, tmp_path / f"{name}.out", None) for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert {info.date_time for info in members(first).values()} == {(2023, 11, 14, 22, 13, 20)}


def test_the_metadata_is_valid(plain: Path) -> None:
    text = read(plain, ".dist-info/METADATA")
    metadata = Metadata.from_email(text, validate=True)
    assert metadata.name == "depthwire"
    assert metadata.description_content_type == "text/markdown"
    assert str(metadata.description).startswith("# Depthwire")
    assert Parser().parsestr(text)["License-Expression"] == "Apache-2.0"
    assert "depthwire = depthwire.cli.main:main" in read(plain, ".dist-info/entry_points.txt")


@needs_library
def test_an_installed_wheel_converts_with_its_own_kernels(with_kernels: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python, site = environment / "bin/python", next((environment / "lib").glob("python*/site-packages"))
    # What it depends on comes from here; a plain line of a .pth file brings no editable installation along.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", str(with_kernels)], check=True)

    def run(*arguments: str) -> str:
        command = [str(environment / "bin/depthwire"), *arguments]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=clean)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    doctor = json.loads(run("doctor", "--json"))
    (kernels,) = [finding for finding in doctor["findings"] if finding["name"] == "kernels"]
    assert kernels["status"] == "present"
    assert str(site / LIBRARY) in kernels["detail"]
    source = save_tiny_llama(tmp_path / "tiny")
    run("convert", str(source), "--attn-res", "full", "--seq-len", "16", "--target", "ort-cpu", "-o", "out", "--json")
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["verify"]["passed"] is True
    assert report["verify"]["tools"]["operators by"].endswith(" kernels")
