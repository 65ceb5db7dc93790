"""Calibration: rounding that knows the inputs, scales of activations, and which layers are spared."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from depthwire.errors import UsageError
from depthwire.passes.analysis import quantization
from depthwire.passes.analysis.quantization import QuantizationPlan, calibrate
from depthwire.passes.analysis.quantization_plan import QuantizedWeight, most_sensitive
from depthwire.passes.analysis.quantization_ranges import Histogram
from depthwire.passes.analysis.quantization_rounding import Grid, output_error, round_weight, search_scale, to_integers
from depthwire.passes.standard import canonical_pipeline
from tests.export.tiny import LENGTH, VOCABULARY, captured, lifted
from tests.zoo import program_of

if TYPE_CHECKING:
    from depthwire.program import Program

GRIDS = [Grid(8, 0), Grid(4, 16), Grid(4, 32)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, width: int) -> Tensor:
    """Inputs of which a few directions hold most of the energy, as those of trained models do."""
    return random(rows, 6, seed=1) @ random(6, width, seed=2) + 0.3 * random(rows, width, seed=3)


def numbers(integers: Tensor, scale: Tensor) -> Tensor:
    return integers * scale.repeat_interleave(integers.shape[1] // scale.shape[1], 1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_that_knows_the_inputs_beats_rounding_to_the_nearest(grid: Grid) -> None:
    weight, x = random(24, 64), correlated(512, 64)
    moment = x.T @ x
    found = numbers(*round_weight(weight, moment, grid))
    groups = weight.reshape(24, -1, grid.block or 64)
    scale = groups.abs().amax(2, keepdim=True) / grid.highest
    nearest = ((groups / scale).round() * scale).reshape(24, 64)
    assert output_error(weight, found, moment) < 0.4 * output_error(weight, nearest, moment)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_integers_stay_on_the_grid_and_scales_are_short_and_positive(grid: Grid) -> None:
    weight = random(8, 64)
    weight[3] = 0.0
    integers, scale = round_weight(weight, torch.eye(64), grid)
    assert (integers.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert tuple(scale.shape) == (8, 64 // grid.block if grid.block else 1)
    assert int(integers.min()) >= grid.lowest
    assert int(integers.max()) <= grid.highest
    assert bool((scale > 0).all())
    assert not integers[3].any()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(scale.to(dtype).float(), scale)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, x = random(8, 32), correlated(64, 32)
    x[:, 5:9] = 0.0
    integers, scale = round_weight(weight, x.T @ x, Grid(4, 16))
    assert bool(torch.isfinite(scale).all())
    assert output_error(weight, numbers(integers, scale), x.T @ x) < 0.02
    assert output_error(torch.zeros(8, 32), torch.zeros(8, 32), x.T @ x) == 0.0


def test_a_scale_may_clip_where_that_costs_less() -> None:
    weight = random(16, 32)
    weight[:, 0] = 8.0
    importance = torch.ones(32)
    importance[0] = 0.0
    grid = Grid(4, 0)
    scale = search_scale(weight, importance, grid)
    whole = weight.abs().amax(1, keepdim=True) / grid.highest

    def cost(each: Tensor) -> Tensor:
        return (to_integers(weight, each, grid) * each - weight).square() @ importance

    assert bool((cost(scale) <= cost(whole)).all())
    assert float(cost(scale).sum()) < 0.8 * float(cost(whole).sum())


@pytest.mark.parametrize("outliers", [0, 3])
def test_the_scale_of_an_activation_is_near_the_best(outliers: int) -> None:
    rows = random(400, 32)
    rows[:outliers, 0] = 20.0
    histogram = Histogram()
    for part in (rows[:150], rows[150:]):
        histogram.add(part, torch.ones(32))

    def cost(scale: float) -> float:
        rounded = (rows / scale).round().clamp(-128, 127) * scale
        return float(((rounded - rows).square().sum(1) / rows.square().sum(1)).sum())

    best = min(cost(float(rows.abs().max()) / 127 * share) for share in torch.logspace(-1, 0, 200).tolist())
    # Bins of 2.2 %, and s²/12 in place of the rounding itself.
    assert cost(histogram.scale()) <= 1.1 * best
    assert histogram.largest == float(rows.abs().max())


def test_an_activation_of_zeros_has_a_scale() -> None:
    histogram = Histogram()
    histogram.add(torch.zeros(4, 8), torch.ones(8))
    assert histogram.scale() == 1.0


class Outlier(nn.Module):
    """Two layers that read the same kind of input, one of them behind a channel that dwarfs the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.spiked, self.last = (nn.Linear(32, 32, bias=False) for _ in range(3))
        gain = torch.ones(32)
        gain[7] = 1e4
        self.register_buffer("gain", gain)
        with torch.no_grad():
            self.spiked.weight[:, 7] *= 1e-4

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.gain, Tensor)
        out: Tensor = self.last(self.plain(x).tanh() + self.spiked(x * self.gain).tanh()).tanh()
        return out


def outlier() -> tuple[Program, QuantizationPlan]:
    program = canonical_pipeline().run(program_of(Outlier(), random(16, 32)))
    feeds = [{program.input_names[0]: random(16, 32, seed=seed)} for seed in range(3)]
    return program, calibrate(program, feeds, "int8")


def test_a_layer_that_loses_too_much_keeps_its_input() -> None:
    _, plan = outlier()
    assert plan.weight_only == ("spiked.weight",)
    spared = plan.weights["spiked.weight"]
    assert "of the output's energy" in spared.reason
    assert spared.bits == 8
    assert (spared.activation_error or 0.0) > quantization.ACTIVATION_ERROR
    for name in ("plain.weight", "last.weight"):
        weight = plan.weights[name]
        assert not weight.reason
        assert weight.activation is not None
        assert (weight.activation_error or 1.0) <= quantization.ACTIVATION_ERROR
    assert str(plan) == "int8: 3 in 8 bits, 2 with int8 inputs, 0 kept"
    assert json.loads(json.dumps(plan.as_dict()))["weights"]["spiked.weight"]["activation_scale"] is None
    assert plan.tokens == 48


def feeds(count: int = 2) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))}
        for seed in range(count)
    ]


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_weights_that_lose_most_for_their_size_get_eight_bits(share: float) -> None:
    plan = calibrate(lifted(captured()), feeds(), "int4-weights", block_size=16, eight_bit_share=share)
    wide = {name: weight for name, weight in plan.weights.items() if weight.bits == 8}
    elements = sum(weight.values.numel() for weight in plan.weights.values())
    assert sum(weight.values.numel() for weight in wide.values()) <= share * elements
    assert bool(wide) == (share > 0)
    assert all("four bits would cost" in weight.reason and weight.block == 0 for weight in wide.values())
    assert all(weight.block == 16 and not weight.reason for name, weight in plan.weights.items() if name not in wide)
    assert plan.weight_only == tuple(plan.weights)


def test_the_share_is_filled_from_the_largest_loss_per_element() -> None:
    def weight(size: int, lost: float) -> QuantizedWeight:
        return QuantizedWeight(torch.zeros(size, dtype=torch.int8), torch.ones(1), 0, 0, 4, weight_error=lost)

    weights = {"small": weight(10, 0.02), "large": weight(80, 0.04), "other": weight(10, 0.001)}
    assert most_sensitive(weights, 0.15) == ["small"]
    assert most_sensitive(weights, 0.9) == ["small", "large"]
    assert most_sensitive(weights, 0.0) == []


@pytest.mark.parametrize("kind", ["int8", "int4-weights"])
def test_little_memory_takes_more_runs_and_gives_the_same(
    kind: quantization.Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = lifted(captured())
    whole = calibrate(program, feeds(), kind, block_size=16, eight_bit_share=0.0)
    monkeypatch.setattr(quantization, "_MOMENT_BYTES", 1)
    lines: list[str] = []
    parts = calibrate(program, feeds(), kind, block_size=16, eight_bit_share=0.0, progress=lines.append)
    assert sum(line.startswith("inputs of 1 layers: 1 of 2") for line in lines) == len(whole.weights)
    assert whole.weights.keys() == parts.weights.keys()
    for name, weight in whole.weights.items():
        other = parts.weights[name]
        assert torch.equal(weight.values, other.values)
        assert torch.equal(weight.scale, other.scale)
        assert weight.activation == other.activation


def test_bytes_are_those_of_the_file() -> None:
    plan = calibrate(lifted(captured()), feeds(), "int4-weights", block_size=16, eight_bit_share=0.0)
    elements = sum(weight.values.numel() for weight in plan.weights.values())
    assert plan.float_nbytes == 4 * elements
    assert plan.nbytes == elements // 2 + elements // 16 * 4
    assert math.isclose(plan.nbytes / plan.float_nbytes, 0.1875)


def test_without_inputs_there_is_no_plan() -> None:
    with pytest.raises(UsageError, match=r"quantize\.no-inputs"):
        calibrate(lifted(captured()), [], "int8")
