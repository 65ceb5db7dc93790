"""Every launch that a plugin would make, made in Triton's interpreter: on the case tables and on whole models."""

from __future__ import annotations

import functools
import json
import os
import shutil
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


def converted(name: str, length: int, out: Path) -> Path:
    """Convert a small trained model."""
    options: dict[str, Any] = {"dtype": "fp32", "seq_len": length, "windows": 1, "text": DATA / "sotu-2000.txt"}
    depthwire.convert(DATA / name, out, verify=False, build=False, **options)
    return out


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The graph, plugins and goldens of a bundle for Jetson Thor."""
    folder = tmp_path_factory.mktemp("routed")
    artefact = converted("routed_small/subjective_depth", 64, folder / "out")
    depthwire.bundle(artefact, target="jetson-thor-t5000", form="plugin", out=folder / "bundle")
    bundle = folder / "bundle"
    return bundle / "model.onnx", bundle / "plugins" / "model", bundle / "goldens" / "model"


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Those of an artefact."""
    artefact = converted("attn_res_small", 8, tmp_path_factory.mktemp("read") / "out")
    write_plugins(artefact / "model.onnx", "SM87", artefact / "plugins", tensorrt="10.13")
    return artefact / "model.onnx", artefact / "plugins", artefact / "goldens.safetensors"


@pytest.mark.parametrize(("kind", "launches", "outputs"), [("routed", 18, 7), ("read", 16, 1)])
def test_a_model_with_its_plugins_reproduces_its_goldens(
    kind: str, launches: int, outputs: int, request: pytest.FixtureRequest
) -> None:
    found = interpreted(*request.getfixturevalue(kind))
    # A routed bundle's outputs are the logits, and the tokens that each routed block took.
    assert sum(name.startswith("golden ") for name in found) == outputs
    assert len(found) == launches + outputs
    assert failures(found) == []


def break_grid(index: dict[str, Any]) -> None:
    (variant,) = index["operators"]["GatherTokens"]["variants"][:1]
    variant["tactics"][0]["grid"][-1]["per"] *= 2


def break_argument(index: dict[str, Any]) -> None:
    for operator in index["operators"].values():
        if "number_of_slots" in operator["arguments"]:
            operator["arguments"]["number_of_tokens"] = operator["arguments"]["number_of_slots"]


@pytest.mark.parametrize(("sabotage", "wrong"), [(break_grid, "GatherTokens"), (break_argument, "SelectTokens")])
def test_wrong_launch_parameters_are_found_out(
    sabotage: Any, wrong: str, routed: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, shipped, goldens = routed
    plugins = tmp_path / "plugins"
    shutil.copytree(shipped, plugins)
    index = json.loads((plugins / INDEX).read_text())
    sabotage(index)
    (plugins / INDEX).write_text(json.dumps(index))
    failed = failures(interpreted(model, plugins, goldens))
    assert any(name.startswith(wrong) for name in failed)
    assert any(name.startswith("golden") for name in failed)
