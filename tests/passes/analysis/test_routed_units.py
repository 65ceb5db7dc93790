from __future__ import annotations

import pytest

from depthwire.passes.analysis.routed_units import count_layers, find_units, width_of
from depthwire.passes.remove_trivial_reads import RemoveTrivialReads
from depthwire.route import RouteSpec, parse_capacity
from tests.passes.lifted import lifted
from tests.zoo import WIDTH, Spec, captured

HALF = (parse_capacity(0.5),)


def test_the_units_of_a_plain_model() -> None:
    _, program = captured(Spec(layers=3))
    assert count_layers(program) == 3
    assert width_of(program) == WIDTH
    units = find_units(program, RouteSpec((0, 2), HALF))
    assert [unit.layer for unit in units] == [0, 2]
    first, second = units
    assert first.updated is None
    assert second.updated is not None
    assert second.updated[1] is second.state
    assert first.boundary == (first.state,)
    assert first.residual
    assert first.normed is not None
    (result,) = first.results
    assert second.updated[0] is result  # nothing lies between the layers
    assert "layers.0" in first.module


@pytest.mark.parametrize("unit", ["attention", "mlp"])
def test_sublayers_tile_a_layer(unit: str) -> None:
    _, program = captured(Spec())
    (block,) = find_units(program, RouteSpec((1,), HALF))
    (attention,) = find_units(program, RouteSpec((1,), HALF, unit="attention"))
    (mlp,) = find_units(program, RouteSpec((1,), HALF, unit="mlp"))
    assert attention.state is block.state
    assert attention.results == (mlp.state,)
    assert mlp.results == block.results
    assert mlp.updated == block.updated  # the surprise is the layer's before, whatever is routed
    assert unit in {"attention": attention, "mlp": mlp}[unit].module


def test_a_post_norm_unit_ends_behind_its_norm() -> None:
    _, program = captured(Spec(placement="post"))
    (unit,) = find_units(program, RouteSpec((1,), HALF))
    assert "rms_norm" in str(unit.state.target)
    assert "rms_norm" in str(unit.results[0].target)
    assert unit.normed is unit.state


@pytest.mark.parametrize("attn_res", ["full", "block:2"])
def test_sources_are_gathered(attn_res: str) -> None:
    program = RemoveTrivialReads().run(lifted(Spec(layers=3), attn_res)).program
    assert count_layers(program) == 3
    (block,) = find_units(program, RouteSpec((2,), HALF))
    assert not block.residual
    assert len(block.results) == 2
    assert len(block.boundary) == (5 if attn_res == "full" else 3)
    assert block.state in block.boundary
    assert len(block.heads) == 2
