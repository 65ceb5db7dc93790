from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from depthwire.ops import attn_res_read
from depthwire.passes.fuse_read_norm import FuseReadNorm
from depthwire.passes.recognize_attn_res import RecognizeAttnRes
from depthwire.passes.schedule_two_phase import ScheduleTwoPhase
from tests.passes.lifted import forms, lifted, plain_reads
from tests.passes.native_attn_res.capture import canonical
from tests.passes.parity import apply, assert_parity, check_golden, named, sabotaged
from tests.zoo import Spec, program_of

ops = torch.ops.depthwire


def test_golden_text() -> None:
    program = lifted(Spec(layers=1))
    check_golden("fuse_read_norm", program, apply(FuseReadNorm(), program).program)


@pytest.mark.parametrize("attn_res", ["full", "block:2"])
@pytest.mark.parametrize("spec", [Spec(), Spec(weight=False), Spec(eps=None), Spec(block="parallel-one")], ids=str)
def test_every_read_takes_its_norm_in(spec: Spec, attn_res: str) -> None:
    program = lifted(spec, attn_res)
    count = len(plain_reads(program))
    result = apply(FuseReadNorm(), program)
    assert result.rewrites == count
    assert forms(result.program) == ["attn_res_read_norm"] * count
    assert not result.declines


def test_merges_too() -> None:
    program = apply(ScheduleTwoPhase(start_bytes=0), lifted(Spec(layers=4))).program
    result = apply(FuseReadNorm(), program)
    assert "attn_res_merge_norm" in forms(result.program)
    assert not any(name.endswith(("read", "merge")) for name in forms(result.program))


@pytest.mark.parametrize("spec", [Spec(norm="layer"), Spec(extra_norm=True), Spec(block="parallel-two")], ids=str)
def test_other_readers_are_declined(spec: Spec) -> None:
    program = lifted(spec)
    result = apply(FuseReadNorm(), program)
    assert {decline.code for decline in result.declines} == {"fuse-read-norm.reader"}
    assert len(result.declines) == len(plain_reads(result.program)) > 0


def test_a_narrow_model_fuses_and_stays_as_close_to_fp64() -> None:
    spec = Spec(layers=3)
    program = lifted(spec, dtype=torch.bfloat16)
    # Not rounding between read and norm moves the result by about one rounding.
    result = apply(FuseReadNorm(), program, parity=4 * torch.finfo(torch.bfloat16).eps)
    assert result.rewrites == 6


class Flat(nn.Module):
    """Native reads over rows ``[B·T, d]`` of sources ``[B, T, d]``, in a list or a buffer, and a norm of the rows."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.buffer = buffer
        self.query = nn.Parameter(torch.randn(8))
        self.norm = nn.RMSNorm(8, eps=1e-5)
        self.body = nn.Linear(8, 8)

    def stacked(self, rows: list[Tensor]) -> Tensor:
        if not self.buffer:
            return torch.stack(rows)
        bank = rows[0].new_empty(len(rows), *rows[0].shape)
        for index, row in enumerate(rows):
            bank[index] = row
        return bank

    def forward(self, x: Tensor) -> Tensor:
        sources = [x]
        for _ in range(3):
            v = self.stacked([source.reshape(-1, 8) for source in sources])
            keys = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5)
            read = torch.einsum("nr,nrd->rd", (keys @ self.query).softmax(0), v)
            sources.append(torch.tanh(self.body(self.norm(read).view_as(x))))
        return sources[-1]


@pytest.mark.parametrize("buffer", [False, True])
def test_rows_of_tokens_are_no_obstacle(buffer: bool) -> None:
    program = apply(RecognizeAttnRes(), canonical(Flat(buffer).double(), torch.randn(2, 3, 8).double())).program
    result = apply(FuseReadNorm(), program)
    assert result.rewrites == 3
    assert not result.declines
    assert not [n for n in result.program.exported.graph.nodes if n.target is torch.ops.aten.reshape.default]


class Normless(nn.Module):
    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        out: Tensor = attn_res_read(query, [x, x.sin()], 1e-6, 1.0)
        return out + 1


def test_a_read_without_a_norm_is_declined() -> None:
    examples = {"x": torch.ones(2, 8), "query": torch.ones(8)}
    result = FuseReadNorm().run(program_of(Normless(), examples))
    assert [decline.code for decline in result.declines] == ["fuse-read-norm.reader"]
    assert "aten.add" in result.declines[0].got


def test_a_wrong_eps_is_noticed() -> None:
    program = lifted(Spec(eps=0.1))
    after = apply(FuseReadNorm(), program).program
    wrong = sabotaged(after, lambda edit: edit.set_arg(named(edit, ops.attn_res_read_norm.default)[0], 5, 0.2))
    with pytest.raises(AssertionError, match=">"):
        assert_parity(program, wrong)
