"""What a sublayer sums up on its way from one state of the stream to the next is no stream of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from depthwire.passes.analysis.residual_stream import find_residual_stream
from tests.zoo import program_of

WIDTH = 8


class Series(nn.Module):
    """x + Wx + WWx + …: a chain of additions inside a branch, longer than the stream itself."""

    def __init__(self, terms: int) -> None:
        super().__init__()
        self.terms = terms
        self.weight = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.weight(x)
        for _ in range(self.terms):
            total = total + self.weight(total)
        return total


class Model(nn.Module):
    def __init__(self, layers: int, terms: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(layers + 1))
        self.branches = nn.ModuleList(Series(terms) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2.0
        for norm, branch in zip(self.norms, self.branches, strict=False):
            x = x + branch(norm(x))
        result: Tensor = self.norms[-1](x)
        return result


@pytest.mark.parametrize(("layers", "terms"), [(2, 2), (2, 9), (5, 4)])
def test_a_series_in_a_branch_is_no_stream(layers: int, terms: int) -> None:
    stream = find_residual_stream(program_of(Model(layers, terms), torch.randn(2, 3, WIDTH)))
    assert stream.streams == 1
    assert [sublayer.module.split(".")[1] for sublayer in stream.sublayers] == [str(index) for index in range(layers)]
    assert stream.breaks == ()


def test_two_towers_are_two_streams() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = Model(4, 0), Model(4, 0)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    stream = find_residual_stream(program_of(Towers(), torch.randn(2, 3, WIDTH)))
    assert stream.streams == 2
