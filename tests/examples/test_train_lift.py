"""The training example on a tiny model: what it trains, that it learns, and that its result converts."""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner

import depthwire
from depthwire.models.byte_tokenizer import VOCAB_SIZE, save_byte_tokenizer
from examples.train_lift import (
    TRAINED,
    Training,
    capture,
    choose,
    held_out_losses,
    main,
    paired,
    rate,
    tokens,
    train_parameters,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

WIDTH, LAYERS, LENGTH, BATCH = 32, 2, 16, 4
NORMS = 2 * LAYERS + 1
READS = 2 * LAYERS  # the first sublayer has one source and no read


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama over bytes, as a Hugging Face directory; not to be changed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # far enough from zero for every part to matter
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 windows of one sentence and another."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the reads weigh the depth; the depth is what they read. " * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain_losses(model: Path, text: Path) -> Tensor:
    """The loss of the untouched model on every window of the text."""
    return held_out_losses(capture(model, "norms", "", LENGTH, BATCH).module(), tokens(model, text), LENGTH, BATCH)


@pytest.mark.parametrize("train", TRAINED)
def test_exactly_the_parameters_named_are_trained_and_the_loss_falls(
    train: str, model: Path, text: Path, plain_losses: Tensor
) -> None:
    program = capture(model, train, "full", LENGTH, BATCH)
    module = program.module()
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    chosen = choose(module, train)
    expected = ("queries" in train) * READS + ("norms" in train) * NORMS + ("bias" in train) * NORMS
    assert len(chosen) == expected
    assert sum(parameter.numel() for parameter in chosen.values()) == expected * WIDTH

    ids = tokens(model, text)
    before = held_out_losses(module, ids, LENGTH, BATCH)
    torch.testing.assert_close(before, plain_losses)  # nothing is trained yet: each start is the model itself

    losses = train_parameters(module, chosen, ids, LENGTH, Training(3, 3e-2, 3e-2, batch=BATCH))
    assert len(losses) == 3
    after = held_out_losses(module, ids, LENGTH, BATCH)
    assert float((after - before).mean()) < -0.01
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, start[name]) == (name not in chosen), name
        assert (parameter.grad is None) or name in chosen


def test_bf16_training_follows_fp32_and_a_rate_of_zero_changes_nothing(model: Path, text: Path) -> None:
    module = capture(model, "queries", "block:2", LENGTH, BATCH).module()
    chosen, ids = choose(module, "queries"), tokens(model, text)
    before = held_out_losses(module, ids, LENGTH, BATCH)
    still = train_parameters(module, chosen, ids, LENGTH, Training(3, 3e-2, 0.0, batch=BATCH))
    assert torch.equal(before, held_out_losses(module, ids, LENGTH, BATCH))

    fp32 = train_parameters(module, chosen, ids, LENGTH, Training(3, 3e-2, 3e-2, batch=BATCH))
    with torch.no_grad():
        for query in chosen.values():
            query.zero_()
    bf16 = train_parameters(module, chosen, ids, LENGTH, Training(3, 3e-2, 3e-2, batch=BATCH, bf16=True))
    # Eight bits of significand in every matrix product: a few parts in a hundred of a loss of some nats.
    assert bf16 == pytest.approx(fp32, rel=0.03)
    assert bf16 != fp32
    assert bf16[-1] < still[-1]  # the same windows without training


def test_the_command_trains_saves_and_converts(model: Path, text: Path, tmp_path: Path) -> None:
    tuned, out = tmp_path / "new" / "tuned.pt2", tmp_path / "onnx"
    sizes = [
        "--attn-res",
        "block:2",
        "--steps",
        "3",
        "--query-lr",
        "0.03",
        "--seq-len",
        str(LENGTH),
        "--batch",
        str(BATCH),
    ]
    files = ["--text", str(text), "--held-out", str(text), "-o", str(tuned), "--convert", str(out)]
    result = CliRunner().invoke(main, [str(model), *sizes, *files], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.strip().splitlines()[-1])
    assert figures["parameters"] == READS * WIDTH
    held_out = figures["held_out"][str(text)]
    assert held_out["after"] < held_out["before"]
    assert held_out["difference"] == pytest.approx(held_out["after"] - held_out["before"], abs=1e-6)

    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["verify"]["passed"]
    saved = depthwire.capture(tuned).module()
    queries = [p for name, p in saved.named_parameters() if name.startswith("attn_res.query.")]
    assert len(queries) == READS
    assert all(bool(query.detach().abs().max() > 0) for query in queries)
    ids = tokens(model, text)
    assert float(held_out_losses(saved, ids, LENGTH, BATCH).mean()) == pytest.approx(held_out["after"], abs=1e-6)


def test_without_a_held_out_text_the_last_quarter_is_held_out(model: Path, text: Path, tmp_path: Path) -> None:
    sizes = ["--attn-res", "full", "--steps", "1", "--seq-len", str(LENGTH)]
    arguments = [str(model), *sizes, "--text", str(text), "-o", str(tmp_path / "t.pt2")]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    figures = json.loads(result.stdout.strip().splitlines()[-1])
    (judged,) = figures["held_out"].values()
    quarter = len(tokens(model, text)) - len(tokens(model, text)) * 3 // 4
    assert judged["tokens"] == quarter // LENGTH * (LENGTH - 1)
    assert "depthwire convert" in result.stderr


def test_a_text_that_fills_no_window_is_refused(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("short", encoding="utf-8")
    result = CliRunner().invoke(main, [str(model), "--text", str(short), "-o", str(tmp_path / "t.pt2")])
    assert result.exit_code != 0
    assert "fewer than 256" in result.output


def test_the_name_of_the_file_is_checked_before_anything_runs(model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(model), "-o", str(tmp_path / "tuned.pt")])
    assert result.exit_code == 2
    assert ".pt2" in result.output


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    factors = [rate(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[10:]))
    assert 0 < factors[-1] < 0.001


def test_paired_differences() -> None:
    figures = paired(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 2.0, 2.5]))
    # differences -0.5, 0, -1.5: mean -2/3, variance 7/12
    assert figures["difference"] == pytest.approx(-2 / 3)
    assert figures["standard_error"] == pytest.approx(math.sqrt(7 / 12 / 3))
    assert paired(torch.ones(1), torch.zeros(1))["standard_error"] is None
