"""The small routed models in the repository: they are what their README and the page about them say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from depthwire.models.routed_checkpoints import build, load_routed
from depthwire.models.routing_config import RoutingConfig
from examples.train_attn_res import held_out_loss, tokens
from examples.train_routed import KINDS, judge, loss_at_random, loss_of_the_teacher
from tests.models.routed import SPELLINGS

if TYPE_CHECKING:
    from depthwire.models.routed_decoder import RoutedDecoder

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = ROOT / "tests" / "data" / "routed_small"
TEXT = tokens((ROOT / "tests" / "data" / "sotu-2000.txt").read_bytes())
PAGE = (ROOT / "docs" / "training_routed.md").read_text(encoding="utf-8")
RESULTS: dict[str, Any] = json.loads((MODELS / "results.json").read_text(encoding="utf-8"))


def load(kind: str) -> RoutedDecoder:
    return load_routed(MODELS / kind).float()


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_loss_that_is_written_down(kind: str) -> None:
    model, row = load(kind), RESULTS["models"][kind]
    assert sum(p.numel() for p in model.parameters()) == row["parameters"]
    # Four digits are written down; the order of an fp32 sum is the machine's own.
    assert held_out_loss(model, TEXT, 256) == pytest.approx(row["held_out"], abs=2e-4)
    model.rule = "budget"
    assert held_out_loss(model, TEXT, 256) == pytest.approx(row["held_out_budget"], abs=2e-4)
    line = next(line for line in PAGE.splitlines() if f"`{kind}`" in line and line.startswith("|"))
    for figure in ("held_out", "held_out_budget", "held_out_random"):
        assert f"{row[figure]:.4f}" in line


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_selects_matters(kind: str) -> None:
    model, part = load(kind), TEXT[: 32 * 256 + 1]
    assert loss_at_random(model, part, 256) > held_out_loss(model, part, 256) + 0.01


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_its_spellings_are_one_function(kind: str) -> None:
    model, ids = load(kind), TEXT[:256].reshape(2, 128)
    want = model(ids)
    for spelling in SPELLINGS:
        routing = dataclasses.replace(model.config.routing, spelling=spelling)
        other = build(dataclasses.replace(model.config, routing=routing)).eval()
        other.load_state_dict(model.state_dict())
        # fp32, six layers: sums in another order.
        torch.testing.assert_close(other(ids), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_decodes_what_it_computes_at_once(kind: str) -> None:
    model, ids = load(kind), TEXT[:160].reshape(2, 80)
    model.rule = "budget"
    state = model.start(2, 80, 60)
    steps = [model.step(chunk, state) for chunk in torch.split(ids, [60] + [1] * 20, dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids), rtol=1e-4, atol=1e-4)  # fp32, as above


def test_the_student_loses_what_is_written_down() -> None:
    row = RESULTS["models"]["subjective_timescale"]
    got = loss_of_the_teacher(load("subjective_timescale"), TEXT, 256)
    assert got == pytest.approx(row["held_out_teacher"], abs=2e-4)  # as above
    assert f"{row['held_out_teacher']:.4f}" in PAGE


def test_the_models_are_small() -> None:
    for kind in KINDS:
        assert (MODELS / kind / "model.safetensors").stat().st_size < 2_000_000


def test_thresholds_are_those_of_the_training_text() -> None:
    """Calibrating on other text moves them a little; a threshold that was lost would let every token through."""
    model = load("mixture_of_depths")
    before = [float(buffer) for name, buffer in model.named_buffers() if name.endswith("threshold")]
    judge(model, TEXT[: 17 * 256], TEXT[: 17 * 256], 256)
    after = [float(buffer) for name, buffer in model.named_buffers() if name.endswith("threshold")]
    assert before != after
    assert model.config.routing == RoutingConfig(predictor=True)
    scores = [record.score.std() for record in model.trace(TEXT[: 16 * 256].reshape(16, 256))[1]]
    assert all(abs(a - b) < 2 * float(std) for a, b, std in zip(before, after, scores, strict=True))
