"""Every launch that a plugin would make, made in Triton's interpreter: on the case tables and on whole models."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import depthwire
from depthwire.runtime.triton.plugin import INDEX, write_plugins
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux only")

DATA = ROOT / "tests" / "data"


def interpreted(*arguments: object) -> dict[str, dict[str, Any]]:
    """Run in a process of its own, which triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.runtime.triton.interpret_plugins", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = {line.pop("case"): line for line in lines}
    assert len(found) == len(lines)
    return found


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    return interpreted("table")


def failures(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is not as it should be."""
    return [
        name
        for name, found in results.items()
        # A merge takes phase 1's mean, rounded to the dtype on its way, once more than a single read.
        if not found.get("same", True)
        or not found.get("sum", True)
        or found.get("error", 0.0) > found.get("allowed", 0.0) * (2 if name.startswith("two ") else 1)
        or found.get("lse_error", 0.0) > found.get("lse_allowed", 0.0)
    ]


@pytest.mark.parametrize(
    ("prefix", "least"),
    [
        ("n", 30),
        ("inter ", 8),
        ("two ", 8),
        ("select ", 20),
        ("budget ", 30),
        ("gather ", 10),
        ("scatter ", 10),
        ("surprise ", 10),
    ],
)
def test_launches_on_the_case_tables(prefix: str, least: int) -> None:
    chosen = {name: found for name, found in table().items() if name.startswith(prefix)}
    assert len(chosen) >= least
    assert failures(chosen) == []


def test_a_window_that_is_a_token_too_long_is_found_out() -> None:
    wrong = {name: found for name, found in table().items() if name.startswith("wrong window")}
    assert len(wrong) >= 5
    assert sorted(failures(wrong)) == sorted(wrong)


@functools.cache
def converted(name: str, length: int, out: Path) -> Path:
    """Convert a small trained model and write its plugins."""
    options: dict[str, Any] = {"dtype": "fp32", "seq_len": length, "windows": 1, "text": DATA / "sotu-2000.txt"}
    depthwire.convert(DATA / name, out, verify=False, build=False, **options)
    write_plugins(out / "model.onnx", "SM87", out / "plugins", tensorrt="10.13")
    return out


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted("routed_small/subjective_depth", 64, tmp_path_factory.mktemp("routed") / "out")


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted("attn_res_small", 8, tmp_path_factory.mktemp("read") / "out")


@pytest.mark.parametrize(("kind", "launches"), [("routed", 18), ("read", 16)])
def test_a_model_with_its_plugins_reproduces_its_goldens(
    kind: str, launches: int, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    found = interpreted(folder / "model.onnx", folder / "plugins", folder / "goldens.safetensors")
    golden = {name: each for name, each in found.items() if name.startswith("golden ")}
    assert len(golden) == 1
    assert len(found) == launches + 1
    assert failures(found) == []


def break_grid(index: dict[str, Any]) -> None:
    (variant,) = index["operators"]["GatherTokens"]["variants"][:1]
    variant["tactics"][0]["grid"][-1]["per"] *= 2


def break_argument(index: dict[str, Any]) -> None:
    for operator in index["operators"].values():
        if "number_of_slots" in operator["arguments"]:
            operator["arguments"]["number_of_tokens"] = operator["arguments"]["number_of_slots"]


@pytest.mark.parametrize(("sabotage", "wrong"), [(break_grid, "GatherTokens"), (break_argument, "SelectTokens")])
def test_wrong_launch_parameters_are_found_out(sabotage: Any, wrong: str, routed: Path, tmp_path: Path) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    for path in (routed / "plugins").iterdir():
        os.link(path, plugins / path.name)
    index = json.loads((plugins / INDEX).read_text())
    sabotage(index)
    (plugins / INDEX).unlink()
    (plugins / INDEX).write_text(json.dumps(index))
    failed = failures(interpreted(routed / "model.onnx", plugins, routed / "goldens.safetensors"))
    assert any(name.startswith(wrong) for name in failed)
    assert any(name.startswith("golden") for name in failed)
