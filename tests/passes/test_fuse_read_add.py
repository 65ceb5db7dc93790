from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from depthwire.ops import attn_res_read
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.fuse_read_add import FuseReadAdd
from depthwire.passes.fuse_read_norm import FuseReadNorm
from depthwire.passes.schedule_two_phase import ScheduleTwoPhase
from tests.passes.lifted import forms, lifted
from tests.passes.parity import apply, assert_parity, check_golden, named, sabotaged, sources_of
from tests.zoo import Spec, program_of

if TYPE_CHECKING:
    from depthwire.passes._edit import GraphEditor

aten, ops = torch.ops.aten, torch.ops.depthwire


def test_golden_text() -> None:
    program = lifted(Spec(layers=2), "block:1")
    check_golden("fuse_read_add", program, apply(FuseReadAdd(), program).program)


@pytest.mark.parametrize("norm", [False, True])
def test_running_sums_are_made_by_the_reads(norm: bool) -> None:
    program = lifted(Spec(layers=4), "block:2")  # 8 sublayers in 2 blocks of 4: 3 sums in each
    if norm:
        program = apply(FuseReadNorm(), program).program
    result = apply(FuseReadAdd(), program)
    assert result.rewrites == 6
    assert not [node for node in result.program.exported.graph.nodes if node.target is aten.add.Tensor]
    assert forms(result.program).count("attn_res_add_read_norm" if norm else "attn_res_add_read") == 6
    # The first read sees the first sublayer's output; the second block's first one only sums that were read before.
    codes = [decline.code for decline in result.declines]
    assert codes == ["fuse-read-add.no-sum", "fuse-read-add.needed-earlier"]


def test_full_attn_res_has_no_sums() -> None:
    result = apply(FuseReadAdd(), lifted(Spec()))
    assert result.rewrites == 0
    assert {decline.code for decline in result.declines} == {"fuse-read-add.no-sum"}


def test_merges_too() -> None:
    program = lifted(Spec(layers=6), "block:4")
    program = Pipeline((ScheduleTwoPhase(start_bytes=0), FuseReadNorm())).run(program)
    result = apply(FuseReadAdd(), program)
    assert "attn_res_add_merge_norm" in forms(result.program)


def test_values_keep_their_names() -> None:
    program = lifted(Spec(layers=2), "block:1")
    before = {node.name for node in program.exported.graph.nodes}
    after = apply(FuseReadAdd(), program).program
    kept = {node.name for node in after.exported.graph.nodes if node.target is operator.getitem}
    assert kept <= before


class Earlier(nn.Module):
    """The sum is needed before the read."""

    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        first = total.sin()
        return attn_res_read(query, [x, total], 1e-6, 1.0), first


class Biased(nn.Module):
    """The sum is not the last source, and the last one has a bias of its own."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return attn_res_read(query, [total, x], 1e-6, 1.0, False, self.bias), total.sin()


def examples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(2, 8, generator=generator, dtype=torch.float64) for name in "xy"}
    return {**drawn, "query": torch.randn(8, generator=generator, dtype=torch.float64)}


def test_a_sum_that_is_needed_earlier_is_declined() -> None:
    result = FuseReadAdd().run(program_of(Earlier(), examples()))
    assert [decline.code for decline in result.declines] == ["fuse-read-add.needed-earlier"]
    assert "sin" in result.declines[0].got


def test_only_the_last_source_counts_beside_a_bias() -> None:
    assert apply(FuseReadAdd(), program_of(Biased(0.0), examples())).rewrites == 1
    biased = apply(FuseReadAdd(), program_of(Biased(1.5), examples()))
    assert [decline.code for decline in biased.declines] == ["fuse-read-add.no-sum"]


def test_a_lost_sum_is_noticed() -> None:
    program = lifted(Spec(layers=2), "block:1")
    after = apply(FuseReadAdd(), program).program

    def read_it_as_its_own_delta(edit: GraphEditor) -> None:
        read = named(edit, ops.attn_res_add_read.default)[0]
        edit.set_arg(read, 2, sources_of(read)[-1])

    wrong = sabotaged(after, read_it_as_its_own_delta)
    with pytest.raises(AssertionError, match=">"):
        assert_parity(program, wrong)
