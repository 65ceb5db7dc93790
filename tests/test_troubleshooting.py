"""Every error and decline code in the source has its section in docs/troubleshooting.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = re.compile(r"[a-z][a-z0-9-]*\.[a-z][a-z0-9-]+")
STAGES = {
    "artifact",
    "attn-res",
    "build",
    "capture",
    "cli",
    "export",
    "pass",
    "canonicalize-constants",
    "fuse-norm",
    "internal",
    "legalize-attention",
    "queries",
    "recipe",
    "runtime",
    "structure",
    "target",
    "verify",
}


def _sources() -> list[Path]:
    folders = ("passes", "export", "runtime", "depthwire/cli", "depthwire/ops")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return files + sorted((ROOT / "depthwire").glob("*.py"))


def _codes() -> set[str]:
    """Collect the first string argument of every call that raises or builds an error or a decline."""
    codes = set()
    for file in _sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                first = node.args[0].value
                if isinstance(first, str) and CODE.fullmatch(first) and first.split(".")[0] in STAGES:
                    codes.add(first)
    return codes


def _headings() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^## (\S+)$", page, re.MULTILINE)


def test_every_code_is_documented() -> None:
    codes = _codes()
    assert len(codes) > 100
    assert sorted(codes - set(_headings())) == []


def test_headings_are_sorted_and_unique() -> None:
    headings = _headings()
    assert headings == sorted(set(headings))
