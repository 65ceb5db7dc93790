"""Rules about the repository itself: pairing, names, import direction, lean imports, file length."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from depthwire.passes._base import VERBS, Pass

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("depthwire", "passes", "export", "runtime", "models")
LONGEST = {"tests": 450}
SHARED = (
    "depthwire.errors",
    "depthwire.program",
    "depthwire.ir_text",
    "depthwire.ops",
    "depthwire.route",
    "depthwire._mapped",
    "depthwire._logs",
    "depthwire._whole",
    "depthwire._hash",
)


def files(*folders: str) -> list[Path]:
    """Every Python file of some folders; the links under depthwire/ lead to folders listed themselves."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if path == path.resolve())


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield str(node.module)


def pass_files() -> list[Path]:
    return [path for path in files("passes") if any(path.stem.startswith(f"{verb}_") for verb in VERBS)]


def pass_classes() -> dict[str, type[Pass]]:
    return {step.name: step for step in Pass.__subclasses__() if step.__module__.startswith("depthwire.passes.")}


def test_every_pass_has_its_tests_and_its_golden_text() -> None:
    paths = pass_files()
    assert len(paths) >= 6
    for path in paths:
        assert (ROOT / "tests/passes" / f"test_{path.stem}.py").is_file(), path
        assert list((ROOT / "tests/passes/golden").glob(f"{path.stem}*.txt")), path


def test_every_golden_text_belongs_to_a_pass() -> None:
    stems = tuple(path.stem for path in pass_files())
    for path in (ROOT / "tests/passes/golden").iterdir():
        assert path.name.startswith(stems), path


def test_a_pass_is_named_by_a_verb_and_after_its_file() -> None:
    for path in pass_files():
        importlib.import_module(f"depthwire.passes.{path.stem}")
    classes = pass_classes()
    assert sorted(classes) == sorted(path.stem for path in pass_files())
    for name, step in classes.items():
        assert name.split("_")[0] in VERBS
        assert step.__module__ == f"depthwire.passes.{name}"
        assert step.__name__ == "".join(part.capitalize() for part in name.split("_"))
        assert step.__doc__
        assert "Before::" in str(sys.modules[step.__module__].__doc__)
        assert "After::" in str(sys.modules[step.__module__].__doc__)


@pytest.mark.parametrize("folder", ["passes", "tests/passes"])
def test_file_names_are_unique(folder: str) -> None:
    names = Counter(path.name for path in files(folder) if path.name not in ("__init__.py", "conftest.py"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("passes", ("depthwire.passes", *SHARED)),
        ("models", ("depthwire.models", *SHARED)),
        # capture loads AttnRes checkpoints into the reference decoder
        ("export", ("depthwire.export", "depthwire.passes", "depthwire.models", "depthwire.artifact", *SHARED)),
    ],
)
def test_folders_import_in_one_direction(folder: str, allowed: tuple[str, ...]) -> None:
    for path in files(folder):
        if path == ROOT / "export/__init__.py":  # the package is callable: depthwire.export(...) is the verb
            continue
        own = [name for name in imports(path) if name.split(".")[0] == "depthwire"]
        assert [name for name in own if not name.startswith(allowed)] == [], path


def test_passes_import_torch_and_the_standard_library_only() -> None:
    extra = {
        "depthwire",
        "torch",
        "safetensors",  # the queries file
        "__future__",
    }
    for path in files("passes"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots - extra - set(sys.stdlib_module_names) == set(), path


def test_the_runtime_knows_none_of_passes_export_and_models() -> None:
    banned = ("depthwire.passes", "depthwire.export", "depthwire.models", "depthwire.cli", "depthwire.api")
    for path in files("runtime"):
        assert [name for name in imports(path) if name.startswith(banned)] == [], path


def test_nothing_imports_the_folders_by_their_bare_names() -> None:
    for path in files(*FOLDERS, "tests", "benchmarks", "examples"):
        bare = {name.split(".")[0] for name in imports(path)} & {"passes", "export", "runtime", "models"}
        assert bare == set(), path


def _at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: everything outside function bodies."""
    for statement in body:
        stack: list[ast.AST] = [statement]
        while stack:
            node = stack.pop()
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            yield node
            stack.extend(ast.iter_child_nodes(node))


def test_no_module_reads_the_environment_when_it_is_imported() -> None:
    for path in files(*FOLDERS):
        for node in _at_import(tree(path).body):
            attribute = node.attr if isinstance(node, ast.Attribute) else None
            assert attribute not in ("environ", "getenv"), f"{path}:{getattr(node, 'lineno', 0)}"


OPTIONAL = ("matplotlib", "transformers", "gguf", "accelerate", "tokenizers", "tensorrt", "tensorrt_rtx", "triton")
HEAVY = (*OPTIONAL, "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "polygraphy")


def test_no_module_imports_an_optional_dependency_when_it_is_imported() -> None:
    kernels = ROOT / "runtime/triton/kernels"  # triton reads their source; functions alone import them
    for path in (path for path in files(*FOLDERS) if kernels not in path.parents and path != DEVICE):
        for node in _at_import(tree(path).body):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in OPTIONAL for name in names):
                assert _only_for_types(tree(path), node), f"{path}: {names}"


# Copied to a device, which has tensorrt; the product reads it as a file.
DEVICE = ROOT / "runtime/deploy/depthwire_plugins.py"


def test_nothing_imports_what_is_made_for_a_device() -> None:
    assert DEVICE.is_file()
    assert [path for path in files(*FOLDERS) if f"depthwire.runtime.deploy.{DEVICE.stem}" in imports(path)] == []


def test_only_functions_import_the_gpu_kernels() -> None:
    for path in files(*FOLDERS):
        if path.parent != ROOT / "runtime/triton/kernels":
            names = [node.module for node in _at_import(tree(path).body) if isinstance(node, ast.ImportFrom)]
            assert [name for name in names if str(name).startswith("depthwire.runtime.triton.kernels")] == [], path


def _only_for_types(module: ast.Module, node: ast.AST) -> bool:
    guards = (
        item for item in ast.walk(module) if isinstance(item, ast.If) and ast.unparse(item.test) == "TYPE_CHECKING"
    )
    return any(
        getattr(node, "lineno", 0) == getattr(inner, "lineno", -1) for item in guards for inner in ast.walk(item)
    )


@pytest.mark.parametrize("module", ["depthwire", "depthwire.errors", "depthwire.artifact", "depthwire.cli.main"])
def test_imports_are_lean(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", [*FOLDERS, "tests", "benchmarks", "examples"])
def test_files_are_short(folder: str) -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files(folder)}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST.get(folder, 400)} == {}
