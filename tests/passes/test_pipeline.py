"""Passes that misbehave, each in one way, and how the checks between passes name it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from torch import Tensor, nn

from depthwire.errors import InternalError, PassError
from depthwire.ir_text import to_text
from depthwire.passes._base import Decline, Pass, PassResult, module_path, where
from depthwire.passes._edit import STAMP, GraphEditor
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.canonicalize_views import CanonicalizeViews
from depthwire.passes.remove_noops import RemoveNoops
from depthwire.passes.standard import canonical_pipeline, standard_pipeline
from tests.passes.parity import assert_parity, named, run
from tests.zoo import Spec, build, captured, inputs, program_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from depthwire.program import Program

aten = torch.ops.aten


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("shift", torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.shift, Tensor)
        return torch.tanh(x * self.weight) + self.shift


@pytest.fixture
def program() -> Program:
    return program_of(Small(), torch.randn(2, 3, dtype=torch.float64))


@dataclass(frozen=True)
class Edit(Pass):
    """Does one thing to ``tanh`` and reports some number of rewrites."""

    name: ClassVar[str] = "canonicalize_small"
    change: Callable[[GraphEditor, torch.fx.Node], None]
    rewrites: int = 1

    def run(self, program: Program) -> PassResult:
        edit = GraphEditor(program, self.name)
        self.change(edit, named(edit, aten.tanh.default)[0])
        return PassResult(edit.finish(), self.rewrites)


def nothing(*_: object) -> None:
    """Leave all as it is."""


def sine(edit: GraphEditor, tanh: torch.fx.Node) -> None:
    edit.replace(tanh, edit.call(aten.sin.default, tanh.args, before=tanh, like=tanh))


def wrong_value(edit: GraphEditor, tanh: torch.fx.Node) -> None:
    sine(edit, tanh)
    named(edit, aten.sin.default)[0].meta["val"] = tanh.meta["val"].new_empty(2, 4)


def wrong_value_of_an_old_node(_: GraphEditor, tanh: torch.fx.Node) -> None:
    tanh.meta["val"] = tanh.meta["val"].to(torch.float32)


def stale_value_behind(edit: GraphEditor, tanh: torch.fx.Node) -> None:
    cast = edit.call(aten.to.dtype, (tanh, torch.float32), before=tanh.next, like=tanh)
    for user in [user for user in tanh.users if user is not cast]:
        edit.reroute(user, tanh, cast)
    wide = edit.call(aten.to.dtype, (cast, torch.float64), before=cast.next, like=tanh)
    add = next(user for user in cast.users if user is not wide)
    add.args = (cast, torch.float32)  # what no operator takes


def parameter(edit: GraphEditor, tanh: torch.fx.Node) -> None:
    weight = edit.add_parameter("extra", torch.ones(3, dtype=torch.float64))
    edit.replace(tanh, edit.call(aten.mul.Tensor, (tanh.args[0], weight), before=tanh, like=tanh))


def constant(edit: GraphEditor, tanh: torch.fx.Node) -> None:
    value = edit.add_constant("extra", torch.ones(3, dtype=torch.float64))
    edit.replace(tanh, edit.call(aten.mul.Tensor, (tanh.args[0], value), before=tanh, like=tanh))


def output_dtype(edit: GraphEditor, _: torch.fx.Node) -> None:
    last = named(edit, aten.add.Tensor)[-1]
    cast = edit.call(aten.to.dtype, (last, torch.float32), before=last.next, like=last)
    output = next(node for node in edit.graph.nodes if node.op == "output")
    edit.reroute(output, last, cast)


def no_stamp(edit: GraphEditor, tanh: torch.fx.Node) -> None:
    sine(edit, tanh)
    del named(edit, aten.sin.default)[0].meta["custom"]


def no_stamp_under_an_old_name(edit: GraphEditor, tanh: torch.fx.Node) -> None:
    new = edit.call(aten.sin.default, tanh.args, before=tanh, like=tanh)
    edit.replace(tanh, new, keep_name=True)
    del new.meta["custom"]


def no_provenance(edit: GraphEditor, tanh: torch.fx.Node) -> None:
    sine(edit, tanh)
    del named(edit, aten.sin.default)[0].meta["nn_module_stack"]


@pytest.mark.parametrize(
    ("change", "rewrites", "text"),
    [
        (nothing, 1, "reports 1 rewrites, but the graph did not change"),
        (sine, 0, "reports 0 rewrites, but the graph changed"),
        (wrong_value, 1, "sin records f64[2,4], computes f64[2,3]"),
        (wrong_value_of_an_old_node, 1, "tanh records f32[2,3], computes f64[2,3]"),
        (parameter, 1, "undeclared parameter: extra"),
        (constant, 1, "undeclared constant tensor: extra"),
        (output_dtype, 1, "the outputs changed"),
        (no_stamp, 1, "sin does not say which pass made it"),
        (no_stamp_under_an_old_name, 1, "tanh does not say which pass made it"),
        (no_provenance, 1, "sin has no provenance"),
    ],
)
def test_a_broken_contract_is_named(
    program: Program, change: Callable[[GraphEditor, torch.fx.Node], None], rewrites: int, text: str
) -> None:
    with pytest.raises(InternalError) as caught:
        Pipeline((Edit(change, rewrites),)).run(program)
    assert caught.value.code == "pass.contract-broken"
    assert caught.value.at == "canonicalize_small"
    assert text in str(caught.value.got)


def test_without_the_checks_a_broken_contract_passes(program: Program) -> None:
    assert Pipeline((Edit(no_stamp),), verify=False).run(program).history[0].rewrites == 1


def test_a_graph_that_does_not_run_is_named(program: Program) -> None:
    with pytest.raises(InternalError) as caught:
        Pipeline((Edit(stale_value_behind),)).run(program)
    assert caught.value.code == "pass.crashed"
    assert caught.value.at == "canonicalize_small"


@dataclass(frozen=True)
class Meddle(Pass):
    """Changes the exported program behind the editor's back."""

    name: ClassVar[str] = "canonicalize_small"
    change: Callable[[Program], Program]

    def run(self, program: Program) -> PassResult:
        edit = GraphEditor(program, self.name)
        sine(edit, named(edit, aten.tanh.default)[0])
        return PassResult(self.change(edit.finish()), 1)


def _rename_input(program: Program) -> Program:
    exported = copy.copy(program.exported)
    node = next(node for node in exported.graph.nodes if node.name == "x")
    node.name = "y"
    exported.graph_signature.input_specs[-1].arg.name = "y"
    return program.replace(exported=exported)


def _drop_value(program: Program) -> Program:
    del next(node for node in program.exported.graph.nodes if node.name == "sin").meta["val"]
    return program


def _reshape_weight(program: Program) -> Program:
    node = next(node for node in program.exported.graph.nodes if node.name == "p_weight")
    node.meta["val"] = node.meta["val"].new_empty(1)
    return program


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_rename_input, "the user inputs changed"),
        (_reshape_weight, "the parameter weight became f64[1]"),
        (_drop_value, "sin has no recorded value"),
    ],
)
def test_a_program_changed_behind_the_editor_is_named(
    program: Program, change: Callable[[Program], Program], text: str
) -> None:
    with pytest.raises(InternalError) as caught:
        Pipeline((Meddle(change),)).run(program)
    assert text in str(caught.value.got)


@dataclass(frozen=True)
class Promise(Edit):
    """Promises that no ``tanh`` is left."""

    name: ClassVar[str] = "remove_tanh"

    def ensures(self, program: Program) -> list[str]:
        targets = {node.target for node in program.exported.graph.nodes}
        return ["a tanh is left"] if aten.tanh.default in targets else []


def test_a_promise_is_checked_on_the_result(program: Program) -> None:
    assert Pipeline((Promise(sine),)).run(program).history[0].rewrites == 1

    def add_one(edit: GraphEditor, tanh: torch.fx.Node) -> None:
        new = edit.call(aten.add.Tensor, (tanh, 1.0), before=tanh.next, like=tanh)
        for user in [user for user in tanh.users if user is not new]:
            edit.reroute(user, tanh, new)

    with pytest.raises(InternalError) as caught:
        Pipeline((Promise(add_one),)).run(program)
    assert caught.value.got == "a tanh is left"


def test_a_crash_names_the_pass_and_those_before_it(program: Program) -> None:
    def crash(*_: object) -> None:
        raise KeyError("boom")

    with pytest.raises(InternalError) as caught:
        Pipeline((RemoveNoops(), CanonicalizeViews(), Edit(crash))).run(program)
    assert caught.value.code == "pass.crashed"
    assert caught.value.got == "KeyError: 'boom' (passes before it: remove_noops, canonicalize_views)"
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_refusal_is_passed_on_as_it_is(program: Program) -> None:
    def refuse(*_: object) -> None:
        raise PassError("structure.example", "no")

    with pytest.raises(PassError) as caught:
        Pipeline((Edit(refuse),)).run(program)
    assert caught.value.code == "structure.example"


def test_history_progress_and_the_program_given(program: Program) -> None:
    text = to_text(program.exported)
    lines: list[str] = []
    after = Pipeline((RemoveNoops(), Edit(sine))).run(program, progress=lines.append)
    assert lines == ["remove_noops: 0 rewrites, 0 declines", "canonicalize_small: 1 rewrites, 0 declines"]
    assert [(record.name, record.rewrites) for record in after.history] == [
        ("remove_noops", 0),
        ("canonicalize_small", 1),
    ]
    assert after.history[1].options["rewrites"] == 1
    assert all(record.seconds > 0 for record in after.history)
    assert to_text(program.exported) == text
    assert program.history == ()


def test_new_nodes_carry_stamp_and_provenance(program: Program) -> None:
    after = Pipeline((Edit(sine),)).run(program)
    node = next(node for node in after.exported.graph.nodes if node.name == "sin")
    assert node.meta["custom"][STAMP] == "canonicalize_small"
    assert "nn_module_stack" in node.meta
    assert where(node) == "sin"
    assert module_path(node) == ""


def test_where_names_the_innermost_module() -> None:
    _, captured_program = captured(Spec())
    node = next(node for node in captured_program.exported.graph.nodes if node.name == "linear_5")
    assert where(node) == "layers.0.mlp.down (linear_5)"


def test_a_decline_is_falsy() -> None:
    decline = Decline("fuse-norm.example", "here", "this", "that")
    assert not decline
    assert decline.as_dict() == {"code": "fuse-norm.example", "at": "here", "want": "this", "got": "that"}


def test_an_input_called_like_a_builtin_keeps_its_name() -> None:
    program = program_of(nn.Sequential(nn.Linear(3, 3), nn.Dropout()).eval(), {"input": torch.randn(2, 3)})
    after = canonical_pipeline().run(program)
    assert after.input_names == program.input_names == ("input",)
    assert_parity(program, after)


def test_the_editor_refuses_what_does_not_fit(program: Program) -> None:
    edit = GraphEditor(program, "test")
    with pytest.raises(ValueError, match="does not fit"):
        edit.set_parameter("weight", torch.ones(4))
    assert edit.free_constant_name("shift") == "shift_0"
    edit.add_constant("shift_0", torch.ones(1))
    assert edit.free_constant_name("shift") == "shift_1"


def test_unused_weights_and_inputs_keep_their_place() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor, _unused: Tensor) -> Tensor:
            return torch.tanh(x * 1.0)

    program = program_of(Module(), {"x": torch.randn(2), "_unused": torch.randn(3)})
    after = RemoveNoops().run(program).program
    assert after.input_names == ("x", "_unused")
    assert "unused" in after.exported.state_dict


@pytest.mark.parametrize("attn_res", [None, "full", "block:2", "block-layers:1"])
@pytest.mark.parametrize("attention", ["op", "decomposed"])
def test_the_standard_pipeline(attn_res: str | None, attention: str) -> None:
    program = program_of(build(Spec(norm="rms-hf", attention="mask", kv_heads=1)), inputs())
    pipeline = standard_pipeline(attn_res=attn_res, attention=attention)  # type: ignore[arg-type]
    after = pipeline.run(program)
    names = [record.name for record in after.history]
    canonical = [step.name for step in canonical_pipeline().passes]
    assert names[: len(canonical)] == canonical
    assert canonical[0] == "remove_noops"
    assert ("lift_attn_res" in names) is (attn_res is not None)
    assert ("legalize_attention" in names) is (attention == "decomposed")
    legal = [name.startswith("legalize_") for name in names]
    assert legal == sorted(legal)  # what targets need comes last
    assert_parity(program, after)
    again = standard_pipeline(attn_res=None, attention=attention).run(after)  # type: ignore[arg-type]
    assert {record.rewrites for record in again.history[len(names) :]} == {0}


def test_a_saved_program_is_the_same(tmp_path: Path) -> None:
    program = standard_pipeline(attn_res="block:2").run(program_of(build(Spec()), inputs()))
    path = tmp_path / "model.pt2"
    program.save(path)
    loaded = torch.export.load(str(path))
    assert to_text(loaded) == to_text(program.exported)
    assert torch.equal(run(program.replace(exported=loaded), inputs())[0], run(program, inputs())[0])
