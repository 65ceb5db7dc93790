"""The plugins as NVIDIA's own code takes them: tensorrt.plugin, its type stubs, and the parser of TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import pytest

from depthwire.export.to_onnx import to_onnx
from depthwire.runtime.triton.plugin import MODULE, write_plugin_model, write_plugins
from tests.conftest import ROOT
from tests.export.tiny import captured, lifted
from tests.runtime.triton.plugin_builder import PYTHON
from tests.runtime.triton.plugin_launcher import launch_of, read_index
from tests.runtime.triton.plugin_models import every_operator

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux only"),
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install 'depthwire[rtx]'"),
]
needs_python = pytest.mark.skipif(not PYTHON.is_dir(), reason="run tools/fetch_tensorrt_python.py")

SHAPES = {"b": (2, 1, 3), "t": (40, 33, 64), "k": (12, 33, 1)}  # batch, tokens and slots of three sets of shapes


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plugins of every operator, and the file they were made of."""
    folder = tmp_path_factory.mktemp("plugins")
    every_operator(folder / "model.onnx", width=256)  # from where on there is more than one way to launch a read
    write_plugins(folder / "model.onnx", "SM87", folder / "plugins", tensorrt="10.13")
    return folder / "plugins"


def requests(folder: Path) -> list[dict[str, Any]]:
    """Return every node with three sets of shapes: those of the file, and others of the same ranks."""
    write_plugin_model(folder.parent / "model.onnx", folder.parent / "plugin.onnx")
    graph = onnx.load(str(folder.parent / "plugin.onnx")).graph
    values = {item.name: item.type.tensor_type.shape.dim for item in (*graph.input, *graph.output, *graph.value_info)}
    renamed = {SHAPES["b"][0]: "b", SHAPES["t"][0]: "t", SHAPES["k"][0]: "k"}

    def dims(name: str, place: int) -> list[int]:
        sizes = [dim.dim_value for dim in values[name]]
        fixed = {"state": 1, "state_out": 1}.get(name)  # [B, 2]: the second is no batch
        return [
            SHAPES[renamed[size]][place] if size in renamed and at != fixed else size for at, size in enumerate(sizes)
        ]

    return [
        {
            "op_type": node.op_type,
            "variant": next(item.i for item in node.attribute if item.name == "variant"),
            "shapes": [[dims(name, place) for name in node.input] for place in range(3)],
            "wanted": [[dims(name, place) for name in node.output] for place in range(3)],
        }
        for node in graph.node
    ]


def python(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, input=given, capture_output=True, text=True, check=False)


def answers_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Return what a process answered; TensorRT's own messages go the same way."""
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@needs_python
@pytest.mark.parametrize("version", ["10.9", "11.4"])
def test_tensorrt_makes_the_launches_that_are_interpreted(version: str, plugins: Path) -> None:
    asked, index = requests(plugins), read_index(plugins)
    assert len(asked) == 16
    done = python("-m", "tests.runtime.triton.plugin_builder", version, str(plugins), given=json.dumps(asked))
    answers = answers_of(done)
    for request, answer in zip(asked, answers, strict=True):
        assert answer["combination"] == answer["types"]
        assert answer["layouts"] == ["LINEAR"]
        ways = 2 if request["op_type"].startswith("AttnRes") else 1
        assert sorted(found["tactic"] for found in answer["launches"]) == sorted([*range(1, ways + 1)] * 3)
        given = list(zip(request["shapes"], request["wanted"], strict=True)) * ways
        for (shapes, wanted), found in zip(given, answer["launches"], strict=True):
            launch = launch_of(index, request["op_type"], request["variant"], shapes, found["tactic"])
            assert [found[f"grid_{axis}"] for axis in "xyz"] == [launch.grid, 1, 1]
            assert [found[f"block_{axis}"] for axis in "xyz"] == [launch.kernel["threads"], 1, 1]
            assert found["shared_mem"] == launch.kernel["shared"]
            assert (found["symbol"], found["sha256"]) == (launch.kernel["symbol"], launch.kernel["sha256"])
            assert found["arguments"] == launch.arguments
            assert found["outputs"] == [shape for shape, _ in launch.outputs] == wanted


_LOAD = """
import sys, types
from pathlib import Path
from tests.runtime.triton.plugin_builder import load, tensorrt
trt = tensorrt("11.4")
"""


@needs_python
def test_another_tensorrt_and_a_damaged_file_are_refused(plugins: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plugins"
    folder.mkdir()
    for path in plugins.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    done = python("-c", f"{_LOAD}trt.__version__ = '10.8.0.43'\nload(Path({str(folder)!r}))")
    assert done.returncode == 1
    assert "PluginError: TensorRT 10.8.0.43 has no ahead-of-time plugins" in done.stderr
    kernel = next(folder.glob("AttnResRead_2*.ptx"))
    kernel.write_bytes(kernel.read_bytes().replace(b"ld.global", b"ld.globaI", 1))
    done = python("-c", f"{_LOAD}load(Path({str(folder)!r}))")
    assert done.returncode == 1
    assert f"PluginError: {kernel.name} has sha256" in done.stderr


@needs_python
def test_an_operator_that_was_built_from_its_body_is_seen(plugins: Path) -> None:
    code = f"""{_LOAD}
class Flags:
    STRONGLY_TYPED, PREFER_AOT_PYTHON_PLUGINS = 1, 5
trt.NetworkDefinitionCreationFlag = Flags
module = load(Path({str(plugins)!r}))
def network(*kinds):
    layers = [types.SimpleNamespace(type=getattr(trt.LayerType, kind)) for kind in kinds]
    return types.SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
print(module.network_flags(), module.check(network(*["PLUGIN_V3"] * 16, "SHUFFLE")))
module.check(network(*["PLUGIN_V3"] * 15, "SHUFFLE"))
"""
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "34 16"
    assert "PluginError: 16 operators are to be plugins, but the network has 15 plugin layers" in done.stderr


def test_the_parser_takes_plugins_for_the_plugin_form_alone(tmp_path: Path) -> None:
    function, plugin = tmp_path / "function.onnx", tmp_path / "plugin.onnx"
    ir.save(to_onnx(lifted(captured())), function)
    assert write_plugin_model(function, plugin) == 6
    done = python("-m", "tests.runtime.triton.plugin_parser", "AttnResRead_2", str(function), str(plugin))
    answers = answers_of(done)
    assert [answer["parsed"] for answer in answers] == [True, False], done.stderr
    # A body wins over a registered plugin, unless the node names the plugin's namespace.
    assert answers[0]["asked"] == []
    ((node, fields, phase),) = answers[1]["asked"]
    assert (node, fields, phase) == ("attn_res_read_1", {"variant": ["int32", [0]]}, "BUILD")
    # Where nothing is registered, the plugin form is built from its bodies like the other.
    done = python("-m", "tests.runtime.triton.plugin_parser", "AnotherOperator", str(function), str(plugin))
    others = answers_of(done)
    assert others[0] == others[1] == answers[0]


def checked(module: Path, folder: Path) -> str:
    """Type-check the module against the stubs, and say what is wrong."""
    options = "strict = true\nallow_untyped_calls = true\npython_version = 3.10\n"
    silent = "[mypy-tensorrt.*,tensorrt_bindings.*]\nignore_errors = true\nfollow_imports = silent\n"
    (folder / "mypy.ini").write_text(f"[mypy]\n{options}{silent}")
    config = ["--config-file", str(folder / "mypy.ini"), "--cache-dir", str(ROOT / ".mypy_cache" / "plugins")]
    environment = {**os.environ, "MYPYPATH": str(PYTHON / "stubs")}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *config, str(module)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


@needs_python
def test_the_module_type_checks_against_the_stubs_of_tensorrt(tmp_path: Path) -> None:
    source = ROOT / "runtime/deploy" / MODULE
    assert checked(source, tmp_path) == "Success: no issues found in 1 source file\n"
    text = source.read_text()
    for place, (old, new) in enumerate(
        itertools.chain(
            [("trtp.cdiv(", "trtp.ceil_div("), ("LayerType.PLUGIN_V3", "LayerType.PLUGIN_V9")],
            [("network.num_layers", "network.layers"), ('params.block_x = kernel["threads"]', 'params.block_x = "1"')],
        )
    ):
        assert old in text
        broken = tmp_path / f"broken_{place}.py"
        broken.write_text(text.replace(old, new))
        assert "Found 1 error" in checked(broken, tmp_path)
