"""Output directories: whose they are, whether they fit, and what is left behind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from depthwire._outdir import (
    check_file,
    check_out,
    disk_full_as_error,
    free_bytes,
    removed_unless_vouched,
    require_space,
)
from depthwire.errors import DepthwireError, ExportError, InternalError, ParityError, UsageError


def _refusal(out: Path | None, *, force: bool = False) -> str:
    with pytest.raises(UsageError) as caught:
        check_out(out, force=force)
    return f"{caught.value.code}: {caught.value.got}"


def test_new_and_empty_directories_may_be_written(tmp_path: Path) -> None:
    assert check_out(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert check_out(tmp_path) == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"depthwire": "0", "schema_version": 1}), encoding="utf-8")
    assert check_out(tmp_path) == tmp_path


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    site = tmp_path / "site"
    site.mkdir()
    (site / "manifest.json").write_text('{"name": "a web page"}', encoding="utf-8")
    assert _refusal(None) == "export.no-output: nothing"
    assert _refusal(file) == "export.output-exists: a file"
    assert _refusal(link) == "export.output-exists: a symbolic link"
    assert _refusal(tmp_path).startswith("export.output-exists: 3 entries and no manifest.json: file, link, site")
    for force in (False, True):
        assert "and no model.onnx" in _refusal(site, force=force)
    (site / "model.onnx").touch()
    assert "--force" in _refusal(site)
    assert check_out(site, force=True) == site


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is not a directory" in _refusal(tmp_path / "file" / "out")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "is not writable" in _refusal(tmp_path / "closed" / "out")


@pytest.mark.parametrize("name", [".", "..", "a/.."])
def test_the_current_directory_is_no_artefact(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_out(Path(name))
    assert caught.value.code == "export.output-name"


def test_files_need_their_suffix(tmp_path: Path) -> None:
    check_file(tmp_path / "a.pt2", ".pt2")
    (tmp_path / "d.pt2").mkdir()
    for name in ("a.pt", "d.pt2"):
        with pytest.raises(UsageError) as caught:
            check_file(tmp_path / name, ".pt2")
        assert caught.value.code == "export.output-name"


def test_too_little_room_is_refused_with_both_numbers(tmp_path: Path) -> None:
    require_space(tmp_path / "out", 1)
    needed = free_bytes(tmp_path) + 10**9
    with pytest.raises(ExportError) as caught:
        require_space(tmp_path / "a" / "out", needed)
    assert caught.value.code == "export.disk-full"
    assert f"{needed / 1e6:,.0f} MB" in str(caught.value.want)
    assert "MB free" in str(caught.value.got)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), ExportError),
        (OSError(errno.EDQUOT, "quota"), ExportError),
        (RuntimeError("I/O error: No space left on device (os error 28)"), ExportError),
        (OSError(errno.EACCES, "denied"), PermissionError),
        (RuntimeError("something else"), RuntimeError),
    ],
)
def test_only_a_full_disk_is_called_one(tmp_path: Path, raised: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected), disk_full_as_error(tmp_path, 5):
        raise raised


@pytest.mark.parametrize(
    ("raised", "kept"),
    [
        (ParityError("verify.parity", "they differ"), True),
        (InternalError("internal.x", "a bug"), False),
        (KeyboardInterrupt(), False),
        (SystemExit(1), False),
        (LookupError("a bug"), False),
    ],
)
def test_only_a_verdict_keeps_the_directory(tmp_path: Path, raised: BaseException, kept: bool) -> None:
    out = tmp_path / "out"

    def write_and_fail() -> None:
        with removed_unless_vouched(out):
            out.mkdir()
            (out / "model.onnx").touch()
            raise raised

    with pytest.raises(type(raised)):
        write_and_fail()
    assert out.exists() is kept


def test_what_was_there_before_stays_until_it_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt), removed_unless_vouched(out):
        raise KeyboardInterrupt
    assert out.exists()
    with pytest.raises(DepthwireError), removed_unless_vouched(out):
        raise DepthwireError("a.b", "c")
    assert out.exists()
