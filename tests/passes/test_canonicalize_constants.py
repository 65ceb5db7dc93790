from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from depthwire.passes._pipeline import Pipeline
from depthwire.passes.canonicalize_constants import CanonicalizeConstants
from tests.passes.parity import apply, assert_parity, check_golden, named, run, sabotaged
from tests.zoo import Spec, build, inputs, program_of

aten = torch.ops.aten


class Rotary(nn.Module):
    """Cosines of positions times a buffer, unsqueezed twice; a weight that must stay trainable."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1], dtype=torch.float64), persistent=False)
        self.gain = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.frequencies, Tensor)
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * self.frequencies
        return x * angles.cos()[None] + x.tanh() * angles.cos()[None] * (self.gain * 2.0)


def test_what_depends_on_no_input_is_computed_once() -> None:
    program = program_of(Rotary(), torch.randn(2, 3, 2, dtype=torch.float64))
    result = apply(CanonicalizeConstants(), program)
    check_golden("canonicalize_constants", program, result.program)
    exported = result.program.exported
    folded = [value for name, value in exported.constants.items() if name.startswith("folded_")]
    assert len(folded) == 1  # equal results share one constant
    torch.testing.assert_close(folded[0][0], torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.1])).double().cos())
    assert any(node.target is aten.mul.Tensor and 2.0 in node.args for node in exported.graph.nodes)  # the weight's


class Table(nn.Module):
    """A value of n numbers that depends on no input, in a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        table = torch.arange(4).remainder(2).to(self.dtype)
        return torch.where(table.bool(), x, -x) if self.dtype == torch.bool else (x * table).abs()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float16, torch.bfloat16, torch.complex64])
def test_constants_of_every_dtype(dtype: torch.dtype) -> None:
    result = apply(CanonicalizeConstants(), program_of(Table(dtype), torch.randn(3, 4)))
    assert [value.dtype for value in result.program.exported.constants.values()] == [dtype] * result.rewrites


def test_scalars_and_views_of_buffers() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(6.0).reshape(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.table, Tensor)
            return x * self.table.t().sum() + self.table[0].expand(4, 3)

    result = apply(CanonicalizeConstants(), program_of(Module(), torch.randn(4, 3)))
    shapes = sorted(tuple(value.shape) for value in result.program.exported.constants.values())
    assert shapes == [(), (4, 3)]


def test_too_large_a_result_stays_computed() -> None:
    program = program_of(Rotary(), torch.randn(2, 3, 2, dtype=torch.float64))
    result = apply(CanonicalizeConstants(limit=47), program)
    assert result.rewrites == 0
    assert {decline.code for decline in result.declines} == {"canonicalize-constants.too-large"}
    assert result.declines[0].want == "at most 47 bytes"
    assert result.declines[0].got == "48"
    assert apply(CanonicalizeConstants(limit=48), program).rewrites == 2


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (torch.rand(3) * 2.0 + 1.0).floor().clamp(9.0, 9.0)


def test_random_numbers_and_what_follows_from_them_are_not_folded() -> None:
    result = CanonicalizeConstants().run(program_of(Random(), torch.randn(2, 3)))
    assert result.rewrites == 0


def test_an_output_that_is_constant_stays_computed() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            positions = torch.arange(3) * 2
            return x * positions, positions + 1

    program = program_of(Module(), torch.randn(2, 3))
    after = apply(CanonicalizeConstants(), program).program
    assert not {*after.output_nodes} & {n.name for n in after.exported.graph.nodes if n.op == "placeholder"}
    assert torch.equal(run(after, torch.randn(2, 3))[1], torch.tensor([1, 3, 5]))


def test_a_model_without_constants_is_returned_as_it_is() -> None:
    program = program_of(nn.Linear(3, 3), torch.randn(2, 3))
    assert CanonicalizeConstants().run(program).program is program


def test_parameters_are_never_folded() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * (1.0 + self.weight)

    assert CanonicalizeConstants().run(program_of(Module(), torch.randn(2, 3))).rewrites == 0


@pytest.mark.parametrize(("batch", "length"), [(1, 3), (3, 4)])
def test_on_transformers_of_other_sizes(batch: int, length: int) -> None:
    model = build(Spec(attention="mask", positions=True))
    result = apply(CanonicalizeConstants(), program_of(model, inputs(batch=batch, length=length)))
    assert result.rewrites > 0


def test_another_value_is_noticed() -> None:
    program = program_of(Rotary(), torch.randn(2, 3, 2, dtype=torch.float64))
    after = Pipeline((CanonicalizeConstants(),)).run(program)
    broken = sabotaged(after, lambda edit: edit.set_arg(named(edit, aten.mul.Tensor)[0], 1, 1.0))
    with pytest.raises(AssertionError):
        assert_parity(program, broken)
