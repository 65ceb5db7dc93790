from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from depthwire.export._torch_export import export_module
from depthwire.passes.legalize_writes import LegalizeWrites
from depthwire.program import Program, Source
from tests.passes.parity import apply, assert_parity, check_golden, named, sabotaged

if TYPE_CHECKING:
    from depthwire.passes._edit import GraphEditor

aten = torch.ops.aten
SCATTERS = (aten.slice_scatter.default, aten.select_scatter.default, aten.copy.default)


class Write(nn.Module):
    """Writes into a buffer in one of several ways; ``x`` is ``[2, 6, 4]``."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        out = x.exp() if self.form in ("partial", "overlap", "axes", "read") else torch.empty_like(x)
        if self.form == "keys":  # the two parts of a latent-attention key
            out = x.new_empty(2, 6, 7)
            out[..., :4].copy_(x)
            out[..., 4:].copy_(x[:, :1, :3])
        elif self.form == "rows":  # one chunk after the other
            for i in range(6):
                out[:, i] = x[:, i].sin()
        elif self.form == "partial":
            out[:, 2:4] = x[:, :2].cos()
        elif self.form == "overlap":  # later writes lie on top
            out[:, 1:5] = x[:, :4].cos()
            out[:, 3:] = x[:, :3].sin()
            out[:, -2] = x[:, 0]
        elif self.form == "axes":
            out[:, 2] = x[:, 0]
            out[..., 1:3] = x[..., :2]
        elif self.form == "read":  # what was written so far is read on the way
            for i in range(1, 6):
                out[:, i] = out[:, i - 1] * 0.5 + x[:, i]
        elif self.form == "cast":
            out[:, :3] = x[:, :3].float()
            out[:, 3:] = 2.0
        elif self.form == "step":
            out = x.exp()
            out[:, ::2] = x[:, ::2]
        return out.tanh()


def program(form: str) -> Program:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    exported, names = export_module(Write(form), {"x": x})
    return Program(exported, Source("module", "Write"), {"x": x}, names)


def calls(after: Program) -> list[Any]:
    return [node.target for node in after.exported.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("form", ["keys", "rows", "partial", "overlap", "axes", "read", "cast"])
def test_no_scatter_is_left(form: str) -> None:
    result = apply(LegalizeWrites(), program(form), parity=0.0)
    assert result.rewrites > 0
    assert result.declines == ()
    assert not set(calls(result.program)) & set(SCATTERS)
    if form in ("keys", "rows"):  # covered whole: the buffer itself is not read
        assert calls(result.program).count(aten.cat.default) == 1
        assert not set(calls(result.program)) & {aten.new_empty.default, aten.empty_like.default}


def test_golden() -> None:
    before = program("overlap")
    check_golden("legalize_writes", before, apply(LegalizeWrites(), before).program)


def test_a_step_is_declined() -> None:
    before = program("step")
    result = LegalizeWrites().run(before)
    assert [decline.code for decline in result.declines] == ["legalize-writes.step"]
    assert aten.slice_scatter.default in calls(result.program)
    assert_parity(before, result.program, bound=0.0)


def test_pieces_in_another_order_are_noticed() -> None:
    before = program("rows")
    after = apply(LegalizeWrites(), before).program

    def swap(edit: GraphEditor) -> None:
        (joined,) = named(edit, aten.cat.default)
        pieces: Any = joined.args[0]
        edit.set_arg(joined, 0, [pieces[1], pieces[0], *pieces[2:]])

    with pytest.raises(AssertionError):
        assert_parity(before, sabotaged(after, swap))
