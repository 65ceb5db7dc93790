from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch

from depthwire.passes._match import is_call
from depthwire.passes.analysis.reads import INTER
from depthwire.passes.analysis.two_phase_cost import LONGEST_GROUP, START_BYTES, Site, cheapest_groups
from depthwire.passes.schedule_two_phase import ScheduleTwoPhase
from tests.passes.lifted import forms, lifted, plain_reads, with_odd_read
from tests.passes.parity import apply, assert_parity, check_golden, named, sabotaged
from tests.zoo import Spec


def test_golden_text() -> None:
    program = lifted(Spec(layers=4))
    check_golden("schedule_two_phase", program, apply(ScheduleTwoPhase(start_bytes=0), program).program)


@pytest.mark.parametrize(("attn_res", "layers"), [("full", 4), ("block:4", 6), ("block-layers:2", 6)])
def test_groups_share_the_bank(attn_res: str, layers: int) -> None:
    program = lifted(Spec(layers=layers), attn_res)
    result = apply(ScheduleTwoPhase(start_bytes=0), program)
    found = forms(result.program)
    assert found.count("attn_res_merge") == result.rewrites > 0
    assert len(found) == len(plain_reads(program))
    assert any("-> two-phase" in note for note in result.notes)


def test_few_tokens_are_left_alone() -> None:
    result = apply(ScheduleTwoPhase(), lifted(Spec(layers=4)))
    assert result.rewrites == 0
    assert all("-> single pass" in note for note in result.notes)


def test_the_policy_single_leaves_everything() -> None:
    program = lifted(Spec(layers=4))
    assert ScheduleTwoPhase("single").run(program).program is program


def brute_force(sites: list[Site]) -> int:
    """The cheapest grouping by trying all of them, from the formulas of the paper's schedule."""
    best = None
    for cuts in itertools.product((False, True), repeat=len(sites) - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(sites)]
        total = 0
        for first, end in itertools.pairwise(bounds):
            group = sites[first:end]
            bank, row = group[0].sources, group[0].row_bytes
            fits = all(site.shared >= bank for site in group[1:]) and len({site.kind for site in group}) == 1
            single = sum(site.sources + 1 for site in group) * row + len(group) * START_BYTES
            own = sum(site.sources - bank for site in group)
            two = (bank + len(group)) * row + (2 * len(group) + own) * row + (len(group) + 1) * START_BYTES
            total += min(single, two) if fits and len(group) > 1 else single
        best = total if best is None else min(best, total)
    assert best is not None
    return best


@pytest.mark.parametrize("row_bytes", [1, 30_000, 10_000_000])
def test_the_grouping_is_the_cheapest(row_bytes: int) -> None:
    full = [Site(n, n - 1, row_bytes, 0) for n in range(2, 12)]
    blocks = [Site(n // 3 + 2 - (n % 3 == 0), n // 3 + 1 - (n % 3 == 0) * 1, row_bytes, 0) for n in range(11)]
    mixed = [Site(n, n - 1, row_bytes, n // 4) for n in range(2, 12)]
    for sites in (full, blocks, mixed):
        groups = cheapest_groups(sites)
        assert sum(group.size for group in groups) == len(sites)
        assert sum(group.bytes for group in groups) == brute_force(sites)


def test_groups_are_limited() -> None:
    groups = cheapest_groups([Site(500, 500, 1 << 20, 0)] * 200)
    assert max(group.size for group in groups) == LONGEST_GROUP


def test_a_wrong_row_is_noticed() -> None:
    program = lifted(Spec(layers=4))
    after = apply(ScheduleTwoPhase(start_bytes=0), program).program
    merge = torch.ops.depthwire.attn_res_merge.default
    last = [node for node in after.exported.graph.nodes if is_call(node, merge)][-1]
    position = 4
    assert isinstance(last.args[position], int)
    wrong = sabotaged(after, lambda edit: edit.set_arg(named(edit, merge)[-1], position, 0))
    with pytest.raises(AssertionError, match=">"):
        assert_parity(program, wrong)


def test_phase_1_stands_before_its_merges() -> None:
    program = lifted(Spec(layers=4))
    after = apply(ScheduleTwoPhase(start_bytes=0), program).program
    order = {node: index for index, node in enumerate(after.exported.graph.nodes)}
    for inter in (node for node in order if is_call(node, INTER)):
        assert all(order[source] < order[inter] for source in inter.all_input_nodes)


@pytest.mark.parametrize("oddity", ["query", "value-norm", "last-bias"])
def test_what_two_phases_cannot_say_is_declined(oddity: Literal["query", "value-norm", "last-bias"]) -> None:
    program = with_odd_read(lifted(Spec(layers=4)), oddity)
    result = apply(ScheduleTwoPhase(start_bytes=0), program)
    assert [decline.code for decline in result.declines] == [f"schedule-two-phase.{oddity}"]
    assert_parity(program, result.program)
