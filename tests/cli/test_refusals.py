"""What cannot be converted: one clear error, its status, and no output directory."""

from __future__ import annotations

import errno
import importlib.util
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from depthwire.artifact import Artifact
from depthwire.cli.main import main
from depthwire.errors import DepthwireError
from tests.cli.models import save_post_norm_bert

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FACTORY = """
import torch

class Branches(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def refused():
    return Branches(), (torch.ones(2, 3),)
"""


def _empty(folder: Path) -> str:
    (folder / "model").mkdir()
    return str(folder / "model")


def _pickle(folder: Path) -> str:
    import torch

    path = folder / "model.pt"
    torch.save({"weight": torch.ones(2)}, path)
    return str(path)


def _branches(folder: Path) -> str:
    (folder / "branching_model.py").write_text(FACTORY, encoding="utf-8")
    return "branching_model:refused"


def _post_norm(folder: Path) -> str:
    return str(save_post_norm_bert(folder / "bert"))


@pytest.mark.parametrize(
    "case",
    [
        (lambda _folder: "no/such/model", "capture.no-such-model", 3, "no/such/model"),
        (_empty, "capture.no-config", 3, "config.json"),
        (_pickle, "capture.pickle-checkpoint", 3, "safetensors"),
        (_branches, "capture.export-refused", 3, "branching_model.py:6"),
        (_post_norm, "structure.post-norm", 4, "encoder.layer.0.attention.output.LayerNorm"),
    ],
)
def test_a_model_that_cannot_be_lifted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: tuple[Callable[[Path], str], str, int, str],
) -> None:
    make, code, status, word = case
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["convert", source, "-o", "out", "--attn-res", "full"]) == status
    error = capsys.readouterr().err
    assert f"[{code}]" in error
    assert word in error
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


@pytest.mark.parametrize(
    "case",
    [
        ("block:0", "recipe.attn-res", 2),
        ("block:999", "attn-res.too-many-blocks", 4),
        ("block-layers:9", "attn-res.too-many-blocks", 4),
        ("blocks:2", "recipe.attn-res", 2),
    ],
)
def test_a_partition_that_cannot_be(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: tuple[str, str, int]
) -> None:
    value, code, status = case
    out = tmp_path / "out"
    assert main(["convert", str(tiny), "-o", str(out), "--seq-len", "8", "--attn-res", value]) == status
    error = capsys.readouterr().err
    assert f"[{code}]" in error
    assert value in error
    assert not out.exists()


def _queries(tiny: Path) -> dict[str, Any]:
    import depthwire

    program = depthwire.rewrite(str(tiny), seq_len=8, attn_res="full")
    return {name: value.clone() for name, value in program.exported.state_dict.items() if "quer" in name}


def _wrong_shape(queries: dict[str, Any]) -> None:
    name = next(iter(queries))
    queries[name] = queries[name][:-1].clone()


def _missing(queries: dict[str, Any]) -> None:
    del queries[next(iter(queries))]


def _extra(queries: dict[str, Any]) -> None:
    queries["attn_res.queries.77"] = next(iter(queries.values())).clone()


def _not_a_number(queries: dict[str, Any]) -> None:
    next(iter(queries.values()))[0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (_wrong_shape, "queries.shape"),
        (_missing, "queries.missing-key"),
        (_extra, "queries.extra-key"),
        (_not_a_number, "queries.not-finite"),
    ],
)
def test_queries_that_do_not_fit(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[dict[str, Any]], None], code: str
) -> None:
    from safetensors.torch import save_file

    queries = _queries(tiny)
    file, out = tmp_path / "queries.safetensors", tmp_path / "out"
    arguments = ["convert", str(tiny), "-o", str(out), "--seq-len", "8", "--attn-res", "full", "--queries", str(file)]
    save_file(queries, file)
    assert main([*arguments, "--dry-run", "-q"]) == 0  # the file is right before it is spoilt
    spoil(queries)
    save_file(queries, file)
    assert main(arguments) == 4
    assert f"[{code}]" in capsys.readouterr().err
    assert not out.exists()


def test_a_target_without_its_package_costs_no_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert importlib.util.find_spec("tensorrt_rtx") is None
    out = tmp_path / "out"
    assert main(["convert", "never/captured", "-o", str(out), "--target", "rtx"]) == 6
    error = capsys.readouterr().err
    assert "[build.backend-missing]" in error
    assert "pip install 'depthwire[rtx]'" in error
    assert not out.exists()


def test_a_disk_that_is_known_to_be_too_small(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage._replace(free=1000))
    out = tmp_path / "out"
    assert main(["convert", str(tiny), "-o", str(out), "--seq-len", "8"]) == 5
    error = capsys.readouterr().err
    assert "[export.disk-full]" in error
    assert "MB free" in error
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
set -e
mount -t tmpfs -o size={size}k tmpfs {folder}
set +e
{python} -m depthwire convert {source} -o {folder}/out --seq-len 8 --attn-res full --no-verify
echo status $?
ls -A {folder}
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="a small disk takes Linux namespaces")
def test_a_disk_that_fills_up_on_the_way(tiny: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system lets nobody mount a small disk")
    # Room for the weights and goldens that are known beforehand, not for the graph that comes on top.
    weights = (tiny / "model.safetensors").stat().st_size
    folder = tmp_path / "disk"
    folder.mkdir()
    script = FULL_DISK.format(size=weights // 1024 + 24, folder=folder, python=sys.executable, source=tiny)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert "[export.disk-full]" in done.stderr
    assert done.stdout.split() == ["status", "5"]  # and nothing listed


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_in_the_words_of_any_writer(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: Exception
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise raised

    monkeypatch.setattr("depthwire.export.goldens.Goldens.save", full)
    assert main(["convert", str(tiny), "-o", str(tmp_path / "out"), "--seq-len", "8"]) == 5
    assert "[export.disk-full]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "place",
    ["depthwire.export.to_onnx.to_onnx", "onnx.checker.check_model", "depthwire.runtime.verify._run"],
)
def test_an_interrupt_anywhere_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    assert main(["convert", str(tiny), "-o", str(tmp_path / "out"), "--seq-len", "8", "-q"]) == 130
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_before_the_new_artefact_keeps_the_old_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["convert", str(tiny), "-o", str(tmp_path / "out"), "--seq-len", "8", "--no-verify", "-q"]
    assert main(arguments) == 0

    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnx.checker.check_model", interrupt)
    assert main(arguments) == 130
    Artifact.load(tmp_path / "out")


def test_a_bug_after_the_export_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_arguments: object, **_options: object) -> None:
        raise LookupError("an invariant")

    monkeypatch.setattr("depthwire.runtime.verify._run", broken)
    assert main(["convert", str(tiny), "-o", str(tmp_path / "out"), "--seq-len", "8"]) == 70
    assert "LookupError: an invariant" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_program_takes_no_source_options(tiny: Path) -> None:
    import depthwire

    program = depthwire.capture(str(tiny), seq_len=8)
    with pytest.raises(DepthwireError) as caught:
        depthwire.inspect(program, batch=3)
    assert caught.value.code == "recipe.captured-already"
    assert depthwire.inspect(program).structure is not None
