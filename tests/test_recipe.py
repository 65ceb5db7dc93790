"""Recipes: what is read, what is refused, and at which line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from depthwire.errors import UsageError
from depthwire.recipe import OPTIONS, Recipe, dump_recipe, load_recipe, make_recipe

FULL = """\
source:
  reference: ./model
  task: causal-lm
  batch: 2
  seq_len: 64
attn_res: block:8
correction: scale
target: rtx
goldens:
  count: 2
  text: words.txt
build:
  compute_capabilities: [8.6, sm_120, "SM89"]
  workspace: 4GiB
out: out
"""


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _refusal(tmp_path: Path, text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_recipe(_write(tmp_path, text))
    return caught.value


def test_every_field_is_read(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, FULL))
    assert recipe.source.reference == "./model"
    assert recipe.source.batch == 2
    assert recipe.attn_res == "block:8"
    assert recipe.goldens.text == Path("words.txt")
    assert recipe.build.compute_capabilities == ["SM86", "SM120", "SM89"]
    assert recipe.build.workspace == 4 << 30
    assert recipe.out == Path("out")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_recipe(_write(tmp_path, "")) == Recipe()


def test_a_dumped_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, FULL))
    path = tmp_path / "again.yaml"
    text = dump_recipe(recipe, path)
    assert path.read_text(encoding="utf-8") == text
    assert load_recipe(path) == recipe


def test_a_resolved_recipe_survives_the_manifest() -> None:
    recipe = make_recipe({"source": "m", "attn_res": "full", "queries": Path("q.safetensors"), "text": "t.txt"})
    assert Recipe.model_validate(recipe.resolved()) == recipe


@pytest.mark.parametrize(
    ("text", "code", "line", "got"),
    [
        ("source:\n  reference: m\n  bach: 2\n", "recipe.unknown-key", 3, "bach"),
        ("atn_res: full\n", "recipe.unknown-key", 1, "atn_res"),
        ("target: cpu\nattn_res: block:0\n", "recipe.attn-res", 2, "'block:0'"),
        ("attn_res: block-layers:x\n", "recipe.attn-res", 1, "'block-layers:x'"),
        ("source:\n  batch: 0\n", "recipe.bad-value", 2, "0"),
        ("source:\n\n  batch: yes\n", "recipe.bad-value", 3, "True"),
        ("source:\n  dtype: float8\n", "recipe.bad-value", 2, "'float8'"),
        ("build:\n  compute_capabilities:\n    - SM86\n    - ampere\n", "recipe.bad-value", 4, "'ampere'"),
        ("build:\n  workspace: 4 lots\n", "recipe.bad-value", 2, "'4 lots'"),
        ("source: m\n", "recipe.bad-value", 1, "'m'"),
        ("target: cpu\ntarget: rtx\n", "recipe.duplicate-key", 2, None),
        ("source:\n  batch: 1\n  batch: 2\n", "recipe.duplicate-key", 3, None),
        ("target: [\n", "recipe.syntax", 2, None),
        ("target: !!python/name:os.system\n", "recipe.syntax", 1, None),
        ("- a\n- b\n", "recipe.syntax", 1, "a list"),
    ],
)
def test_a_mistake_is_refused_with_its_line(tmp_path: Path, text: str, code: str, line: int, got: str | None) -> None:
    error = _refusal(tmp_path, text)
    assert error.code == code
    assert error.exit_code == 2
    assert error.at == f"{tmp_path / 'recipe.yaml'}:{line}"
    assert error.todo
    if got is not None:
        assert error.got == got


def test_an_unknown_key_says_what_was_probably_meant(tmp_path: Path) -> None:
    assert _refusal(tmp_path, "source:\n  seqlen: 5\n").todo == "Did you mean 'seq_len'?"
    assert _refusal(tmp_path, "zzz: 5\n").todo == "Remove it."


def test_further_mistakes_are_named_too(tmp_path: Path) -> None:
    error = _refusal(tmp_path, "source:\n  batch: 0\nopset: 3\n")
    assert error.todo is not None
    assert "recipe.yaml:3 (opset)" in error.todo


def test_contradictions_are_refused(tmp_path: Path) -> None:
    both = _refusal(tmp_path, "goldens:\n  text: a\n  inputs: b\n")
    assert both.at == f"{tmp_path / 'recipe.yaml'}:1"
    assert both.want == "either 'text' or 'inputs', not both"
    assert "attn_res" in (_refusal(tmp_path, "queries: q.safetensors\n").want or "")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(tmp_path / "none.yaml")
    assert caught.value.code == "recipe.not-found"


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path, FULL)
    recipe = make_recipe({"attn_res": "none", "batch": 1, "windows": 9, "target": None}, file=path)
    assert recipe.attn_res is None
    assert recipe.source.batch == 1
    assert recipe.source.seq_len == 64
    assert recipe.verify.windows == 9
    assert recipe.target == "rtx"


def test_a_bad_option_is_named_as_it_was_given(tmp_path: Path) -> None:
    path = _write(tmp_path, FULL)
    for flags, at in ((True, "--attn-res"), (False, "argument 'attn_res'")):
        with pytest.raises(UsageError) as caught:
            make_recipe({"attn_res": "block:0"}, file=path, flags=flags)
        assert caught.value.at == at


def test_an_unknown_python_option_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        make_recipe({"seqlen": 4})
    assert caught.value.code == "recipe.unknown-option"
    assert caught.value.todo == "Did you mean 'seq_len'?"


def test_every_option_has_its_key_and_every_key_its_option() -> None:
    leaves: set[tuple[str, ...]] = set()
    for name, value in yaml.safe_load(dump_recipe(Recipe())).items():
        leaves |= {(name, inner) for inner in value} if isinstance(value, dict) else {(name,)}
    assert set(OPTIONS.values()) == leaves
