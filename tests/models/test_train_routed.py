"""The training example spends equal FLOPs, learns, and writes what is loaded and captured; trained models hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from depthwire.export.capture import capture
from depthwire.export.inputs import text_windows
from depthwire.models.attn_res import AttnResDecoder
from depthwire.models.routed_checkpoints import build, load_routed
from depthwire.models.routed_examples import example as small
from examples import train_routed as example
from examples.train_attn_res import tokens

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = ROOT / "tests" / "data" / "sotu-2000.txt"
TINY = "--layers 2 --width 32 --mlp-width 48 --heads 2 --kv-heads 1 --batch 8 --length 48 --lr 1e-2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("routed")
    threads = torch.get_num_threads()
    try:
        command = ["-o", str(out), "--text", str(TEXT), "--steps", "100", *TINY.split()]
        done = CliRunner().invoke(example.main, command, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0
    return out


def test_all_models_get_the_same_flops(trained: Path) -> None:
    results: dict[str, Any] = json.loads((trained / "results.json").read_text())
    rows, budget = results["models"], results["training_flops"]
    assert list(rows) == ["dense", *example.KINDS]
    assert rows["dense"]["steps"] == 100
    ids = tokens(TEXT.read_bytes()[: 8 * 49]).reshape(8, 49)
    for kind in example.KINDS:
        model = load_routed(trained / kind).float().train()
        cost = {}
        for capacity in (1.0, 0.5):
            model.capacity = capacity
            cost[capacity] = example.training_flops(model, ids)
        assert budget / cost[1.0] <= rows[kind]["steps"] <= budget / cost[0.5] + 1
    assert rows["mixture_of_depths"]["steps"] > 100 > rows["subjective_timescale"]["steps"]


def test_they_learn(trained: Path) -> None:
    rows = json.loads((trained / "results.json").read_text())["models"]
    # Bytes drawn independently, as often as in the training part, have 3.07 nats: below that it is their order.
    assert all(row["held_out"] < 3.0 for row in rows.values())
    assert all(0.7 < row["forward_flops_of_dense"] < 0.9 for kind, row in rows.items() if kind != "dense")


def test_the_curve_says_what_the_gates_did(trained: Path) -> None:
    gates = json.loads((trained / "results.json").read_text())["gates"]
    assert sorted(gates) == ["subjective_depth", "subjective_timescale"]
    for kind, curve in gates.items():
        assert curve[0]["capacity"] == 1.0
        assert curve[0]["by_expected"] == curve[0]["by_unexpected"] == 1.0
        assert curve[-1]["capacity"] == 0.5
        assert ("student" in curve[-1]) == (kind == "subjective_timescale")
        assert all(0 <= point["expected_mean"] <= 1 and point["unexpected_std"] >= 0 for point in curve)
    assert (trained / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_gate_statistics_are_shares_of_the_selection() -> None:
    model = small("subjective_depth", tokens=64)[0]
    ids = tokens(TEXT.read_bytes()[:65])[None]
    (first, *_) = records = model.train().losses(ids[:, :-1], ids[:, 1:]).records
    found = example.gate_statistics(records[:1])
    assert first.surprise is not None
    chosen = set(first.selection.index[0].tolist())
    rivals = {"by_expected": first.surprise.expected, "by_unexpected": first.surprise.unexpected}
    for name, score in rivals.items():
        best = set(score[0].topk(32).indices.tolist())
        assert found[name] == pytest.approx(len(best & chosen) / 32, abs=1e-5)  # five digits are kept
    assert found["gate_mean"] == pytest.approx(first.surprise.gate.mean().item(), abs=1e-5)
    assert example.gate_statistics([]) == {}


def test_what_it_writes_is_captured_with_its_tokenizer(trained: Path) -> None:
    for kind in example.KINDS[:2]:
        program = capture(trained / kind, seq_len=40)
        (window,) = text_windows(program, TEXT, count=1)
        assert bytes(window["input_ids"][0].astype("uint8")) == TEXT.read_bytes()[:40]
        model = load_routed(trained / kind)
        ids = torch.from_numpy(window["input_ids"])
        with torch.no_grad():
            torch.testing.assert_close(program.exported.module()(ids), model(ids))


def test_routed_models_start_as_the_dense_one() -> None:
    decoder = small("mixture_of_depths")[0].config.decoder
    dense = AttnResDecoder(decoder).eval()
    ids = tokens(TEXT.read_bytes()[:64])[None]
    for kind in example.KINDS:
        model = build(small(kind)[0].config).eval()
        found = model.load_state_dict(dense.state_dict(), strict=False)
        assert not found.unexpected_keys
        assert set(found.missing_keys) == model.new_weights()
        model.capacity = 1.0
        with torch.no_grad():
            torch.testing.assert_close(model(ids), dense(ids))
