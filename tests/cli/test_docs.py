"""The pages for users name every verb, option, key and error code of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import depthwire
from depthwire.cli._group import VERBS
from depthwire.cli.main import cli
from depthwire.recipe import OPTIONS

ROOT = Path(depthwire.__file__).resolve().parent.parent
CLI = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
RECIPE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")


def _command(verb: str) -> click.Command:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    return command


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_option_is_described(verb: str) -> None:
    assert f"`{verb}`" in CLI
    if verb in {"inspect", "export", "targets", "doctor"}:
        return  # described by their help; what they share with convert is in its table
    for parameter in _command(verb).params:
        if isinstance(parameter, click.Option):
            assert any(name in CLI for name in parameter.opts), parameter.opts


def test_every_recipe_key_is_described_with_its_option() -> None:
    rows = dict(re.findall(r"^\| `([a-z0-9_.]+)` \| ([^|]*)\|", RECIPE, flags=re.MULTILINE))
    assert set(rows) == {".".join(map(str, key)) for key in OPTIONS.values()}
    flags = {parameter.name: parameter.opts for parameter in _command("convert").params}
    for name, key in OPTIONS.items():
        row = rows[".".join(map(str, key))]
        if name in {"goldens", "seed"}:
            assert row.strip() == ""
        elif name != "source":
            assert flags[name][-1] in row, name
