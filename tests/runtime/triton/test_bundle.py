"""The kernels of a whole model: found in the file, compiled, written, read back and checked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from onnx import TensorProto, helper

from depthwire.errors import BuildError
from depthwire.runtime.triton.bundle import INDEX, Entry, kernels_of, read_bundle, write_bundle
from depthwire.runtime.triton.spec import KernelSpec

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux only")

READ = KernelSpec("AttnResAddReadNorm_2", 64, "float16", eps=1e-5, scale=0.5, norm_eps=1e-6)


def node(op_type: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), outputs.split(), domain="depthwire", **attributes)


def model(path: Path, *, typed: bool = True) -> Path:
    """Write a file with a read, twice, and both phases of a two-phase form."""
    nodes = [
        node("AttnResAddReadNorm_2", "u g a b b", "x y", eps=1e-5, scale=0.5, norm_eps=1e-6),
        node("AttnResAddReadNorm_2", "u g a y b", "x2 y2", eps=1e-5, scale=0.5, norm_eps=1e-6),
        node("AttnResInter_2", "U a b", "o l", eps=1e-5, scale=1.0),
        node("AttnResMerge_0", "u o l", "z", eps=1e-5, scale=1.0, index=1),
    ]
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT16, [4, 64]) for name in ("a", "b", "y", "z")}
    values["o"] = helper.make_tensor_value_info("o", TensorProto.FLOAT16, [3, 4, 64])
    values["l"] = helper.make_tensor_value_info("l", TensorProto.FLOAT, [3, 4])
    parameters = [
        helper.make_tensor(name, TensorProto.FLOAT, shape, [0.0] * (shape[-1] * (3 if len(shape) == 2 else 1)))
        for name, shape in (("u", [64]), ("g", [64]), ("U", [3, 64]))
    ]
    graph = helper.make_graph(nodes, "g", [values["a"], values["b"]], [values["z"]], parameters)
    if typed:
        graph.value_info.extend(values[name] for name in ("y", "o", "l"))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("depthwire", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def test_the_kernels_of_a_file_are_found_once_each(tmp_path: Path) -> None:
    found = kernels_of(model(tmp_path / "m.onnx"))
    common: dict[str, Any] = {"dtype": "float16", "eps": 1e-5}
    wanted = [
        READ,
        KernelSpec("AttnResInter_2", 64, queries=3, **common),
        KernelSpec("AttnResMerge_0", 64, index=1, **common),
    ]
    assert [spec.key for spec in found] == [spec.key for spec in wanted]


def test_a_file_that_does_not_tell_dtypes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        kernels_of(model(tmp_path / "m.onnx", typed=False))
    assert (caught.value.code, caught.value.got) == ("triton.untyped", "o, l")


def test_a_bundle_is_written_and_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "kernels"
    entries = write_bundle([READ], ["8.7", "SM89"], folder)
    assert read_bundle(folder) == entries
    assert [entry.capability for entry in entries] == [87, 89]
    assert sorted(path.name for path in folder.iterdir()) == sorted([INDEX, *(entry.file for entry in entries)])
    assert [path.name for path in folder.parent.iterdir()] == ["kernels"]
    plan = READ.launch
    assert {(e.key, e.threads, e.programs, e.parameters) for e in entries} == {
        (READ.key, 32 * plan.warps, plan.programs, len(READ.inputs) + len(READ.outputs) + 2)
    }
    # The same kernels again give the same bytes; fewer replace the earlier bundle as a whole.
    assert write_bundle([READ], ["8.7"], folder) == entries[:1]
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_is_not_a_bundle_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(BuildError, match="a folder without an index"):
        write_bundle([READ], ["8.7"], tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def damage_cubin(folder: Path, entry: Entry) -> str:
    (folder / entry.file).write_bytes(b"other")
    return "sha256"


def remove_cubin(folder: Path, entry: Entry) -> str:
    (folder / entry.file).unlink()
    return "no such file"


def another_version(folder: Path, entry: Entry) -> str:  # noqa: ARG001 - the same form as the others
    (folder / INDEX).write_text((folder / INDEX).read_text().replace("depthwire-kernels 1", "depthwire-kernels 2"))
    return "depthwire-kernels 2"


def column_lost(folder: Path, entry: Entry) -> str:
    (folder / INDEX).write_text((folder / INDEX).read_text().replace(f"\t{entry.symbol}", ""))
    return entry.key


def up_and_out(folder: Path, entry: Entry) -> str:
    (folder.parent / entry.file).write_bytes((folder / entry.file).read_bytes())
    (folder / INDEX).write_text((folder / INDEX).read_text().replace(f"\t{entry.file}", f"\t../{entry.file}"))
    return "no such file"


@pytest.mark.parametrize("damage", [damage_cubin, remove_cubin, another_version, column_lost, up_and_out])
def test_a_damaged_bundle_is_refused(damage: object, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    (entry,) = write_bundle([READ], ["SM87"], folder)
    assert callable(damage)
    text = damage(folder, entry)
    with pytest.raises(BuildError) as caught:
        read_bundle(folder)
    assert caught.value.code == "triton.not-a-bundle"
    assert text in str(caught.value.got)
