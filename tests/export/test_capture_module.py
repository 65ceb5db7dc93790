"""Modules in memory: what the graph promises, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from depthwire.errors import CaptureError, UsageError
from depthwire.export.capture import capture

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# --- modules: inputs and outputs -------------------------------------------------------------------------------------


class Function(nn.Module):
    """A module whose forward is a given function of one tensor."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Named(NamedTuple):
    first: Tensor
    second: Tensor | None


class Difference(nn.Module):
    """Two inputs that are not exchangeable."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x - 2 * y


def test_one_tensor_for_two_inputs_is_two_inputs() -> None:
    ones, two, three = (torch.full((2,), value) for value in (1.0, 2.0, 3.0))
    for examples in ({"x": ones, "y": ones}, (ones, ones)):
        program = capture(Difference(), example_inputs=examples)
        assert torch.equal(program.module()(two, three), two - 2 * three)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x + 1, ("output_0",)),
        (lambda x: (x + 1, x + 2), ("output_0", "output_1")),
        (lambda x: [x + 1, None, x + 2], ("output_0", "output_2")),
        (lambda x: {"a": x + 1, "b": None, "c": (x + 2, x + 3)}, ("a", "c_0", "c_1")),
        (lambda x: {"a b": x + 1, "a_b": x + 2}, ("a_b", "a_b_1")),
        (lambda x: Named(x + 1, x + 2), ("first", "second")),
        (lambda x: (x + 1, {"deep": [x + 2]}), ("output_0", "output_1_deep_0")),
    ],
)
def test_outputs_are_flat_and_named(function: Callable[[Tensor], Any], names: tuple[str, ...]) -> None:
    program = capture(Function(function), example_inputs={"x": torch.zeros(2)})
    assert program.output_names == names
    outputs = program.module()(torch.zeros(2))
    values = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    assert [int(value[0]) for value in values] == list(range(1, len(names) + 1))


def test_an_output_that_is_an_input_or_another_output_gets_its_own_value() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x + 1
        return x, y, y

    program = capture(Function(function), example_inputs=(torch.zeros(2),))
    assert len(set(program.output_nodes)) == 3
    assert not set(program.output_nodes) & set(program.input_names)


@pytest.mark.parametrize(
    "function", [lambda _: None, lambda _: (), lambda x: (x + 1, 3), lambda x: {"a": "text", "b": x}]
)
def test_outputs_that_are_no_tensors(function: Callable[[Tensor], Any]) -> None:
    with pytest.raises(CaptureError) as raised:
        capture(Function(function), example_inputs=(torch.zeros(2),))
    assert raised.value.code == "capture.non-tensor"


class Keywords(nn.Module):
    def forward(self, x: Tensor, *more: Tensor, scale: Tensor, bias: Tensor | None = None, **rest: Tensor) -> Tensor:
        total = sum(more, x) * scale
        return total if bias is None else total + bias + rest["extra"]


def test_every_kind_of_parameter() -> None:
    tensors = {
        name: torch.full((2,), value) for name, value in (("extra", 1.0), ("bias", 2.0), ("x", 3.0), ("scale", 4.0))
    }
    program = capture(Keywords(), example_inputs=tensors)
    assert set(program.input_names) == {"x", "scale", "bias", "extra"}
    ordered = [program.example_inputs[name] for name in program.input_names]
    assert [float(value[0]) for value in ordered] == [
        {"x": 3, "scale": 4, "bias": 2, "extra": 1}[name] for name in program.input_names
    ]


@pytest.mark.parametrize(
    "inputs", [{}, (), {"y": torch.ones(1)}, (torch.ones(1), torch.ones(1)), {"x": 3}, (3,), [torch.ones(1)], "text"]
)
def test_inputs_that_do_not_fit(inputs: Any) -> None:
    with pytest.raises(UsageError) as raised:
        capture(Function(lambda x: x + 1), example_inputs=inputs)
    assert raised.value.code == "capture.example-inputs"


def test_a_module_without_inputs() -> None:
    with pytest.raises(CaptureError) as raised:
        capture(nn.Linear(2, 2))
    assert raised.value.code == "capture.no-example-inputs"


@pytest.mark.parametrize("source", ["", 3, None, b"model"])
def test_sources_that_are_none(source: Any) -> None:
    with pytest.raises(UsageError) as raised:
        capture(source)
    assert raised.value.code == "capture.source"


# --- modules: what the graph promises --------------------------------------------------------------------------------


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        kept: Tensor = self.drop(self.norm(x))
        kept += 1
        return kept


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.inner(x)
        with torch.enable_grad():
            z: Tensor = y * self.scale
        return z


def test_the_graph_is_functional_flat_and_in_eval_mode_and_the_module_unchanged() -> None:
    module = Outer().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    program = capture(module, example_inputs=(torch.full((2, 3), 2.0),))
    nodes = list(program.exported.graph.nodes)
    assert all(node.op != "get_attr" for node in nodes)
    schemas = [getattr(node.target, "_schema", None) for node in nodes if node.op == "call_function"]
    assert not any(schema.is_mutable for schema in schemas if schema is not None)
    assert not any("dropout" in str(node.target) and node.args[-1] for node in nodes)
    assert all(node.meta["nn_module_stack"] for node in nodes if node.op == "call_function")
    assert module.training
    assert module.inner.drop.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert isinstance(program.exported.state_dict["scale"], nn.Parameter)
    expected = (torch.full((2, 3), 2.0) / (1 + 1e-5) ** 0.5) + 1
    torch.testing.assert_close(program.module()(torch.full((2, 3), 2.0)), expected)


def test_a_functional_graph_is_not_decomposed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("run_decompositions costs seconds and is not needed here")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", never)
    capture(nn.Linear(2, 2), example_inputs=(torch.ones(1, 2),))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("seen").add_(1)
        return x + self.get_buffer("seen")


def test_buffers_that_are_written() -> None:
    module = Counts()
    with pytest.raises(CaptureError) as raised:
        capture(module, example_inputs=(torch.ones(1),))
    assert raised.value.code == "capture.mutates-state"
    assert raised.value.at == "seen"
    assert module.get_buffer("seen").item() == 0


def test_inputs_that_are_written() -> None:
    with pytest.raises(CaptureError) as raised:
        capture(Function(lambda x: x.add_(1) * 2), example_inputs=(torch.ones(1),))
    assert raised.value.code == "capture.mutates-state"


# --- modules: what torch.export refuses ------------------------------------------------------------------------------


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(2, 2), Branches())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


def test_control_flow_on_values_names_the_module_and_the_line() -> None:
    with pytest.raises(CaptureError) as raised:
        capture(Holds(), example_inputs=(torch.ones(1, 2),))
    error = raised.value
    assert error.code == "capture.export-refused"
    assert str(error.at).startswith("block.1 at ")
    assert "test_capture_module.py" in str(error.at)
    assert "if x.sum() > 0:" in str(error.at)
    assert "data-dependent" in str(error.got)
    assert "torch.where" in str(error.todo)
    assert "\n" not in str(error.got)


def test_an_exception_in_forward_names_the_module_and_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError) as raised:
        capture(Holds(), example_inputs=(torch.ones(1, 3),))
    assert raised.value.code == "capture.export-refused"
    assert "out: Tensor = self.block(x)" in str(raised.value.at)
    # torch logs each failure with its traceback; one error is enough.
    assert capfd.readouterr().err == ""


def test_sizes_that_depend_on_values() -> None:
    with pytest.raises(CaptureError) as raised:
        capture(Function(lambda x: x[x > 0]), example_inputs=(torch.ones(3),))
    assert raised.value.code in ("capture.dynamic-shapes", "capture.export-refused")


def test_torchscript_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))  # type: ignore[no-untyped-call]
    with pytest.raises(CaptureError) as raised:
        capture(scripted, example_inputs=(torch.ones(1, 2),))
    assert raised.value.code == "capture.export-refused"


def test_a_forward_patched_on_the_instance_is_refused() -> None:
    module = nn.Linear(2, 2)
    module.forward = lambda input: input  # type: ignore[method-assign]  # noqa: A006
    with pytest.raises(UsageError) as raised:
        capture(module, example_inputs=(torch.ones(1, 2),))
    assert raised.value.code == "capture.patched-forward"


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_given_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(CaptureError) as raised:
        capture(tmp_path / name)
    assert raised.value.code == "capture.pickle-checkpoint"


def test_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"anything")
    with pytest.raises(CaptureError) as raised:
        capture(tmp_path / "model.onnx")
    assert raised.value.code == "capture.unsupported-file"
