"""The part of a bundle that runs: the script, the modules it imports, as they are, and the README."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import depthwire
from depthwire.errors import InternalError
from depthwire.runtime import deploy
from depthwire.runtime.deploy.manifest import LIBRARY, SCRIPT

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAIN = "depthwire.runtime.deploy.main"
_PACKAGE = '"""The modules of Depthwire that this bundle needs; the whole of it is not needed here."""\n'


def write_script(root: Path) -> None:
    """Write ``build_and_verify.py`` and the modules it imports, below ``lib/``.

    Every module is the file of this installation, found by following the imports of ``deploy.main``, so
    that the device judges with the very code that ``depthwire verify`` judges with.
    """
    folder = Path(deploy.__file__).parent
    shutil.copyfile(folder / SCRIPT, root / SCRIPT)
    (root / SCRIPT).chmod(0o755)
    for name in script_modules():
        source = _file(name)
        target = root / LIBRARY / Path(*name.split(".")).with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    for package in {path.parent for path in (root / LIBRARY).rglob("*.py")}:
        for parent in (package, *package.parents):
            if parent in {root / LIBRARY, *(root / LIBRARY).parents}:
                break
            (parent / "__init__.py").write_text(_PACKAGE, encoding="utf-8")


def script_modules() -> list[str]:
    """Return the modules that the script needs, in alphabetical order; packages are not among them."""
    waiting = [_MAIN]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imports(ast.parse(_file(name).read_text(encoding="utf-8")))
    return sorted(found)


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of Depthwire that a module imports when it runs, wherever in it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "depthwire":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if _file(inner, required=False).is_file() else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "depthwire")
        else:
            yield from _imports(node)


def _file(name: str, *, required: bool = True) -> Path:
    path = Path(depthwire.__file__).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
    if required and not path.is_file():
        raise InternalError(
            "internal.bundle-module",
            "A module that the bundle's script needs is missing from this installation",
            at=name,
            want=str(path),
            got="no such file",
            todo="Install Depthwire again; if it stays, report it.",
        )
    return path
