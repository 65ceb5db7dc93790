from __future__ import annotations

from typing import Literal

import pytest
import torch

from depthwire.passes._match import is_call
from depthwire.passes.queries import QUERY_PREFIX
from depthwire.passes.remove_zero_queries import RemoveZeroQueries
from depthwire.passes.standard import canonical_pipeline
from tests.passes.lifted import lifted, plain_reads, with_odd_read
from tests.passes.parity import apply, assert_parity, check_golden, named, sabotaged
from tests.zoo import Spec, build, inputs, program_of

aten = torch.ops.aten


def test_golden_text() -> None:
    program = lifted(Spec(layers=1), zero=True)
    check_golden("remove_zero_queries", program, apply(RemoveZeroQueries(), program).program)


@pytest.mark.parametrize("attn_res", ["full", "block:2", "block-layers:1"])
@pytest.mark.parametrize("spec", [Spec(), Spec(norm="layer"), Spec(layers=3, block="parallel-two", eps=0.1)], ids=str)
def test_a_lift_is_undone(spec: Spec, attn_res: str) -> None:
    plain = canonical_pipeline().run(program_of(build(spec), inputs()))
    result = apply(RemoveZeroQueries(), lifted(spec, attn_res, zero=True))
    assert not plain_reads(result.program)
    assert_parity(plain, result.program)

    def adds(program: object) -> int:
        return sum(is_call(node, aten.add.Tensor) for node in program.exported.graph.nodes)  # type: ignore[attr-defined]

    # Each sublayer's output is added once, as in the plain model: no bank is left.
    assert adds(result.program) == adds(plain)


def test_trained_queries_stay() -> None:
    program = lifted(Spec())
    result = apply(RemoveZeroQueries(), program)
    assert result.rewrites == 0
    assert {decline.code for decline in result.declines} == {"remove-zero-queries.not-zero"}


def test_some_queries_are_zero() -> None:
    program = lifted(Spec(layers=3))
    state = dict(program.exported.state_dict)
    for index in (1, 2, 5):
        state[f"{QUERY_PREFIX}{index}"] = torch.nn.Parameter(torch.zeros_like(state[f"{QUERY_PREFIX}{index}"]))
    result = apply(RemoveZeroQueries(), program.with_state(state))
    assert result.rewrites == 3
    assert len(plain_reads(result.program)) == 3


def test_a_missing_correction_is_noticed() -> None:
    spec = Spec(eps=0.1)
    program = lifted(spec, zero=True)
    after = apply(RemoveZeroQueries(), program).program
    wrong = sabotaged(after, lambda edit: edit.set_arg(named(edit, aten.rms_norm.default)[2], 3, 0.1 / 9))
    with pytest.raises(AssertionError, match=">"):
        assert_parity(program, wrong)


@pytest.mark.parametrize(("oddity", "code"), [("query", "query"), ("value-norm", "option"), ("last-bias", "option")])
def test_reads_that_are_no_mean_stay(oddity: Literal["query", "value-norm", "last-bias"], code: str) -> None:
    program = with_odd_read(lifted(Spec(layers=2), zero=True), oddity)
    result = apply(RemoveZeroQueries(), program)
    assert [decline.code for decline in result.declines] == [f"remove-zero-queries.{code}"]
    assert len(plain_reads(result.program)) == 1
    assert_parity(program, result.program)
