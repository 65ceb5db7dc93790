from __future__ import annotations

from pathlib import Path

import pytest

from depthwire.errors import BuildError, InternalError, UsageError
from depthwire.runtime import target as module
from depthwire.runtime._target_checks import version_of
from depthwire.runtime.target import Precision, Target, list_targets, load_target, parse_compute_capability

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
    assert "jetson-agx-orin," not in (caught.value.want or "")


def test_a_target_that_resembles_nothing_gets_no_guess() -> None:
    with pytest.raises(UsageError) as caught:
        load_target("zzzzzz")
    assert "Did you mean" not in (caught.value.todo or "")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("rtx.toml", "opset = 23", "opset = 'new'"),
        ("rtx.toml", "opset = 23", "opset = 23\ncolour = 'green'"),
        ("rtx.toml", 'default_compute_capabilities = ["SM86"', 'default_compute_capabilities = ["SM87"'),
        ("rtx.toml", 'custom_ops = "function"', 'custom_ops = "plugin"'),
        ("rtx.toml", 'builds_on = "anywhere"\n', ""),
        ("rtx.toml", 'precisions = ["fp32"', 'precisions = ["fp8"'),
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


def test_limits_are_of_gpus_that_are_supported() -> None:
    data = load_target("rtx").model_dump()
    data["precision_limits"]["SM87"] = ["fp16"]
    with pytest.raises(ValueError, match="not supported"):
        Target.model_validate(data)


def test_supported_and_refused_exclude_each_other() -> None:
    data = load_target("rtx").model_dump()
    data["refused_compute_capabilities"]["SM86"] = "no"
    with pytest.raises(ValueError, match="supported and refused"):
        Target.model_validate(data)


NAMES = {
    *("rtx", "dgx-spark", "l4", "a10", "a100", "h100", "h200", "b200", "ort-cuda", "ort-cpu"),
    *("jetson-orin-nano-4", "jetson-orin-nano-8", "jetson-orin-nx-8", "jetson-orin-nx-16"),
    *("jetson-agx-orin-32", "jetson-agx-orin-64", "jetson-thor-t4000", "jetson-thor-t5000"),
}
FORMS = [target.with_jetpack(name) for target in list_targets() for name in target.jetpacks] + [
    target for target in list_targets() if not target.jetpacks
]


def test_the_targets_are_these() -> None:
    assert sorted(NAMES) == [target.name for target in list_targets()]


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("jetson-agx-orin", "jetson-agx-orin-64"),
        ("jetson-thor", "jetson-thor-t5000"),
        ("jetson-orin-nx", "jetson-orin-nx-16"),
        ("jetson-orin-nano", "jetson-orin-nano-8"),
    ],
)
def test_a_family_means_one_of_its_boards(alias: str, name: str) -> None:
    assert load_target(alias).name == name


def test_no_two_targets_share_a_name_or_a_module() -> None:
    names = [name for target in list_targets() for name in (target.name, *target.aliases)]
    boards = [board for target in list_targets() for board in target.boards]
    assert len(set(names)) == len(names)
    assert len(set(boards)) == len(boards)


@pytest.mark.parametrize("target", FORMS, ids=lambda target: f"{target.name}@{target.jetpack}")
def test_what_follows_from_the_version_of_tensorrt(target: Target) -> None:
    if target.builder != "tensorrt":
        assert not target.operators_missing
        return
    assert target.tensorrt is not None
    assert target.tensorrt_range is not None
    oldest, newest = (version_of(text) for text in target.tensorrt_range)
    assert oldest <= version_of(target.tensorrt) < newest
    # The form must be right for the whole range, so its oldest version decides. Numbers: TensorRT's CHANGELOG.md.
    assert (target.custom_ops == "plugin") == (oldest >= (10, 9))
    assert target.expand_functions == (oldest < (10, 8))
    assert ("Attention" in target.operators_missing) == (oldest < (10, 14))
    assert ("RMSNormalization" in target.operators_missing) == (oldest < (10, 15))
    assert ("RotaryEmbedding" in target.operators_missing) == (oldest < (10, 15))
    assert ("Swish" in target.operators_missing) == (oldest < (11, 0))
    assert target.strongly_typed == (version_of(target.tensorrt) >= (11, 0))
    assert target.attention == "decomposed"
    assert target.topk_limit == 3840
    assert target.builds_on == "device"


@pytest.mark.parametrize("target", FORMS, ids=lambda target: f"{target.name}@{target.jetpack}")
def test_what_a_board_states(target: Target) -> None:
    board = target.name.startswith("jetson-")
    assert board == (target.jetpack is not None) == (target.l4t is not None)
    if not board:
        return
    assert target.compute_capabilities == (("SM87",) if "orin" in target.name else ("SM110",))
    assert target.memory_bytes is not None
    assert target.memory_is_unified
    assert 0 < target.reserved_bytes < target.memory_bytes / 3
    assert target.boards
    assert target.dla
    assert target.workspace_bytes is not None
    assert target.workspace_bytes <= target.memory_bytes / 8
    assert target.optimization_level is not None
    assert target.optimization_level <= 3
    assert not target.confirmed


def test_memory_in_the_name_is_the_memory() -> None:
    for target in list_targets():
        number = target.name.rsplit("-", 1)[-1]
        if number.isdigit():
            assert target.memory_bytes == int(number) * 10**9


def test_a_jetpack_brings_its_tensorrt() -> None:
    assert load_target("jetson-agx-orin").tensorrt == "10.3"
    newer = load_target("jetson-agx-orin", jetpack="7.2")
    assert (newer.jetpack, newer.l4t, newer.tensorrt, newer.custom_ops) == ("7.2", "39.2", "10.16", "plugin")
    assert load_target("jetson-agx-orin", jetpack="7.2.2").strongly_typed
    assert load_target("jetson-agx-orin", jetpack="7.2.1").tensorrt == "10.16"
    assert load_target("jetson-agx-orin", jetpack="6.2.1") == load_target("jetson-agx-orin-64")


@pytest.mark.parametrize(
    ("name", "jetpack", "words"),
    [
        ("jetson-orin-nano-8", "7.2.2", None),
        ("jetson-orin-nano-8", "5.1", "6.2, 7.2"),
        ("jetson-orin-nano-8", "7", "6.2, 7.2"),
        ("jetson-thor-t4000", "7.0", "7.2, 7.1, 7.2.2"),
        ("rtx", "6.2", "no --jetpack"),
    ],
)
def test_a_jetpack_that_a_board_does_not_have(name: str, jetpack: str, words: str | None) -> None:
    if words is None:  # a newer patch of a release that is known
        assert load_target(name, jetpack=jetpack).jetpack == "7.2"
        return
    with pytest.raises(UsageError) as caught:
        load_target(name, jetpack=jetpack)
    assert caught.value.code == "target.unknown-jetpack"
    assert words in (caught.value.want or "")


@pytest.mark.parametrize(
    ("name", "precision"), [("ort-cuda", "int4-weights"), ("ort-cpu", "bf16")], ids=["int4", "bf16"]
)
def test_a_precision_that_a_target_does_not_have(name: str, precision: Precision) -> None:
    with pytest.raises(UsageError) as caught:
        load_target(name).require_precision(precision)
    assert caught.value.code == "target.precision-unsupported"
    assert precision in (caught.value.at or "")
    assert "fp32" in (caught.value.want or "")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4-weights"])
def test_a_precision_that_one_gpu_of_a_target_does_not_have(precision: Precision) -> None:
    rtx = load_target("rtx")
    rtx.require_precision(precision, ["SM80", "SM86"])
    with pytest.raises(UsageError) as caught:
        rtx.require_precision(precision, ["SM75", "SM86"])
    assert caught.value.code == "target.precision-unsupported"
    assert "rtx for SM75" in caught.value.what
    assert caught.value.want == "one of fp16, int8"
    rtx.require_precision("fp16", ["SM75"])


def test_a_precision_that_it_has_is_taken() -> None:
    for target in list_targets():
        for precision in target.precisions:
            target.require_precision(precision)


@pytest.mark.parametrize(
    ("name", "jetpack", "words", "todo"),
    [
        ("jetson-agx-orin", None, "TensorRT 10.3", "--jetpack 7.2."),
        ("rtx", None, "TensorRT-RTX takes no plugins", "function"),
        ("ort-cuda", None, "ONNX Runtime", "model.onnx"),
    ],
)
def test_a_plugin_where_there_are_none(name: str, jetpack: str | None, words: str, todo: str) -> None:
    with pytest.raises(BuildError) as caught:
        load_target(name, jetpack).require_form("plugin")
    assert caught.value.code == "target.plugin-unsupported"
    assert words in caught.value.what
    assert todo in (caught.value.todo or "")


def test_a_plugin_where_it_is_taken() -> None:
    load_target("jetson-agx-orin", "7.2").require_form("plugin")
    load_target("h100").require_form("plugin")
    load_target("rtx").require_form("function")
