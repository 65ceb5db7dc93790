"""Nothing in a crafted .pt2 file runs."""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch

from depthwire.errors import CaptureError
from depthwire.export.capture import capture
from tests.export.pt2_attacks import (
    MIGHT_RUN,
    RUNS_WHEN_LOADED,
    RUNS_WHEN_USED,
    Craft,
    Payload,
    older_format,
    symbolic_size,
    torch_pickle,
)
from tests.export.pt2_files import Members, saved_members, write

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def members() -> Members:
    return saved_members()


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("wicked_module", None)
    return tmp_path / "marker"


def use(file: Path) -> None:
    """What a trusting caller does: load the program and run it, as a module and as the bare graph."""
    program = torch.export.load(io.BytesIO(file.read_bytes()))
    program.module()(torch.ones(2, 3, 4))
    values = {**program.state_dict, **program.constants}
    program.graph_module(
        *(values.get(spec.target, torch.ones(2, 3, 4)) for spec in program.graph_signature.input_specs)
    )


@pytest.mark.parametrize("craft", [*RUNS_WHEN_LOADED, *RUNS_WHEN_USED], ids=lambda craft: craft.__name__)
def test_a_crafted_program_is_refused_and_nothing_runs(
    craft: Craft, members: Members, marker: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "crafted.pt2", craft(members, marker))
    with pytest.raises(CaptureError) as raised:
        capture(file)
    assert raised.value.code in ("capture.pt2-unsafe", "capture.dynamic-shapes")
    assert not marker.exists()


@pytest.mark.parametrize("craft", [*RUNS_WHEN_LOADED, *RUNS_WHEN_USED], ids=lambda craft: craft.__name__)
@pytest.mark.filterwarnings("ignore")
def test_the_same_program_does_run_code_without_our_check(
    craft: Craft, members: Members, marker: Path, tmp_path: Path
) -> None:
    """Teeth: a vector that is harmless by itself would prove nothing above."""
    file = write(tmp_path / "crafted.pt2", craft(members, marker))
    with contextlib.suppress(Exception):  # whatever follows the payload may fail
        use(file)
    assert marker.exists()


@pytest.mark.parametrize("craft", MIGHT_RUN, ids=lambda craft: craft.__name__)
def test_what_stands_next_to_generated_code_is_refused_too(
    craft: Craft, members: Members, marker: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "crafted.pt2", craft(members, marker))
    with pytest.raises(CaptureError) as raised:
        capture(file)
    assert raised.value.code == "capture.pt2-unsafe"
    assert not marker.exists()


def test_the_older_format_is_refused_and_nothing_runs(marker: Path, tmp_path: Path) -> None:
    file = tmp_path / "old.pt2"
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in older_format({}, marker).items():
            archive.writestr(name.removeprefix("../"), data)
    with pytest.raises(CaptureError) as raised:
        capture(file)
    assert raised.value.code == "capture.pt2-unsafe"
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_bare_pickle_is_refused_and_nothing_runs(protocol: int, marker: Path, tmp_path: Path) -> None:
    file = tmp_path / "bare.pt2"
    file.write_bytes(pickle.dumps(Payload(marker), protocol=protocol))
    with pytest.raises(CaptureError) as raised:
        capture(file)
    assert raised.value.code == "capture.pt2-invalid"
    assert not marker.exists()


def test_a_torch_save_file_renamed_is_refused_and_nothing_runs(marker: Path, tmp_path: Path) -> None:
    file = tmp_path / "renamed.pt2"
    file.write_bytes(torch_pickle(Payload(marker)))
    with pytest.raises(CaptureError) as raised:
        capture(file)
    assert raised.value.code == "capture.pt2-unsafe"
    assert not marker.exists()


def test_a_change_between_check_and_load_has_no_effect(
    members: Members, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from depthwire.export import _capture_pt2

    good = write(tmp_path / "program.pt2", members)
    evil = write(tmp_path / "evil.pt2", symbolic_size(members, marker)).read_bytes()
    register = _capture_pt2._register_types

    def swap(types: set[str]) -> None:
        good.write_bytes(evil)
        register(types)

    monkeypatch.setattr(_capture_pt2, "_register_types", swap)
    program, _ = _capture_pt2.load_pt2(good)
    assert program.graph_signature.user_inputs == ("x",)
    assert not marker.exists()
