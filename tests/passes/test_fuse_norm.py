from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from depthwire.passes.fuse_norm import FuseNorm
from depthwire.passes.remove_noops import RemoveNoops
from tests.passes.parity import apply, assert_parity, check_golden, named, sabotaged
from tests.zoo import NORMS, Norm, NormKind, Spec, build, inputs, program_of

if TYPE_CHECKING:
    from depthwire.program import Program

aten = torch.ops.aten
SPELLED = [kind for kind in NORMS if kind not in ("rms", "layer")]
NATIVE = (aten.rms_norm.default, aten.layer_norm.default)


def norm_program(spec: Spec, dtype: torch.dtype = torch.float64) -> Program:
    torch.manual_seed(0)
    program = program_of(Norm(spec).to(dtype), torch.randn(2, 3, 16, dtype=torch.float64).to(dtype))
    return RemoveNoops().run(program).program


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("kind", SPELLED)
def test_every_spelling_becomes_one_operator(kind: NormKind, weight: bool, bias: bool) -> None:
    program = norm_program(Spec(norm=kind, weight=weight, bias=bias, eps=0.1))
    result = apply(FuseNorm(), program)
    assert result.rewrites == 1
    fused = [node for node in result.program.exported.graph.nodes if node.op == "call_function"]
    assert [node.target for node in fused if node.target in NATIVE] == [NATIVE[kind.startswith("layer")]]
    assert len(fused) == (2 if kind == "rms-gemma" and weight else 1)
    assert fused[-1].name == program.output_nodes[0]
    assert 0.1 in fused[-1].args


@pytest.mark.parametrize("kind", ["rms-gemma", "layer-var"])
def test_golden_text(kind: NormKind) -> None:
    program = norm_program(Spec(norm=kind))
    check_golden(f"fuse_norm_{kind}", program, apply(FuseNorm(), program).program)


@pytest.mark.parametrize(("seed", "batch", "length"), [(0, 1, 3), (1, 3, 4), (2, 2, 5)])
def test_on_transformers_of_other_sizes(seed: int, batch: int, length: int) -> None:
    spec = Spec(norm=SPELLED[seed], embedding_norm=True, placement="sandwich")
    program = RemoveNoops().run(program_of(build(spec, seed=seed), inputs(batch=batch, length=length))).program
    assert apply(FuseNorm(), program).rewrites == 2 * 4 + 2


def test_native_norms_are_left_alone() -> None:
    program = norm_program(Spec(norm="rms"))
    assert FuseNorm().run(program).program is program


@pytest.mark.parametrize("kind", ["rms-hf", "rms-gemma", "layer-var"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_that_rounds_on_the_way_is_declined(kind: NormKind, dtype: torch.dtype) -> None:
    program = norm_program(Spec(norm=kind), dtype)
    result = FuseNorm().run(program)
    assert result.rewrites == 0
    assert [decline.code for decline in result.declines] == ["fuse-norm.mixed-dtype"]
    assert "torch.float32" in result.declines[0].got


class Affine(nn.Module):
    """An RMSNorm whose gain is something else than ``[d]`` in the source's dtype."""

    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


def test_a_gain_of_one_number_is_declined() -> None:
    result = FuseNorm().run(program_of(Affine(torch.ones(1)), torch.randn(2, 3, 16)))
    assert [decline.code for decline in result.declines] == ["fuse-norm.affine-shape"]
    assert result.declines[0].got == "[1]"


def test_a_gain_in_another_dtype_is_declined() -> None:
    result = FuseNorm().run(program_of(Affine(torch.ones(16, dtype=torch.bfloat16)), torch.randn(2, 3, 16)))
    assert [decline.code for decline in result.declines] == ["fuse-norm.mixed-dtype"]


def test_an_offset_behind_an_rms_norm_is_kept() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Affine(torch.rand(16, dtype=torch.float64))
            self.offset = nn.Parameter(torch.rand(16, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.offset  # type: ignore[no-any-return]

    result = apply(FuseNorm(), program_of(Module(), torch.randn(2, 3, 16, dtype=torch.float64)))
    assert [n.target for n in result.program.exported.graph.nodes if n.op == "call_function"] == [
        aten.rms_norm.default,
        aten.add.Tensor,
    ]


def test_a_cast_behind_the_norm_is_not_part_of_it() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Affine(torch.rand(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).to(torch.bfloat16)  # type: ignore[no-any-return]

    result = RemoveNoops().run(program_of(Module(), torch.randn(2, 3, 16)))
    assert apply(FuseNorm(), result.program).rewrites == 1


def test_norms_of_norms_are_fused() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(Norm(Spec(norm=kind)) for kind in ("rms-hf", "rms-hf", "layer-var", "rms-gemma"))).double()
    program = RemoveNoops().run(program_of(module, torch.randn(2, 3, 16, dtype=torch.float64))).program
    assert apply(FuseNorm(), program).rewrites == 4


@pytest.mark.parametrize("position", [2, 3])
def test_another_gain_or_eps_is_noticed(position: int) -> None:
    program = norm_program(Spec(norm="rms-hf"))
    after = apply(FuseNorm(), program).program
    wrong = {2: None, 3: 1e-6}[position]
    broken = sabotaged(after, lambda edit: edit.set_arg(named(edit, aten.rms_norm.default)[0], position, wrong))
    with pytest.raises(AssertionError):
        assert_parity(program, broken)
