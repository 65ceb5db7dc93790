from __future__ import annotations

from pathlib import Path

import pytest

from depthwire.errors import InternalError, UsageError
from depthwire.runtime import target as module
from depthwire.runtime.target import Target, list_targets, load_target, parse_compute_capability

FOLDER = Path(module.__file__).with_name("targets")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("SM86", "SM86"),
        ("sm_86", "SM86"),
        ("sm-86", "SM86"),
        ("compute_86", "SM86"),
        (" 8.6 ", "SM86"),
        ("86", "SM86"),
        ("12.0", "SM120"),
        ("120", "SM120"),
        ("sm_121", "SM121"),
        ("10.1", "SM110"),
        ("sm_110", "SM110"),
    ],
)
def test_spellings_of_a_compute_capability(text: str, name: str) -> None:
    assert parse_compute_capability(text) == name


@pytest.mark.parametrize("text", ["", "SM", "8", "8.60", "rtx", "SM86a", "-8.6", "8,6", "1234"])
def test_what_is_no_compute_capability(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_compute_capability(text)
    assert caught.value.code == "target.bad-compute-capability"
    assert caught.value.got == repr(text)


def test_every_file_is_a_target_and_every_target_a_file() -> None:
    assert [target.name for target in list_targets()] == sorted(path.stem for path in FOLDER.glob("*.toml"))
    assert {target.name for target in list_targets()} >= {"rtx", "ort-cpu", "ort-cuda"}


def test_rtx_states_what_its_builder_can_take() -> None:
    rtx = load_target("rtx")
    assert rtx.builder == "tensorrt-rtx"
    assert rtx.attention == "decomposed"
    assert rtx.custom_ops == "function"
    assert rtx.default_compute_capabilities == ("SM86", "SM89", "SM120")
    assert not rtx.confirmed


def test_onnxruntime_has_kernels_and_says_what_was_not_run() -> None:
    cpu, cuda = load_target("ort-cpu"), load_target("ort-cuda")
    assert cpu.custom_ops == cuda.custom_ops == "kernels"
    assert any("make native" in note for note in cpu.notes)
    assert any("depthwire kernels" in note for note in cuda.notes)
    assert any("not run" in statement and "cubins" in statement for statement in cuda.unconfirmed)


def test_rtx_lists_the_compute_capabilities_of_the_installed_builder() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    known = set(trt.ComputeCapability.__members__) - {"NONE", "CURRENT"}
    assert set(load_target("rtx").compute_capabilities) == known


def test_default_and_explicit_compute_capabilities() -> None:
    rtx = load_target("rtx")
    assert rtx.resolve_compute_capabilities(None) == rtx.default_compute_capabilities
    assert rtx.resolve_compute_capabilities(["12.0", "sm_86", "86"]) == ("SM86", "SM120")


@pytest.mark.parametrize(("text", "word"), [("SM87", "Orin"), ("9.0", "Hopper"), ("10.1", "Thor"), ("SM99", "SM99")])
def test_a_gpu_that_rtx_does_not_serve_is_refused_with_the_reason(text: str, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_target("rtx").resolve_compute_capabilities(["SM86", text])
    assert caught.value.code == "target.compute-capability-unsupported"
    assert word in caught.value.what


def test_an_empty_request_is_not_the_default() -> None:
    with pytest.raises(UsageError) as caught:
        load_target("rtx").resolve_compute_capabilities([])
    assert caught.value.code == "target.no-compute-capability"


@pytest.mark.parametrize(("name", "near"), [("rxt", "'rtx'"), ("RTX", "'rtx'"), ("ort-gpu", "'ort-c")])
def test_an_unknown_target_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_target(name)
    assert caught.value.code == "target.unknown"
    assert f"Did you mean {near}" in (caught.value.todo or "")
    assert "ort-cpu, ort-cuda, rtx" in (caught.value.want or "")


def test_a_target_that_resembles_nothing_gets_no_guess() -> None:
    with pytest.raises(UsageError) as caught:
        load_target("zzzzzz")
    assert "Did you mean" not in (caught.value.todo or "")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("rtx.toml", "opset = 23", "opset = 'new'"),
        ("rtx.toml", "opset = 23", "opset = 23\ncolour = 'green'"),
        ("rtx.toml", '"SM86", "SM89", "SM120"]\n\nopset', '"SM87"]\n\nopset'),
        ("rtx.toml", "opset = 23", "opset ="),
        ("other.toml", "opset = 23", "opset = 23"),
    ],
)
def test_a_damaged_file_is_our_error(file: str, old: str, new: str) -> None:
    text = (FOLDER / "rtx.toml").read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(InternalError) as caught:
        module._read(file, text.replace(old, new))
    assert caught.value.code == "target.bad-file"
    assert file in (caught.value.at or "")


def test_supported_and_refused_exclude_each_other() -> None:
    data = load_target("rtx").model_dump()
    data["refused_compute_capabilities"]["SM86"] = "no"
    with pytest.raises(ValueError, match="supported and refused"):
        Target.model_validate(data)
