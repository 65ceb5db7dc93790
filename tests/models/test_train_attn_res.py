"""The training example learns, repeats itself, and writes what the compiler reads; the page names what there is."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from depthwire.export.capture import capture
from depthwire.export.inputs import text_windows
from depthwire.models.attn_res import AttnResConfig, AttnResDecoder, MoeConfig
from depthwire.models.checkpoints import MAPS, read_map
from examples import train_attn_res as example

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = ROOT / "tests" / "data" / "sotu-2000.txt"
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
TINY = "--layers 2 --width 32 --mlp-width 48 --heads 2 --kv-heads 1 --batch 8 --length 48 --lr 1e-2 --dtype fp32"


def run(out: Path, *more: str, steps: int = 60) -> tuple[AttnResDecoder, float]:
    command = ["-o", str(out), "--text", str(TEXT), "--steps", str(steps), *TINY.split(), *more]
    threads = torch.get_num_threads()
    try:
        done = CliRunner().invoke(example.main, command, catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0
    figures = json.loads(done.output[done.output.index("{") :])
    return AttnResDecoder.load(out), figures["held_out_nats_per_byte"]


def test_it_learns_and_the_same_seed_learns_the_same(tmp_path: Path) -> None:
    model, loss = run(tmp_path / "a", "--residual", "full")
    # The bytes of the text alone, drawn independently, have about 3.0 nats: below that it has learned their order.
    assert loss < 2.9
    assert all(norm > 0.02 for norm in example.query_norms(model))
    again, same = run(tmp_path / "b", "--residual", "full")
    assert same == loss
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert run(tmp_path / "c", "--residual", "full", "--seed", "1")[1] != loss


def test_the_plain_twin_is_trained_by_the_same_script(tmp_path: Path) -> None:
    model, loss = run(tmp_path / "plain", "--residual", "plain")
    assert model.config.residual == "plain"
    assert loss < 2.9
    assert example.query_norms(model) == []


def test_what_it_writes_is_captured_with_its_tokenizer(tmp_path: Path) -> None:
    run(tmp_path / "model", "--residual", "block-layers:1", steps=2)
    program = capture(tmp_path / "model", seq_len=40)
    (window,) = text_windows(program, TEXT, count=1)
    assert bytes(window["input_ids"][0].astype("uint8")) == TEXT.read_bytes()[:40]


def test_held_out_loss_is_the_mean_over_whole_windows() -> None:
    torch.manual_seed(0)
    model = AttnResDecoder(AttnResConfig(256, 16, 1, 2, 1, 8, 16, max_length=32)).eval()
    ids = example.tokens(TEXT.read_bytes()[: 20 * 32 + 9])
    log_probs = [model(ids[None, i * 32 : i * 32 + 32]).log_softmax(-1)[0] for i in range(20)]
    losses = [-p[torch.arange(32), ids[i * 32 + 1 : i * 32 + 33]].mean() for i, p in enumerate(log_probs)]
    want = float(torch.stack(losses).detach().double().mean())
    # Two orders of summation of some 600 fp32 numbers near 6.
    assert example.held_out_loss(model, ids, 32) == pytest.approx(want, rel=1e-5)


def test_without_text_it_reads_the_language_reference() -> None:
    assert len(example.read_text(None, "*.txt", ())) > 200_000
    assert example.read_text(TEXT.parent, "*.txt", ("sotu-1999",)) == TEXT.read_bytes()
    with pytest.raises(Exception, match=r"no file of .* matches"):
        example.read_text(TEXT.parent, "*.txt", ("sotu",))


@pytest.mark.parametrize("config", [AttnResConfig, MoeConfig])
def test_the_page_names_every_field(config: type[AttnResConfig | MoeConfig]) -> None:
    assert [field.name for field in dataclasses.fields(config) if f"`{field.name}`" not in PAGE] == []


def test_the_page_names_every_map_and_its_example_can_be_read(tmp_path: Path) -> None:
    assert [name for name in MAPS if f"| `{name}` |" not in PAGE] == []
    shipped = {file.stem for file in (ROOT / "models" / "maps").iterdir()}
    assert shipped == set(MAPS)
    (example_map,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "map.yaml").write_text(example_map)
    assert len(read_map(tmp_path / "map.yaml").rules) == 4
