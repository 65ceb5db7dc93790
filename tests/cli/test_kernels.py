"""``kernels``: cubins for an artefact's operators, listed in its manifest, or one clear error."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

import pytest

import depthwire
from depthwire.artifact import Artifact
from depthwire.cli.main import main
from depthwire.errors import BuildError
from depthwire.runtime.triton.bundle import INDEX, kernels_of, read_bundle
from depthwire.runtime.triton.compile import compile_kernel
from depthwire.runtime.triton.spec import KernelSpec

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire.runtime.triton.compile import Compiled


@pytest.fixture
def artefact(converted: Path, tmp_path: Path) -> Path:
    """A copy of the artefact that may be changed."""
    return shutil.copytree(converted, tmp_path / "out")


def kernel_files(folder: Path) -> dict[str, str]:
    files = Artifact.load(folder).manifest.files
    return {name: entry.sha256 for name, entry in files.items() if name.startswith("kernels/")}


def test_every_operator_gets_a_cubin_and_a_second_run_replaces_them(
    artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {path.name for path in artefact.iterdir()}
    assert main(["kernels", str(artefact), "--cc", "8.7", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    specs = kernels_of(artefact / "model.onnx")
    assert (document["compute_capabilities"], document["kernels"]) == (["SM87"], len(specs))
    assert "not run" in document["notes"][0]
    assert {path.name for path in artefact.iterdir()} == names | {"kernels"}
    entries = read_bundle(artefact / "kernels")
    assert [(entry.key, entry.capability) for entry in entries] == [(spec.key, 87) for spec in specs]
    assert {spec.op_type for spec in specs if isinstance(spec, KernelSpec)} == {
        name.rpartition("::")[2] for name in Artifact.load(artefact).manifest.custom_ops
    }
    listed = kernel_files(artefact)
    assert set(listed) == {f"kernels/{path.name}" for path in (artefact / "kernels").iterdir()}
    report = json.loads((artefact / "report.json").read_text(encoding="utf-8"))
    assert report["kernels"] == document
    assert report["stages"][-1]["name"] == "kernels"
    assert "SM87" in (artefact / "report.html").read_text(encoding="utf-8")

    (artefact / "kernels" / "left-over.cubin").write_bytes(b"of another run")
    assert main(["kernels", str(artefact), "--cc", "sm_87", "--cc", "SM87"]) == 0
    text = capsys.readouterr()
    assert f"{len(specs)} kernels for SM87" in text.err
    assert "GPU kernels" in text.out
    assert kernel_files(artefact) == listed
    assert set(listed) == {f"kernels/{path.name}" for path in (artefact / "kernels").iterdir()}
    assert main(["inspect", str(artefact)]) == 0
    assert "GPU kernels" in capsys.readouterr().out

    changed = artefact / "kernels" / entries[0].file
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    assert main(["inspect", str(artefact)]) == 5
    assert "artifact.hash-mismatch" in capsys.readouterr().err


def test_a_run_that_fails_leaves_the_earlier_kernels(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert depthwire.kernels(artefact, compute_capabilities=["SM87"]).kernels > 1
    before = kernel_files(artefact)
    compiled: list[str] = []

    def fail_at_second(spec: KernelSpec, capability: str) -> Compiled:
        if compiled:
            raise BuildError("triton.compile-failed", "no", at="a", want="b", got="c", todo="d")
        compiled.append(spec.key)
        return compile_kernel(spec, capability)

    monkeypatch.setattr("depthwire.runtime.triton.bundle.compile_kernel", fail_at_second)
    with pytest.raises(BuildError, match=r"triton\.compile-failed"):
        depthwire.kernels(artefact, compute_capabilities=["SM86"])
    assert len(compiled) == 1
    assert kernel_files(artefact) == before != {}
    assert [path.name for path in artefact.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        ([], "target.no-compute-capability", 2),
        (["--cc", "ampere"], "target.bad-compute-capability", 2),
        # The compiler does not refuse this one: it ends the process.
        (["--cc", "8.8"], "triton.compute-capability", 2),
        (["--cc", "SM87", "--cc", "7.0"], "triton.compute-capability", 2),
        (["--cc", "SM87"], "artifact.not-an-artifact", 5),
    ],
)
def test_a_request_that_cannot_be_meant(
    arguments: list[str], code: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernels", str(tmp_path / "nowhere"), *arguments, "--json"]) == status
    document = json.loads(capsys.readouterr().out)
    assert document["error"] == code
    assert list(tmp_path.iterdir()) == []


def test_without_triton_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["kernels", str(tmp_path / "nowhere"), "--cc", "SM87"]) == 6
    text = capsys.readouterr().err
    assert "triton.missing" in text
    assert "pip install 'depthwire[triton]'" in text


def test_a_plain_model_has_no_operators(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    depthwire.export(tiny, out, seq_len=8)
    files = set(Artifact.load(out).manifest.files)
    with pytest.raises(depthwire.DepthwireError) as caught:
        depthwire.kernels(out, compute_capabilities=["SM87"])
    assert (caught.value.code, caught.value.exit_code) == ("triton.no-operators", 2)
    assert not (out / "kernels").exists()
    assert set(Artifact.load(out).manifest.files) == files


def test_a_folder_of_somebody_else_is_not_replaced(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artefact / "kernels").mkdir()
    (artefact / "kernels" / "mine.txt").write_text("keep", encoding="utf-8")
    assert main(["kernels", str(artefact), "--cc", "SM87"]) == 6
    assert "triton.not-a-bundle" in capsys.readouterr().err
    assert [path.name for path in (artefact / "kernels").iterdir()] == ["mine.txt"]
    assert not (artefact / "kernels" / INDEX).exists()
