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
    "bundle",
    "capture",
    "checkpoint",
    "cli",
    "export",
    "pass",
    "internal",
    "quantize",
    "queries",
    "recipe",
    "remote",
    "result",
    "route",
    "routed-model",
    "runtime",
    "structure",
    "target",
    "triton",
    "verify",
}


def _sources() -> list[Path]:
    folders = ("passes", "export", "runtime", "models", "depthwire/cli", "depthwire/ops")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return files + sorted((ROOT / "depthwire").glob("*.py"))


def _strings() -> set[str]:
    """Collect every string constant of the source."""
    nodes = (node for file in _sources() for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _codes() -> set[str]:
    """Collect every string that reads like a code of one of our stages, or of a pass."""
    stages = STAGES | {path.stem.replace("_", "-") for path in (ROOT / "passes").glob("[a-z]*_*.py")}
    found = {text for text in _strings() if CODE.fullmatch(text) and text.split(".")[0] in stages}
    tensors = {"route.budgets", "route.states", "route.thresholds", "route.valid"}
    return found - {"build.log", "bundle.json", "result.json"} - tensors  # files, and constants of a routed program


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


def test_no_section_outlives_its_code() -> None:
    """A code stands in the source as a whole, or is put together from its stage and its reason."""
    strings = _strings()
    assert [code for code in _headings() if code not in strings and code.split(".")[1] not in strings] == []
