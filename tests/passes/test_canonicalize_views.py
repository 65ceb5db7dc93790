from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from depthwire.passes.canonicalize_views import CanonicalizeViews
from tests.passes.parity import apply, assert_parity, check_golden, named, sabotaged
from tests.zoo import Spec, build, inputs, program_of

aten = torch.ops.aten


class Views(nn.Module):
    """A view, an inferred size, and a reshape that is explicit already."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = x.view(batch, length, 2, -1).transpose(1, 2)
        back = heads.transpose(1, 2).reshape(batch, length, width)
        return torch.tanh(back.reshape(-1, width))


def test_every_view_becomes_an_explicit_reshape() -> None:
    program = program_of(Views(), torch.randn(2, 3, 4, dtype=torch.float64))
    result = apply(CanonicalizeViews(), program)
    check_golden("canonicalize_views", program, result.program)
    calls = [node for node in result.program.exported.graph.nodes if node.op == "call_function"]
    assert not {node.target for node in calls} & {aten.view.default, aten._unsafe_view.default}
    for node in calls:
        if node.target is aten.reshape.default:
            assert node.args[1] == list(node.meta["val"].shape)


def test_names_of_values_are_kept() -> None:
    program = program_of(Views(), torch.randn(2, 3, 4, dtype=torch.float64))
    after = apply(CanonicalizeViews(), program).program
    assert [node.name for node in after.exported.graph.nodes] == [n.name for n in program.exported.graph.nodes]


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 4)])
def test_on_transformers_of_other_sizes(batch: int, length: int) -> None:
    model = build(Spec(attention="eager", kv_heads=1, flat_mlp=True))
    assert apply(CanonicalizeViews(), program_of(model, inputs(batch=batch, length=length))).rewrites > 0


def test_nothing_to_do_returns_the_program_itself() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    program = program_of(Module(), torch.randn(2, 3))
    assert CanonicalizeViews().run(program).program is program


def test_the_promise_is_checked_on_the_result() -> None:
    program = program_of(Views(), torch.randn(2, 3, 4, dtype=torch.float64))
    assert any("is still a view" in wrong for wrong in CanonicalizeViews().ensures(program))


def test_another_order_of_elements_is_noticed() -> None:
    program = program_of(Views(), torch.randn(2, 4, 4, dtype=torch.float64))
    after = apply(CanonicalizeViews(), program).program
    broken = sabotaged(after, lambda edit: edit.set_arg(named(edit, aten.transpose.int)[0], 2, 3))
    with pytest.raises((AssertionError, RuntimeError)):
        assert_parity(program, broken)


class Transpositions(nn.Module):
    """The two transpositions that name no axes; the exporter has no translation for the first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T.T).mT @ x


def test_transpositions_say_which_axes_they_exchange() -> None:
    program = program_of(Transpositions(), torch.randn(2, 3, 5, dtype=torch.float64))
    result = apply(CanonicalizeViews(), program)
    orders = [node.args[1] for node in result.program.exported.graph.nodes if node.target is aten.permute.default]
    assert orders == [[1, 0], [1, 0], [0, 2, 1]]
    assert_parity(program, result.program)
