"""The Python interface: its names, its cost to import, and that it mirrors the command line."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import depthwire
from depthwire import api
from depthwire._options import Options
from depthwire.cli._group import VERBS
from depthwire.errors import DepthwireError
from depthwire.recipe import OPTIONS


def test_every_public_name_is_there_and_listed_in_order() -> None:
    assert depthwire.__all__ == sorted(depthwire.__all__)
    for name in depthwire.__all__:
        assert getattr(depthwire, name) is not None
    assert dir(depthwire) == depthwire.__all__
    assert set(api.__all__) - {"Options"} <= set(depthwire.__all__)
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        depthwire.convrt  # noqa: B018


def test_the_listing_for_type_checkers_is_the_real_one() -> None:
    tree = ast.parse(Path(depthwire.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("depthwire")
        for alias in node.names
    }
    assert imported == set(depthwire.__all__) - {"__version__"}


def test_every_verb_is_a_function_and_the_other_way_round() -> None:
    functions = {name for name in api.__all__ if inspect.isfunction(getattr(api, name))}
    # ``capture`` has no artefact of its own to write, ``dry_run`` is ``convert --dry-run``, ``verify_result`` is
    # ``verify --result``, ``run_bundle`` is ``bundle --on``.
    assert functions == set(VERBS) | {"capture", "dry_run", "verify_result", "run_bundle"}
    for name in functions:
        assert callable(getattr(depthwire, name))
        assert inspect.getdoc(getattr(api, name))


def test_every_option_is_a_keyword() -> None:
    assert set(Options.__annotations__) == set(OPTIONS) - {"source", "out"}


PROBE = """
import sys, time
began = time.perf_counter()
import depthwire
assert time.perf_counter() - began < 0.5
import depthwire.errors, depthwire.artifact, depthwire.recipe, depthwire.stages, depthwire.api, depthwire.cli.main
depthwire.convert, depthwire.Recipe, depthwire.export
heavy = {"torch", "transformers", "onnx", "onnxruntime", "onnxscript", "polygraphy", "tensorrt_rtx", "gguf", "rich"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_importing_imports_nothing_heavy() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", PROBE], check=True)


EXPORT = """
import depthwire
assert callable(depthwire.export)
import depthwire.export.ops
assert depthwire.export.ops.__name__ == "depthwire.export.ops"
from depthwire import export
assert callable(export)
try:
    export("no/such/model", "{out}", attn_res="block:0")
except depthwire.DepthwireError as error:
    assert error.code == "recipe.attn-res"
else:
    raise AssertionError
"""


@pytest.mark.parametrize("first", ["import depthwire.export", "import depthwire.export.ops", "pass"])
def test_export_is_a_verb_and_a_package(tmp_path: Path, first: str) -> None:
    code = f"{first}\n{EXPORT.format(out=tmp_path / 'out')}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wrong_call_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DepthwireError) as caught:
        depthwire.convert("model", tmp_path / "out", seqlen=4)  # type: ignore[call-arg]
    assert caught.value.code == "recipe.unknown-option"
    with pytest.raises(DepthwireError) as caught:
        depthwire.convert(out=tmp_path / "out")
    assert caught.value.code == "recipe.no-source"
    with pytest.raises(TypeError, match="positional"):
        depthwire.convert("model", tmp_path / "out", "full")  # type: ignore[call-arg]
    assert list(tmp_path.iterdir()) == []


def test_a_module_goes_all_the_way(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tests.cli.models import tiny_llama

    model, out = tiny_llama(), tmp_path / "out"
    result = depthwire.convert(model, out, attn_res="full", seq_len=8, windows=1)
    assert result.verdict is not None
    assert result.verdict.passed
    assert result.engine is None
    assert [stage.name for stage in result.stages.records] == ["capture", "rewrite", "goldens", "export", "verify"]
    assert result.report["verdict"] == "pass"

    with pytest.raises(DepthwireError) as caught:
        depthwire.verify(out)
    assert caught.value.code == "verify.no-source"
    assert depthwire.verify(out, source=model, windows=1).passed
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    with pytest.raises(depthwire.VerificationError) as failed:
        depthwire.verify(out, source=model, windows=1)
    assert not failed.value.report.passed
    assert depthwire.verify(out, goldens_only=True).passed


def test_a_program_is_handed_from_verb_to_verb(tmp_path: Path) -> None:
    from tests.cli.models import tiny_llama

    program = depthwire.capture(tiny_llama(), seq_len=8)
    lifted = depthwire.rewrite(program, attn_res="block:2")
    assert next(record for record in lifted.history if record.name == "lift_attn_res").rewrites > 0
    assert depthwire.dry_run(program, attn_res="full").target["name"] == "ort-cpu"
    artifact = depthwire.export(lifted, tmp_path / "out", target="ort-cuda")
    assert artifact.manifest.custom_ops
    assert artifact.manifest.recipe["target"] == "ort-cuda"
