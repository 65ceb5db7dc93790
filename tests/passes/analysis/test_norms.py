from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from depthwire.passes.analysis.norm import Norm, find_norms
from depthwire.passes.remove_noops import RemoveNoops
from tests.passes.parity import node_values
from tests.zoo import NORMS, NormKind, Spec, program_of
from tests.zoo import Norm as Zoo

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.program import Program

D = 16


def capture(forward: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64, *shape: int) -> Program:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    torch.manual_seed(0)
    return program_of(Module(), {"x": torch.randn(*(shape or (3, D)), dtype=torch.float64).to(dtype)})


def only(program: Program) -> Norm:
    (norm,) = find_norms(program.exported)
    return norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_every_spelling_in_every_dtype(kind: NormKind, weight: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Zoo(Spec(norm=kind, weight=weight, eps=0.25)).to(dtype)
    x = torch.randn(2, 3, D).to(dtype)
    program = RemoveNoops().run(program_of(module, {"x": x})).program
    norm = only(program)
    assert (norm.kind, norm.eps) == (kind.partition("-")[0], 0.25)
    assert (norm.weight is not None) == weight
    assert (norm.bias is not None) == kind.startswith("layer")
    assert norm.source.name == "x"
    assert norm.output.name == program.output_nodes[0]
    assert norm.native == (kind in ("rms", "layer"))
    site, position = norm.eps_site
    assert site.args[position] == 0.25

    values = node_values(program, x)
    wide = x.double()
    if norm.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    expected = wide / (wide.square().mean(-1, keepdim=True) + 0.25).sqrt()
    for node, combine in ((norm.weight, torch.mul), (norm.bias, torch.add)):
        expected = expected if node is None else combine(expected, values[node.name].detach().double())
    bound = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(values[norm.output.name].double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_without_eps_torch_takes_that_of_the_dtype_it_computes_in(dtype: torch.dtype, compute: torch.dtype) -> None:
    program = capture(lambda x: functional.rms_norm(x * 1e-4, (D,)), dtype)
    norm = only(program)
    assert norm.eps == torch.finfo(compute).eps
    values = node_values(program, torch.randn(3, D).to(dtype))
    x = values[norm.source.name].double()
    expected = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)).to(dtype)
    torch.testing.assert_close(values[norm.output.name], expected)


def _root(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 0.1),
        lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 0.1),
        lambda x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 0.1),
        lambda x: x * torch.rsqrt(x.pow(2).mean((-1, -2), keepdim=True) + 0.1),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
        lambda x: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 0.1, alpha=2)),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.mean()),
        lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 0.1).pow(-0.25),
        lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt(),
        lambda x: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1) / x,
        lambda x: (x * 2.0) * _root(x),
        lambda x: x.tanh() * _root(x),
        lambda x: (x - x.mean(-1, keepdim=True)) * _root(x),
        lambda x: x * torch.rsqrt((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + 0.1),
        lambda x: (x - x.mean(0, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 0.1),
        lambda x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 0.1),
        lambda x: torch.sub(x, x.mean(-1, keepdim=True), alpha=2) * torch.rsqrt(x.var(-1, False, True) + 0.1),
        lambda x: functional.layer_norm(x, (3, D)),
        lambda x: functional.normalize(x, dim=-1),
    ],
)
def test_what_is_no_norm(forward: Callable[[Tensor], Tensor]) -> None:
    assert find_norms(capture(forward).exported) == []


def test_a_value_that_leaks_is_no_norm() -> None:
    def leak(x: Tensor) -> Tensor:
        root = _root(x)
        return x * root + root

    assert find_norms(capture(leak).exported) == []


def test_a_gain_from_the_inputs_is_not_the_norms() -> None:
    norm = only(capture(lambda x: x * _root(x) * x.sum(0).tanh()))
    assert norm.weight is None
    assert norm.output.target is torch.ops.aten.mul.Tensor


def test_a_correction_of_zero_is_a_biased_variance() -> None:
    def forward(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 0.1)

    assert only(capture(forward)).kind == "layer"
