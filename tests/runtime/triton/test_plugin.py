"""TensorRT plugins of a model: the code that ships, its parameters, its resources, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import onnx
import pytest

from depthwire.errors import BuildError, UsageError
from depthwire.runtime.triton import plugin, plugin_ptx
from depthwire.runtime.triton.compile import compile_kernel
from depthwire.runtime.triton.plugin import (
    INDEX,
    MODULE,
    require_version,
    to_plugin_form,
    write_plugin_model,
    write_plugins,
)
from depthwire.runtime.triton.plugin_operators import Operator, depth_operator, plugin_operators
from depthwire.runtime.triton.plugin_ptx import LARGEST_SHARED, PluginCode, entry_parameters, plugin_code
from depthwire.runtime.triton.routing_spec import RoutingSpec
from depthwire.runtime.triton.spec import KernelSpec
from tests.conftest import ROOT
from tests.runtime.triton.plugin_models import every_operator

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux only")

# The device targets (runtime/targets/*.toml): Jetson Orin and Thor, A100, A10, L4, H100 and H200, B200, DGX Spark.
CAPABILITIES = ("SM80", "SM86", "SM87", "SM89", "SM90", "SM100", "SM110", "SM121")
READ = KernelSpec("AttnResAddReadNorm_2", 64, "float16", eps=1e-5, scale=0.5, norm_eps=1e-6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_operator(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def operators(model: Path) -> list[Operator]:
    found = plugin_operators(onnx.load(str(model)))
    return list({operator.spec.key: operator for _, operator in found}.values())


def cubin_parameters(code: PluginCode, folder: Path) -> list[int]:
    """Return the sizes of a kernel's parameters in their order, as the cubin itself declares them to a launcher."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(code.cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-elf", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Ordinal\s*:\s*0x(\w+)\s+Offset\s*:\s*0x(\w+)\s+Size\s*:\s*0x(\w+)", text)
    by_place = {int(place, 16): (int(offset, 16), int(size, 16)) for place, offset, size in found}
    sizes, end = [], 0
    for place in sorted(by_place):
        offset, size = by_place[place]
        assert offset == -(-end // size) * size  # each behind the last, aligned to itself
        end = offset + size
        sizes.append(size)
    assert sorted(by_place) == list(range(len(by_place)))
    return sizes


def check(operator: Operator, capability: str, folder: Path) -> PluginCode:
    """Hold what every plugin's code must be."""
    code = plugin_code(operator.spec, capability, operator.parameters)
    # Inputs, then integers, then outputs: exactly what TensorRT passes, and no hidden ones of triton's.
    symbol, names, kinds = entry_parameters(code.ptx)
    assert (symbol, names) == (code.symbol, (*operator.inputs, *operator.arguments, *operator.outputs))
    wanted = {**dict.fromkeys(names, ".u64"), **dict.fromkeys(operator.arguments, ".u32")}
    assert kinds == tuple(wanted.values())
    assert cubin_parameters(code, folder) == [{".u64": 8, ".u32": 4}[kind] for kind in kinds]
    assert not re.search(r"\.param\s+\.(f|b)\d+", code.ptx)  # floats are constants of the code
    assert f"{symbol}_param_" not in code.ptx
    # PTX for this GPU that its driver compiles, whatever instructions another of its generation may have.
    assert code.form == "ptx"
    assert f"\n.target sm_{capability[2:]}\n" in code.ptx
    assert code.code == code.ptx.encode()
    assert f"\n.reqntid {code.threads}\n" in code.ptx
    assert code.threads == 32 * operator.spec.launch.warps <= 1024
    assert code.spills == 0
    assert 0 < code.registers <= 255
    assert code.registers * code.threads <= 65536
    assert code.shared <= LARGEST_SHARED
    return code


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_code_takes_what_tensorrt_passes_and_nothing_spills(capability: str, tmp_path: Path) -> None:
    # One of each source of a kernel; benchmarks/plugin_kernels.py takes all operators for all of them.
    for operator in (
        depth_operator(KernelSpec("AttnResAddUnitReadNorm_9", 576, "bfloat16", eps=1e-6, norm_eps=1e-6)),
        depth_operator(KernelSpec("AttnResAddMergeNorm_2", 576, "bfloat16", eps=1e-6, norm_eps=1e-6, index=3)),
        depth_operator(KernelSpec("AttnResInter_4", 576, "bfloat16", eps=1e-6, queries=8)),
    ):
        check(operator, capability, tmp_path)


def test_every_operator_of_a_file(operators: list[Operator], tmp_path: Path) -> None:
    assert len(operators) == 16
    for operator in operators:
        check(operator, "SM110" if isinstance(operator.spec, RoutingSpec) else "SM87", tmp_path)


def test_selection_has_an_input_that_its_kernel_does_not_read(operators: list[Operator]) -> None:
    (select,) = [each for each in operators if isinstance(each.spec, RoutingSpec) and each.spec.kind == "select"]
    code = plugin_code(select.spec, "SM87", select.parameters)
    expected = ("score", "valid", "slots", "number_of_tokens", "number_of_slots", "index", "taken")
    assert code.parameters == select.parameters == expected
    assert "select_tokens_slots]" not in code.ptx
    assert "select_tokens_number_of_slots]" in code.ptx


def test_the_folder_lists_every_file_by_its_hash(model: Path, tmp_path: Path) -> None:
    small = model.parent / "small.onnx"
    loaded = onnx.load(str(model))
    del loaded.graph.node[3:]
    onnx.save(loaded, str(small))
    folder = tmp_path / "out" / "plugins"
    entries = write_plugins(small, "8.7", folder, tensorrt="10.13.3")
    assert [entry.op_type for entry in entries] == ["AttnResRead_2", "AttnResReadNorm_3", "AttnResAddRead_2"]
    files = [entry.file for entry in entries]
    assert sorted(path.name for path in folder.iterdir()) == sorted([INDEX, MODULE, *files])
    assert [path.name for path in folder.parent.iterdir()] == ["plugins"]
    index = json.loads((folder / INDEX).read_text())
    assert (index["compute_capability"], index["tensorrt"], index["nodes"]) == ("SM87", "10.13.3", 3)
    for entry in entries:
        code = (folder / entry.file).read_bytes()
        listed = index["kernels"][entry.key]
        assert hashlib.sha256(code).hexdigest() == entry.sha256 == listed["sha256"]
        assert entry_parameters(code.decode())[1] == entry.parameters == tuple(listed["parameters"])
        operator = index["operators"][entry.op_type]
        assert [*operator["inputs"], *operator["arguments"], *operator["outputs"]] == listed["parameters"]
        (tactic,) = operator["variants"][entry.variant]["tactics"]
        assert tactic["kernel"] == entry.key
    assert (folder / MODULE).read_bytes() == (ROOT / "runtime/deploy" / MODULE).read_bytes()
    # The same again, in place of the earlier folder.
    assert write_plugins(small, "SM87", folder, tensorrt="10.13.3") == entries


def test_the_plugin_form_names_the_plugin_of_every_node(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "plugin.onnx"
    assert write_plugin_model(model, out) == 16
    before, after = onnx.load(str(model)), onnx.load(str(out))
    variants = {}
    for old, new in zip(before.graph.node, after.graph.node, strict=True):
        found = {item.name: onnx.helper.get_attribute_value(item) for item in new.attribute}
        assert (found.pop("plugin_namespace"), found.pop("plugin_version")) == (b"depthwire", b"1")
        variants[new.output[0]] = found.pop("variant")
        assert found == {item.name: onnx.helper.get_attribute_value(item) for item in old.attribute}
        assert (old.op_type, list(old.input), list(old.output)) == (new.op_type, list(new.input), list(new.output))
    # Three merges of one name, of which two read another row; and gathers of three dtypes.
    assert [variants[name] for name in ("m1", "m2", "m3", "x", "p", "v", "y")] == [0, 1, 0, 0, 1, 2, 0]
    # It can be made of itself, and the plugins are the same.
    again = onnx.load(str(out))
    assert to_plugin_form(again) == 16
    assert again == after


def test_a_plugin_has_all_its_outputs(tmp_path: Path) -> None:
    loaded = onnx.load(str(every_operator(tmp_path / "model.onnx")))
    select = next(node for node in loaded.graph.node if node.op_type.startswith("SelectTokensBudget"))
    select.output[1] = ""
    del select.output[2]
    del loaded.graph.output[1]
    to_plugin_form(loaded)
    assert list(select.output) == ["index_b", "index_b/taken", "index_b/state_out"]


@pytest.mark.parametrize("version", ["10.3.0", "10.8", "8.6.1", "1.7.1", "", "new"])
def test_a_tensorrt_without_such_plugins_is_refused(version: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write_plugins(model, "SM87", tmp_path / "plugins", tensorrt=version)
    assert caught.value.code == "plugin.tensorrt-version"
    assert not (tmp_path / "plugins").exists()


def test_newer_ones_are_taken() -> None:
    for version in ("10.9", "10.13.3.9", "11.4.1"):
        require_version(version)


def test_a_folder_of_something_else_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(BuildError) as caught:
        write_plugins(model, "SM87", tmp_path, tensorrt="10.13")
    assert caught.value.code == "plugin.not-plugins"
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_model_without_operators_has_no_plugins(tmp_path: Path) -> None:
    loaded = onnx.load(str(every_operator(tmp_path / "model.onnx")))
    del loaded.graph.node[:]
    onnx.save(loaded, str(tmp_path / "model.onnx"))
    with pytest.raises(UsageError, match=r"triton\.no-operators"):
        write_plugins(tmp_path / "model.onnx", "SM87", tmp_path / "plugins", tensorrt="10.13")


def test_a_dtype_that_no_plugin_has_is_refused(tmp_path: Path) -> None:
    loaded = onnx.load(str(every_operator(tmp_path / "model.onnx")))
    for value in loaded.graph.input:
        if value.name == "positions":
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    with pytest.raises(BuildError) as caught:
        plugin_operators(loaded)
    assert (caught.value.code, caught.value.got) == ("plugin.dtype", "ONNX element type 11")


def test_what_is_specific_to_one_gpu_ships_as_a_cubin(tmp_path: Path) -> None:
    # Triton reduces floats over a warp with an instruction that 10.0 alone has.
    spec = KernelSpec("AttnResAddReadNorm_4", 128, "bfloat16", eps=1e-6, norm_eps=1e-6)
    operator = depth_operator(spec)
    code = plugin_code(spec, "SM100", operator.parameters)
    assert "redux.sync.max.f32" in code.ptx or "redux.sync.max.NaN.f32" in code.ptx
    assert (code.form, code.code[:4]) == ("cubin", b"\x7fELF")
    assert "\n.target sm_100a\n" in code.ptx
    assert code.parameters == operator.parameters
    assert cubin_parameters(code, tmp_path) == [8] * 9
    assert code.code == code.cubin
    assert check(operator, "SM110", tmp_path).form == "ptx"


def broken(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> str:
    """Compile a kernel whose PTX was changed, and return the error's code."""
    compiled = compile_kernel(READ, "SM87", ptx_version=83)
    assert old in compiled.ptx
    changed = dataclasses.replace(compiled, ptx=compiled.ptx.replace(old, new, 1))
    monkeypatch.setattr(plugin_ptx, "compile_kernel", lambda *_, **__: changed)
    with pytest.raises(BuildError) as caught:
        plugin_code(READ, "SM87", depth_operator(READ).parameters)
    return caught.value.code


def test_a_kernel_that_reads_tritons_own_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert broken(monkeypatch, "[attn_res_read_param_0]", "[attn_res_read_param_8]") == "plugin.parameters"


def test_a_kernel_with_another_number_of_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "\t.param .u64 .ptr .global .align 1 attn_res_read_param_8\n"
    assert broken(monkeypatch, f",\n{line}", "\n") == "plugin.parameters"


def test_what_does_not_assemble_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert broken(monkeypatch, "ld.global", "ld.globe") == "plugin.assembler"


def test_what_spills_or_asks_for_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_ptx, "resources_of", lambda _: (32, 8))
    assert broken(monkeypatch, "ld.global", "ld.global") == "plugin.resources"
    monkeypatch.undo()
    compiled = compile_kernel(READ, "SM87", ptx_version=83)
    large = dataclasses.replace(compiled, shared=LARGEST_SHARED + 1)
    monkeypatch.setattr(plugin_ptx, "compile_kernel", lambda *_, **__: large)
    with pytest.raises(BuildError, match=r"plugin\.resources"):
        plugin_code(READ, "SM87", depth_operator(READ).parameters)


def test_a_read_has_launches_to_choose_from_but_those_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = onnx.load(str(every_operator(tmp_path / "model.onnx", width=1024)))
    del loaded.graph.node[1:]
    onnx.save(loaded, str(tmp_path / "model.onnx"))
    entries = write_plugins(tmp_path / "model.onnx", "SM87", tmp_path / "plugins", tensorrt="10.13")
    assert [(entry.tactic, entry.threads) for entry in entries] == [(1, 128), (2, 256), (3, 64)]
    assert len({entry.file for entry in entries}) == 3
    index = json.loads((tmp_path / "plugins" / INDEX).read_text())
    (variant,) = index["operators"]["AttnResRead_2"]["variants"]
    assert [tactic["kernel"] for tactic in variant["tactics"]] == [entry.key for entry in entries]

    def without(threads: int) -> None:
        def code(spec: KernelSpec, *_: object) -> PluginCode:
            if 32 * spec.launch.warps == threads:
                raise BuildError("plugin.resources", "it spills")
            return plugin_code(spec, "SM87", depth_operator(spec).parameters)

        monkeypatch.setattr(plugin, "plugin_code", code)
        plugin._code.cache_clear()

    without(256)
    entries = write_plugins(tmp_path / "model.onnx", "SM87", tmp_path / "plugins", tensorrt="10.13")
    assert [(entry.tactic, entry.threads) for entry in entries] == [(1, 128), (2, 64)]
    without(128)
    with pytest.raises(BuildError, match="it spills"):
        write_plugins(tmp_path / "model.onnx", "SM87", tmp_path / "plugins", tensorrt="10.13")
    plugin._code.cache_clear()
