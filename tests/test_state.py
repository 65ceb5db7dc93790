"""New weights for a program: what is checked, and what becomes of ties."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from depthwire.errors import CaptureError
from depthwire.export.capture import capture

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire.program import Program


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.table.weight
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("positions", torch.arange(4.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.table(ids)) * self.frozen + self.get_buffer("positions"))
        return out


@pytest.fixture
def module() -> Tied:
    torch.manual_seed(0)
    return Tied()


@pytest.fixture
def program(module: Tied) -> Program:
    return capture(module, example_inputs=(torch.tensor([1, 2, 3]),))


IDS = torch.tensor([5, 0, 4])


def tied(program: Program) -> bool:
    state = program.exported.state_dict
    return bool(state["head.weight"].data_ptr() == state["table.weight"].data_ptr())


def test_new_weights_compute_and_the_old_program_stays(program: Program, module: Tied) -> None:
    old = program.module()(IDS)
    other = Tied().eval()
    state = {name: tensor + 0.5 for name, tensor in other.state_dict().items() if tensor.is_floating_point()}
    state["norm.num_batches_tracked"] = torch.tensor(0)
    new = program.with_state(state)
    other.load_state_dict(state)
    torch.testing.assert_close(new.module()(IDS), other(IDS))
    assert torch.equal(program.module()(IDS), old)
    assert program.exported.graph.owning_module is program.exported.graph_module
    assert new.exported.graph is not program.exported.graph
    assert program.exported.state_dict["head.bias"].data_ptr() == module.head.bias.data_ptr()


def test_parameters_stay_parameters_and_buffers_buffers(program: Program) -> None:
    new = program.with_state(program.exported.state_dict).exported.state_dict
    assert isinstance(new["head.weight"], nn.Parameter)
    assert new["head.weight"].requires_grad
    assert isinstance(new["frozen"], nn.Parameter)
    assert not new["frozen"].requires_grad
    assert not isinstance(new["norm.running_mean"], nn.Parameter)
    assert list(new) == list(program.exported.state_dict)


def test_the_state_of_a_trained_module_fits(program: Program) -> None:
    trained = program.module()
    optimizer = torch.optim.SGD([weight for weight in trained.parameters() if weight.requires_grad], lr=0.1)
    trained(IDS).square().mean().backward()
    optimizer.step()
    new = program.with_state(trained.state_dict())
    assert tied(new)
    torch.testing.assert_close(new.module()(IDS), trained(IDS))


def test_equal_copies_are_tied_again(program: Program) -> None:
    state = {name: tensor.detach().clone() for name, tensor in program.exported.state_dict.items()}
    new = program.with_state(state)
    assert tied(new)
    assert new.weight_bytes == program.weight_bytes


def test_one_name_of_a_tie_is_enough(program: Program) -> None:
    state = {name: tensor.detach() * 2 for name, tensor in program.exported.state_dict.items()}
    del state["head.weight"]
    new = program.with_state(state)
    assert tied(new)
    assert torch.equal(new.exported.state_dict["head.weight"], state["table.weight"])


def test_a_tie_that_training_has_broken_stays_broken(program: Program) -> None:
    state = {name: tensor.detach().clone() for name, tensor in program.exported.state_dict.items()}
    state["head.weight"] += 1
    new = program.with_state(state)
    assert not tied(new)
    assert torch.equal(new.exported.state_dict["head.weight"], state["head.weight"])
    assert not torch.equal(new.module()(IDS), program.module()(IDS))


def test_buffers_that_are_not_persistent_may_come_too(program: Program) -> None:
    assert "positions" not in program.exported.state_dict
    new = program.with_state({**program.exported.state_dict, "positions": torch.zeros(4)})
    assert torch.equal(new.exported.constants["positions"], torch.zeros(4))
    assert torch.equal(program.exported.constants["positions"], torch.arange(4.0))


def test_every_difference_is_listed(program: Program) -> None:
    state: dict[str, Tensor] = dict(program.exported.state_dict)
    del state["norm.weight"], state["table.weight"], state["head.weight"]
    state["surplus"] = torch.ones(1)
    state["head.bias"] = torch.ones(7)
    state["frozen"] = torch.ones(4, dtype=torch.float64)
    state["norm.bias"] = None  # type: ignore[assignment]
    with pytest.raises(CaptureError) as raised:
        program.with_state(state)
    assert raised.value.code == "capture.state-mismatch"
    got = str(raised.value.got)
    for text in ("missing: table.weight", "head.weight", "norm.weight", "unknown: surplus", "no tensor: norm.bias"):
        assert text in got
    assert "head.bias is torch.float32[7], not torch.float32[6]" in got
    assert "frozen is torch.float64[4], not torch.float32[4]" in got


def test_new_weights_can_be_saved_and_captured(program: Program, tmp_path: Path) -> None:
    new = program.with_state({name: tensor.detach() * 2 for name, tensor in program.exported.state_dict.items()})
    new.save(tmp_path / "new.pt2")
    again = capture(tmp_path / "new.pt2")
    assert torch.equal(again.module()(IDS), new.module()(IDS))
    assert tied(again)
