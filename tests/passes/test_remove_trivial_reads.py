from __future__ import annotations

import torch
from torch import Tensor, nn

from depthwire.ops import attn_res_read
from depthwire.passes.remove_trivial_reads import RemoveTrivialReads
from tests.passes.lifted import plain_reads
from tests.passes.parity import apply, assert_parity, check_golden, named, sabotaged
from tests.zoo import program_of

aten = torch.ops.aten


class Reads(nn.Module):
    """Reads of one, one normalised and two sources."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.query = nn.Parameter(torch.randn(8, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        one: Tensor = attn_res_read(self.query, [x * 2], 1e-6, 1.0)
        unit: Tensor = attn_res_read(self.query, [y], 1e-6, 1.0, True)
        two: Tensor = attn_res_read(self.query, [one.sin(), unit], 1e-6, 1.0)
        return two + one, attn_res_read(self.query, [y.cos()], 1e-6, 1.0)


def examples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(2, 3, 8, generator=generator, dtype=torch.float64) for name in "xy"}


def test_golden_text() -> None:
    program = program_of(Reads(), examples())
    result = apply(RemoveTrivialReads(), program)
    assert result.rewrites == 1  # the normalised one changes its source, and an output stays a value of its own
    assert len(plain_reads(result.program)) == 3
    check_golden("remove_trivial_reads", program, result.program)


def test_nothing_to_do() -> None:
    program = program_of(nn.Identity(), {"x": torch.ones(2)})
    assert RemoveTrivialReads().run(program).program is program


def test_a_wrong_source_is_noticed() -> None:
    program = program_of(Reads(), examples())
    after = apply(RemoveTrivialReads(), program).program
    wrong = sabotaged(after, lambda edit: edit.set_arg(named(edit, aten.mul.Tensor)[0], 1, 2.001))
    try:
        assert_parity(program, wrong)
    except AssertionError:
        return
    raise AssertionError("the sabotaged program passes")
