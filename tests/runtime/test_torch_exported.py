"""The torch runner and the interpreter behind layer comparison."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from polygraphy import config
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER
from torch import nn

from depthwire.errors import BuildError, InternalError, UsageError
from depthwire.runtime import torch_exported
from depthwire.runtime.torch_exported import TorchExportedRunner, node_names, run_nodes, to_numpy, to_tensor
from tests.runtime.helpers import LENGTH, VOCABULARY, Tiny, capture, copied, tiny_program

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from depthwire.program import Program


@pytest.fixture(scope="module")
def program() -> Program:
    return tiny_program()


@pytest.fixture
def window() -> dict[str, NDArray[Any]]:
    return {"input_ids": np.random.default_rng(3).integers(0, VOCABULARY, (1, LENGTH))}


def test_the_runner_gives_the_modules_numbers(program: Program, window: dict[str, NDArray[Any]]) -> None:
    with TorchExportedRunner(program, name="t") as runner:
        outputs = runner.infer(window)
        assert runner.last_inference_time() > 0
    assert list(outputs) == ["logits"]
    with torch.no_grad():
        reference = Tiny().eval()
        reference.load_state_dict(dict(program.exported.state_dict))
        expected = reference(torch.tensor(window["input_ids"]))
    np.testing.assert_allclose(outputs["logits"], expected.numpy(), rtol=0, atol=1e-6)
    assert outputs["logits"].dtype == np.float32


def test_the_runner_describes_its_inputs(program: Program) -> None:
    with TorchExportedRunner(program, name="t") as runner:
        metadata = runner.get_input_metadata(use_numpy_dtypes=False)
    assert [(name, str(m.dtype), list(m.shape)) for name, m in metadata.items()] == [("input_ids", "int64", [1, 12])]


def test_polygraphy_runs_it_and_its_state_is_clean(
    program: Program, window: dict[str, NDArray[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "INTERNAL_CORRECTNESS_CHECKS", True)  # raises if deactivation leaves anything behind
    with G_LOGGER.verbosity():
        results = Comparator.run([TorchExportedRunner(program, name="t")], data_loader=[window, window])
    assert list(results.keys()) == ["t"]
    first, second = results["t"]
    np.testing.assert_array_equal(first["logits"], second["logits"])


def test_deactivation_lets_the_module_go(program: Program) -> None:
    runner = TorchExportedRunner(program, name="t")
    runner.activate()
    module = weakref.ref(runner._module)
    runner.deactivate()
    gc.collect()  # graph modules are cyclic; what holds the memory, the weights, is the program's anyway
    assert module() is None


def test_the_module_shares_the_programs_weights(program: Program) -> None:
    with TorchExportedRunner(program, name="t") as runner:
        held = {tensor.data_ptr() for tensor in runner._module.state_dict().values()}
    assert held == {tensor.data_ptr() for tensor in program.exported.state_dict.values()}


def test_a_node_that_no_exported_program_has_is_our_bug(program: Program, window: dict[str, NDArray[Any]]) -> None:
    exported = copied(program.exported)
    last = next(node for node in exported.graph.nodes if node.name == "linear_1")
    with exported.graph.inserting_after(last):
        exported.graph.call_method("relu", (last,)).name = "odd"
    with pytest.raises(InternalError) as caught:
        run_nodes(program.replace(exported=exported), window, ["odd"])
    assert caught.value.code == "verify.node-kind"


def test_a_failure_of_torch_is_ours(program: Program) -> None:
    outside = {"input_ids": np.full((1, LENGTH), VOCABULARY)}
    with TorchExportedRunner(program, name="original") as runner, pytest.raises(BuildError) as caught:
        runner.infer(outside)
    assert caught.value.code == "verify.torch-failed"
    assert caught.value.at == "original (Tiny)"
    assert caught.value.__cause__ is not None


class Two(nn.Module):
    """Two inputs given in another order than named, a constant argument, two outputs, a buffer of its own."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([1.0, 2.0]), persistent=False)

    def forward(self, *, b: torch.Tensor, a: torch.Tensor, scale: float = 2.0) -> dict[str, torch.Tensor]:
        """[2] and [2] to the same."""
        top = torch.topk(a - b + self.shift, 1)
        return {"difference": a - b, "index": top.indices, "scaled": (a * scale).to(torch.bfloat16)}


def test_several_inputs_outputs_and_dtypes() -> None:
    inputs = {"a": torch.tensor([5.0, 7.0]), "b": torch.tensor([1.0, 2.0])}
    program = capture(Two(), inputs, ("difference", "index", "scaled"))
    with TorchExportedRunner(program, name="t") as runner:
        outputs = runner.infer({name: value.numpy() for name, value in inputs.items()})
    assert outputs["difference"].tolist() == [4.0, 5.0]
    assert outputs["index"].tolist() == [1]
    assert outputs["index"].dtype == np.int64
    assert outputs["scaled"].dtype == ml_dtypes.bfloat16
    assert outputs["scaled"].astype(np.float32).tolist() == [10.0, 14.0]
    values = run_nodes(program, {name: value.numpy() for name, value in inputs.items()}, ["sub"])
    assert values["sub"].tolist() == [4.0, 5.0]


def test_wrong_output_names_are_our_bug() -> None:
    inputs = {"a": torch.ones(2), "b": torch.ones(2)}
    program = capture(Two(), inputs, ("difference", "index"))
    with TorchExportedRunner(program, name="t") as runner, pytest.raises(InternalError) as caught:
        runner.infer({name: value.numpy() for name, value in inputs.items()})
    assert caught.value.code == "verify.outputs"


def test_intermediate_values_are_the_modules(program: Program, window: dict[str, NDArray[Any]]) -> None:
    model = Tiny().eval()
    model.load_state_dict(dict(program.exported.state_dict))
    seen: dict[str, torch.Tensor] = {}
    hooked = {"layer_norm_5": "blocks.2.norm2", "linear_7": "blocks.1.mlp"}
    for name, path in hooked.items():
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        model(torch.tensor(window["input_ids"]))
    values = run_nodes(program, window, ["layer_norm_5", "linear_7"])
    assert list(values) == ["layer_norm_5", "linear_7"]
    for name, expected in seen.items():
        np.testing.assert_allclose(values[name], expected.numpy(), rtol=0, atol=1e-5)


def test_every_named_node_can_be_had_and_nothing_else_lingers(
    program: Program, window: dict[str, NDArray[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(node_names(program) - {node.name for node in program.exported.graph.nodes if node.op == "output"})
    assert list(run_nodes(program, window, names)) == names
    held: list[int] = []
    inner = torch_exported._evaluate

    def counting(program: Program, node: Any, values: Any, placeholders: Any) -> Any:
        held.append(sum(n.op != "placeholder" for n in values))
        return inner(program, node, values, placeholders)

    monkeypatch.setattr(torch_exported, "_evaluate", counting)
    run_nodes(program, window, ["linear_15"])
    assert len(held) > 60
    assert max(held) <= 7, "a residual, the parts of a split and what is made of them; not the whole graph"


def test_only_ancestors_are_computed(program: Program, window: dict[str, NDArray[Any]]) -> None:
    broken = {"input_ids": window["input_ids"]}
    order = torch_exported._ancestors(program.exported.graph, {"linear_1": None})
    assert "linear_16" not in {node.name for node in order}
    assert run_nodes(program, broken, []) == {}


@pytest.mark.parametrize(("name", "got"), [("linear_99", "no node of that name"), ("split", "a tuple")])
def test_what_is_no_tensor_cannot_be_had(
    program: Program, window: dict[str, NDArray[Any]], name: str, got: str
) -> None:
    assert name not in node_names(program)
    with pytest.raises(UsageError) as caught:
        run_nodes(program, window, [name])
    assert (caught.value.code, caught.value.at) == ("verify.no-such-node", name)
    assert caught.value.got in {got, "a list"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_arrays_and_tensors_convert_both_ways(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 2]]).to(dtype)
    array = to_numpy(tensor)
    array.setflags(write=False)  # as arrays from files are
    assert torch.equal(to_tensor(array), tensor)
    assert str(dtype) == f"torch.{array.dtype.name}"
