"""The routing map: what it records, what it draws, what it refuses."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest

import depthwire
from depthwire._routing_map import PAGE, PICTURE
from depthwire.cli.main import main
from depthwire.errors import BuildError, UsageError
from depthwire.runtime.routing_map import RoutingMap, Selection, routing_html, save_routing_picture

DATA = Path(__file__).resolve().parent.parent / "data"
MODEL = DATA / "attn_res_small"
TEXT = DATA / "sotu-2000.txt"
ROUTE = {"route_layers": "1,2", "capacity": 0.25, "route_seed": 3, "route_score": "mod", "route_rule": "top-k"}


def found_map(**changes: object) -> dict[str, object]:
    options = {**ROUTE, **changes}
    found = depthwire.inspect(MODEL, routing=True, text=TEXT, windows=2, seq_len=64, **options)  # type: ignore[arg-type]
    assert found.routing is not None
    return dict(found.routing)


def test_the_map_holds_every_token_and_what_each_layer_computed_of_it() -> None:
    found = found_map()
    tokens: list[list[str]] = found["tokens"]  # type: ignore[assignment]
    assert [len(row) for row in tokens] == [64, 64]
    text = TEXT.read_text(encoding="utf-8")
    assert "".join(tokens[0]) == text[:64]  # the tokenizer is one of bytes
    for unit in found["selections"]:  # type: ignore[attr-defined]
        assert [sum(row) for row in unit["computed"]] == [16, 16]
        assert unit["slots"] == 16
        assert unit["share"] == 0.25
        for row, scores in zip(unit["computed"], unit["scores"], strict=True):
            taken = [score for score, bit in zip(scores, row, strict=True) if bit]
            skipped = [score for score, bit in zip(scores, row, strict=True) if not bit]
            assert min(taken) >= max(skipped)


def test_a_budget_may_take_fewer_than_its_slots() -> None:
    for unit in found_map(route_rule="budget")["selections"]:  # type: ignore[attr-defined]
        for row in unit["computed"]:
            counts = [sum(row[: end + 1]) for end in range(len(row))]
            assert all(count <= Fraction(1, 4) * (end + 1) + 1 for end, count in enumerate(counts))


def test_the_directory_holds_report_picture_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "map"
    arguments = ["inspect", str(MODEL), "--routing", "--text", str(TEXT), "--windows", "1", "--seq-len", "32"]
    routes = [f"--{name.replace('_', '-')}={value}" for name, value in ROUTE.items()]
    assert main([*arguments, *routes, "-o", str(out)]) == 0
    assert "25.0 %" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"report.json", PICTURE, PAGE}
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "report.json").read_text())
    page = (out / PAGE).read_text(encoding="utf-8")
    assert page.count('class="on" title') == sum(
        sum(row) for unit in report["routing"]["selections"] for row in unit["computed"]
    )
    assert depthwire.inspect(MODEL, routing=True, text=TEXT, windows=1, seq_len=32, out=out, **ROUTE)  # type: ignore[arg-type]


def test_tokens_are_escaped() -> None:
    unit = Selection("n", "m", 1, ((True, False),), ((1.0, 0.0),))
    page = routing_html(RoutingMap((unit,), (("<script>", "&"),)))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    unit = Selection("n", "m", 1, ((True,),), ((1.0,),))
    with pytest.raises(BuildError) as caught:
        save_routing_picture(RoutingMap((unit,), (("a",),)), tmp_path / "map.png")
    assert caught.value.code == "runtime.no-matplotlib"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"text": TEXT, "windows": 1, "seq_len": 16}, "runtime.not-routed"),
        ({**ROUTE, "seq_len": 16}, "runtime.routing-input"),
    ],
)
def test_what_cannot_be_shown_is_refused(options: dict[str, object], code: str) -> None:
    with pytest.raises(UsageError) as caught:
        depthwire.inspect(MODEL, routing=True, **options)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_routing_options_belong_to_the_map(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(MODEL), "--route-layers", "1"]) == 2
    assert "--routing" in capsys.readouterr().err
