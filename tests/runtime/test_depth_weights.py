"""Depth weights: recomputed from the values that each read takes, averaged over tokens, drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depthwire
from depthwire._depth_weights import HEAT_MAP
from depthwire.errors import BuildError, UsageError
from depthwire.export.capture import capture
from depthwire.export.inputs import text_windows
from depthwire.models import attn_res
from depthwire.models.attn_res import AttnResConfig, AttnResDecoder
from depthwire.ops import attn_res_add_read_norm, attn_res_read
from depthwire.runtime.depth_weights import DepthWeights, Read, depth_weights, save_heat_map
from depthwire.runtime.torch_exported import run_nodes

if TYPE_CHECKING:
    from depthwire.program import Program

DATA = Path(__file__).parent.parent / "data"


class Reads(nn.Module):
    """Two reads with all that reads can have: normalised values and a bias; a delta and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.query = nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor, delta: Tensor) -> Tensor:
        sources = [x, self.first(x), self.second(x)]
        biased = attn_res_read(self.query[0], sources, 1e-3, 0.5, value_norm=True, last_bias=1.5)
        out, _ = attn_res_add_read_norm(self.query[1], torch.ones(8), [x, biased], delta, 1e-3, 2.0, 1e-5)
        return torch.as_tensor(out)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(0))
    weights: np.ndarray = e / e.sum(0)
    return weights


def by_hand(query: np.ndarray, values: np.ndarray, eps: float, scale: float, bias: float = 0.0) -> np.ndarray:
    """Mean weight of each source: ``values [n, tokens, d]``."""
    normed = values / np.sqrt((values**2).mean(-1, keepdims=True) + eps)
    logits = scale * (normed @ query)
    logits[-1] += bias
    mean: np.ndarray = softmax(logits).mean(1)
    return mean


def lifted(query_std: float) -> Program:
    torch.manual_seed(0)
    config = AttnResConfig(48, 16, 3, 2, 1, 8, 24, max_length=32, residual="plain")
    model = AttnResDecoder(config).eval()
    plain = capture(model, example_inputs={"input_ids": torch.randint(0, 48, (2, 12))})
    program = depthwire.rewrite(plain, attn_res="full")
    state = dict(program.exported.state_dict)
    for name in state:
        if name.startswith("attn_res.query"):
            state[name] = torch.randn(16) * query_std
    return program.with_state(state)


def windows(count: int) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(3)
    return [{"input_ids": generator.integers(0, 48, (2, 12))} for _ in range(count)]


def test_each_kind_of_read_is_computed_by_its_formula() -> None:
    torch.manual_seed(0)
    model = Reads().eval()
    x, delta = torch.randn(5, 8), torch.randn(5, 8)
    program = capture(model, example_inputs={"x": x, "delta": delta})
    found = depth_weights(program, [{"x": x.numpy(), "delta": delta.numpy()}])
    sources = torch.stack([x, model.first(x), model.second(x)]).detach()
    query = model.query.detach().double().numpy()
    biased = attn_res_read(model.query[0], list(sources), 1e-3, 0.5, value_norm=True, last_bias=1.5).detach()
    first = by_hand(query[0], sources.double().numpy(), 1e-3, 0.5, 1.5)
    second = by_hand(query[1], torch.stack([x, biased + delta]).double().numpy(), 1e-3, 2.0)
    assert found.tokens == 5
    # fp32 values from two programs: some units in the last place of weights below 1.
    np.testing.assert_allclose(found.reads[0].weights, first, atol=1e-5)
    np.testing.assert_allclose(found.reads[1].weights, second, atol=1e-5)
    assert found.reads[0].source_modules == ("", "first", "second")


def test_the_weights_of_a_lifted_model_are_means_over_every_token_of_every_window() -> None:
    program = lifted(0.7)
    inputs = windows(3)
    found = depth_weights(program, inputs)
    assert (found.tokens, [len(read.weights) for read in found.reads]) == (72, [2, 3, 4, 5, 6, 7])
    nodes = {node.name: node for node in program.exported.graph.nodes}
    for index, read in enumerate(found.reads, start=1):
        assert read.sources == tuple(source.name for source in nodes[read.name].args[1])
        query = program.exported.state_dict[f"attn_res.query.{index}"].detach().double().numpy()
        eps = float(nodes[read.name].args[2])
        means = []
        for window in inputs:
            values = np.stack([run_nodes(program, window, [name])[name] for name in read.sources])
            means.append(by_hand(query, values.astype(np.float64).reshape(len(values), -1, 16), eps, 1.0))
        np.testing.assert_allclose(read.weights, np.mean(means, 0), rtol=1e-9)
        assert sum(read.weights) == pytest.approx(1)
        assert max(read.weights) - min(read.weights) > 0.01
    assert found.reads[0].module == "layers.0.post_attention_layernorm"
    assert found.reads[-1].module == "norm"


def test_zero_queries_give_every_source_the_same_weight() -> None:
    found = depth_weights(lifted(0.0), windows(1))
    for read in found.reads:
        np.testing.assert_allclose(read.weights, 1 / len(read.weights), rtol=1e-12)


def test_the_matrix_has_nothing_where_a_read_has_no_source() -> None:
    matrix = depth_weights(lifted(0.5), windows(1)).matrix()
    assert [len(row) for row in matrix] == [7] * 6
    assert [[weight is not None for weight in row].count(True) for row in matrix] == [2, 3, 4, 5, 6, 7]


def test_the_heat_map_shows_the_weights(tmp_path: Path) -> None:
    from matplotlib.image import imread

    def drawn(weights: tuple[float, float]) -> Any:
        read = Read("read", "layers.0", ("a", "b"), ("x", "y"), weights)
        save_heat_map(DepthWeights((read, read), 10), tmp_path / "map.png")
        return imread(tmp_path / "map.png")

    left, right = drawn((0.95, 0.05)), drawn((0.05, 0.95))
    assert left.shape == right.shape
    assert np.abs(left - right).max() > 0.5
    again = drawn((0.05, 0.95))
    assert np.array_equal(again, right)


def test_a_program_without_reads_is_refused() -> None:
    program = capture(nn.Linear(4, 4), example_inputs={"input": torch.ones(1, 4)})
    with pytest.raises(UsageError, match=r"runtime\.no-reads"):
        depth_weights(program, [{"input": np.ones((1, 4), np.float32)}])


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    read = Read("read", "", ("a",), ("",), (1.0,))
    with pytest.raises(BuildError, match=r"runtime\.no-matplotlib"):
        save_heat_map(DepthWeights((read,), 1), tmp_path / "map.png")


@pytest.mark.parametrize("name", ["attn_res_small", "attn_res_small_full"])
def test_the_reads_of_a_trained_model_are_those_of_its_eager_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AttnResDecoder.load(DATA / name).float()
    program = capture(DATA / name, seq_len=64, dtype="fp32")
    (window,) = text_windows(program, DATA / "sotu-2000.txt", count=1)
    want = []
    read = attn_res.depth_read

    def recorded(sources: list[Tensor], proj: nn.Linear, norm: nn.RMSNorm) -> Tensor:
        if len(sources) > 1:
            query = (proj.weight[0] * norm.weight).detach().double().numpy()
            values = torch.stack(sources).detach().double().numpy()
            want.append(by_hand(query, values.reshape(len(sources), -1, model.config.width), model.config.eps, 1.0))
        return read(sources, proj, norm)

    monkeypatch.setattr(attn_res, "depth_read", recorded)
    model(torch.from_numpy(window["input_ids"]))
    found = depthwire.inspect(program, depth_weights=True, text=DATA / "sotu-2000.txt", windows=1).depth_weights
    assert found is not None
    assert len(found["reads"]) == len(want) == 2 * model.config.layers
    for read_found, weights in zip(found["reads"], want, strict=True):
        # Eager and rewritten order their sums differently; fp32 logits of a few units.
        np.testing.assert_allclose([source["weight"] for source in read_found["sources"]], weights, atol=1e-5)
    assert found["reads"][-1]["module"] == "norm"
    assert found["reads"][0]["sources"][0]["module"] == "embed_tokens"


# --- the verb -----------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs_file(tmp_path: Path) -> Path:
    np.savez(tmp_path / "inputs.npz", input_ids=windows(1)[0]["input_ids"])
    return tmp_path / "inputs.npz"


def test_inspect_writes_the_report_and_the_map_and_does_so_again(tmp_path: Path, inputs_file: Path) -> None:
    lifted(0.5).save(tmp_path / "lifted.pt2")
    out = tmp_path / "out"
    for _ in range(2):
        found = depthwire.inspect(tmp_path / "lifted.pt2", depth_weights=True, inputs=inputs_file, out=out)
    report = json.loads((out / "report.json").read_text())
    assert report["depth_weights"] == found.depth_weights == found.as_dict()["depth_weights"]
    assert report["depth_weights"]["tokens"] == 24
    assert len(report["depth_weights"]["reads"]) == len(report["depth_weights"]["matrix"]) == 6
    assert sorted(path.name for path in out.iterdir()) == sorted([HEAT_MAP, "report.json"])
    (out / "other").touch()
    with pytest.raises(UsageError, match=r"export\.output-exists"):
        depthwire.inspect(tmp_path / "lifted.pt2", depth_weights=True, inputs=inputs_file, out=out)


def test_inspect_wants_real_inputs_and_a_directory_only_with_depth_weights(tmp_path: Path) -> None:
    program = lifted(0.5)
    with pytest.raises(UsageError, match=r"runtime\.depth-weights-input"):
        depthwire.inspect(program, depth_weights=True)
    with pytest.raises(UsageError, match=r"capture\.option-without-effect"):
        depthwire.inspect(program, out=tmp_path / "out")


def test_the_command_prints_the_weights(tmp_path: Path, inputs_file: Path) -> None:
    from click.testing import CliRunner

    from depthwire.cli.main import cli

    lifted(0.5).save(tmp_path / "lifted.pt2")
    command = ["inspect", str(tmp_path / "lifted.pt2"), "--depth-weights", "--inputs", str(inputs_file)]
    shown = CliRunner().invoke(cli, [*command, "--json"])
    assert shown.exit_code == 0, shown.output
    assert len(json.loads(shown.stdout)["depth_weights"]["reads"]) == 6
    table = CliRunner().invoke(cli, command)
    assert "layers.0.post_attention_layernorm" in table.stdout
    assert CliRunner().invoke(cli, ["inspect", "x", "--text", "y"], standalone_mode=False).exception is not None
