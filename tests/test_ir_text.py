from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from depthwire.ir_text import structural_hash, target_text, to_text, type_text
from tests.zoo import Spec, build, inputs, program_of

aten = torch.ops.aten


class Module(nn.Module):
    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), weight))
        self.unused = nn.Parameter(torch.ones(9))
        self.register_buffer("shift", torch.ones(4, dtype=torch.bfloat16))

    def forward(self, x: Tensor, _unused: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.shift, Tensor)
        first, second = torch.split(x * self.weight, [1, 3], dim=-1)
        return first.sum(dim=0, keepdim=True, dtype=torch.float64), second + self.shift[:3]


EXAMPLES = {"x": torch.ones(2, 4), "_unused": torch.ones(3, dtype=torch.int32)}


def test_the_text_of_a_program() -> None:
    text = to_text(program_of(Module(), EXAMPLES).exported)
    assert (
        text
        == """\
%0 = param : f32[4]
%1 = buffer : bf16[4]
%2 = input : f32[2,4]
%3 = input : i32[3]
%4 = aten.mul.Tensor(%2, %0) : f32[2,4]
%5 = aten.split_with_sizes.default(%4, [1, 3], -1) : (f32[2,1], f32[2,3])
%6 = getitem(%5, 0) : f32[2,1]
%7 = getitem(%5, 1) : f32[2,3]
%8 = aten.sum.dim_IntList(%6, [0], True, dtype=float64) : f64[1,1]
%9 = aten.slice.Tensor(%1, 0, 0, 3) : bf16[3]
%10 = aten.add.Tensor(%7, %9) : f32[2,3]
return [%8, %10]
"""
    )


def test_content_is_printed_on_request_and_is_no_structure() -> None:
    first, second = (program_of(Module(weight), EXAMPLES).exported for weight in (1.0, 2.0))
    assert to_text(first) == to_text(second)
    assert structural_hash(first) == structural_hash(second)
    lines = [to_text(exported, content=True).splitlines() for exported in (first, second)]
    assert [index for index, pair in enumerate(zip(*lines, strict=True)) if pair[0] != pair[1]] == [0]
    assert len(lines[0][0].rpartition("#")[2]) == 8


def test_names_do_not_matter() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Linear(4, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.gain(tokens)  # type: ignore[no-any-return]

    plain = program_of(nn.Linear(4, 4), {"input": torch.ones(2, 4)})
    assert structural_hash(program_of(Renamed(), {"tokens": torch.ones(2, 4)}).exported) == structural_hash(
        plain.exported
    )


def test_structure_matters() -> None:
    specs = [Spec(), Spec(eps=1e-6), Spec(layers=3), Spec(tied=True), Spec(norm="layer"), Spec(swapped=True)]
    hashes = {structural_hash(program_of(build(spec), inputs()).exported) for spec in specs}
    assert len(hashes) == len(specs)
    assert structural_hash(program_of(build(Spec(), seed=5), inputs()).exported) in hashes


def test_which_of_two_equal_weights_is_used_matters() -> None:
    class Two(nn.Module):
        def __init__(self, *, swap: bool) -> None:
            super().__init__()
            self.swap = swap
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            a, b = (self.b, self.a) if self.swap else (self.a, self.b)
            return x * a + b

    hashes = [structural_hash(program_of(Two(swap=swap), torch.ones(3)).exported) for swap in (False, True)]
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.empty(1, 512, 576), "f32[1,512,576]"),
        (torch.empty((), dtype=torch.bool), "b1[]"),
        (torch.empty(0, dtype=torch.uint8), "u8[0]"),
        (torch.empty(2, dtype=torch.complex64), "complex64[2]"),
        ((torch.empty(1), [torch.empty(2).half()]), "(f32[1], (f16[2]))"),
        (None, "NoneType"),
        (3, "int"),
    ],
)
def test_types(value: object, text: str) -> None:
    assert type_text(value) == text


def test_targets_are_qualified() -> None:
    assert target_text(aten.add.Tensor) == "aten.add.Tensor"
    assert target_text(torch.ops.depthwire.attn_res_read.default) == "depthwire.attn_res_read.default"
    assert target_text(math.sin) == "sin"


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.int64])
def test_content_of_every_dtype(dtype: torch.dtype) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(2, 3).to(dtype).t())
            self.register_buffer("scalar", torch.ones(()).to(dtype))

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.table, Tensor)
            assert isinstance(self.scalar, Tensor)
            return x * self.table * self.scalar

    text = to_text(program_of(Constant(), torch.ones(3, 2)).exported, content=True)
    assert text.count("#") == 2
    assert "#none" not in text
