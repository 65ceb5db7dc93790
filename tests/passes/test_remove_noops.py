from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from depthwire.passes.remove_noops import RemoveNoops
from tests.passes.parity import apply, assert_parity, check_golden, named, sabotaged
from tests.zoo import Spec, build, inputs, program_of

aten = torch.ops.aten


class Noops(nn.Module):
    """Every operation that does nothing, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        x = (x.to(torch.float64) * 1.0 / 1.0 + 0.0 - 0.0) * 2.0
        x = functional.dropout(x, 0.5, training=False)
        x = x.detach().clone().contiguous()
        x = x.expand(x.shape).reshape(x.shape).view(x.shape)[:, 0:, :]
        return torch.tanh(x)


def test_every_noop_goes() -> None:
    program = program_of(Noops(), torch.randn(2, 3, 4, dtype=torch.float64))
    result = apply(RemoveNoops(), program)
    assert [node.target for node in result.program.exported.graph.nodes if node.op == "call_function"] == [
        aten.mul.Tensor,
        aten.tanh.default,
    ]
    check_golden("remove_noops", program, result.program)


class Kept(nn.Module):
    """Operations that look like nothing and are something."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        changed = {
            "cast": lambda: x.to(torch.float32),
            "promotion": lambda: torch.ones(3, dtype=torch.int64) * 1.0,
            "layout": lambda: x.transpose(0, 1).contiguous(),
            "slice": lambda: x[:, 1:],
            "step": lambda: x[:, ::2],
            "factor": lambda: x * 1.5,
            "offset": lambda: x + 1e-7,
            "expand": lambda: x[:1].expand(2, 4, 5),
            "reshape": lambda: x.reshape(2, 20),
        }[self.kind]()
        return torch.tanh(changed)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("cast", aten.to.dtype),
        ("promotion", aten.mul.Tensor),
        ("layout", aten.contiguous.default),
        ("slice", aten.slice.Tensor),
        ("step", aten.slice.Tensor),
        ("factor", aten.mul.Tensor),
        ("offset", aten.add.Tensor),
        ("expand", aten.expand.default),
        ("reshape", aten.reshape.default),
    ],
)
def test_what_does_something_stays(kind: str, target: object) -> None:
    program = program_of(Kept(kind), torch.randn(2, 4, 5, dtype=torch.float64))
    after = apply(RemoveNoops(), program).program
    assert target in {node.target for node in after.exported.graph.nodes}


class Outputs(nn.Module):
    """Outputs that are values of their own only by a copy."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.tanh(x)
        return x.clone(), y, y.clone()


def test_outputs_stay_apart_from_inputs_and_from_one_another() -> None:
    program = program_of(Outputs(), torch.randn(2, 3))
    after = apply(RemoveNoops(), program).program
    assert len({*after.output_nodes, *after.input_names}) == 4


def test_a_single_copy_before_an_output_goes() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x).clone()

    assert apply(RemoveNoops(), program_of(Module(), torch.randn(2, 3))).rewrites == 1


def test_nothing_to_do_returns_the_program_itself() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    program = program_of(Module(), torch.randn(2, 3))
    assert RemoveNoops().run(program).program is program


@pytest.mark.parametrize(("batch", "length"), [(1, 3), (3, 4)])
def test_on_transformers_of_other_sizes(batch: int, length: int) -> None:
    model = build(Spec(norm="rms-hf", dropout=0.1, attention="mask"))
    result = apply(RemoveNoops(), program_of(model, inputs(batch=batch, length=length)))
    assert result.rewrites > 10
    assert not result.declines


def test_the_promise_is_checked_on_the_result() -> None:
    program = program_of(Noops(), torch.randn(2, 3, 4, dtype=torch.float64))
    assert any("is still there" in wrong for wrong in RemoveNoops().ensures(program))


def test_removing_a_factor_is_noticed() -> None:
    program = program_of(Noops(), torch.randn(2, 3, 4, dtype=torch.float64))
    after = apply(RemoveNoops(), program).program
    broken = sabotaged(after, lambda edit: edit.replace(*_factor_and_source(named(edit, aten.mul.Tensor)[0])))
    with pytest.raises(AssertionError):
        assert_parity(program, broken)


def _factor_and_source(node: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node]:
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    return node, source
