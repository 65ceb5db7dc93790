"""Quantised programs as ONNX files: standard nodes, packed weights, the program's numbers, and engines of them."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from depthwire.errors import ExportError
from depthwire.export._external_data import inline_small, write_external_data
from depthwire.export._quantized_weights import Int4Tensor, packed
from depthwire.export.to_onnx import to_onnx
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.quantization import QuantizationPlan, calibrate
from depthwire.passes.quantize_linear import DEQUANTIZE, QUANTIZE, QuantizeLinear
from depthwire.passes.standard import canonical_pipeline
from depthwire.runtime.target import load_target
from depthwire.runtime.tensorrt_rtx import build
from depthwire.runtime.tolerances import tolerance
from tests.export.tiny import LENGTH, VOCABULARY, captured, lifted
from tests.passes.parity import named, run, sabotaged
from tests.runtime import engine_models
from tests.zoo import program_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from depthwire.passes._edit import GraphEditor
    from depthwire.program import Program

KINDS = ["int8", "int4-weights"]
# int4 weights are multiplied in fp32, not by kernels that round the activations to 8 bits on the way.
EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}
# Every Q and DQ node computed as it stands: nothing is fused into integer kernels.
LITERAL = {"session.disable_quant_qdq": "1"}


def ids(seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


@functools.cache
def quantized(kind: Any) -> tuple[Program, Program, QuantizationPlan]:
    """Return the lifted decoder, the quantised one, and the plan."""
    program = lifted(captured())
    plan = calibrate(program, [{"input_ids": ids(seed)} for seed in range(2)], kind, block_size=16)
    return program, Pipeline((QuantizeLinear(plan),)).run(program), plan


def written(program: Program, folder: Path) -> Path:
    model = to_onnx(program)
    write_external_data(model, folder / "model.onnx.data")
    inline_small(model)
    ir.save(model, folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return folder / "model.onnx"


def session_of(file: Path, entries: dict[str, str], *more: str) -> onnxruntime.InferenceSession:
    """Open a file; ``more`` are values inside the graph to return as well."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    model = onnx.load(file)
    for name in more:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class _Following(torch.fx.Interpreter):
    """Runs a program with the integers that somebody else rounded its activations to.

    Two programs that differ in the last digits of a value round it apart where it lies between two integers. Then, and
    only then, may the integers differ, and by one.
    """

    def __init__(self, program: Program, integers: dict[str, np.ndarray]) -> None:
        super().__init__(program.exported.graph_module)
        self.integers = integers

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is not QUANTIZE:
            return result
        x, scale = (self.env[each] for each in n.all_input_nodes)
        other = torch.from_numpy(self.integers[n.name])
        quotient = x / scale
        tie = (quotient - quotient.floor() - 0.5).abs()
        apart = (result.int() - other.int()).abs()
        assert int(apart.max()) <= 1
        # A value of at most 127 steps may differ by the tolerance of a hidden value.
        assert float(tie[apart > 0].max() if bool(apart.any()) else 0.0) <= 127 * tolerance("float32", "layer").rtol
        return other


def difference(program: Program, file: Path, entries: dict[str, str]) -> float:
    """Return the largest difference of the logits, relative to the largest, where both round activations alike."""
    rounded = [node.name for node in program.exported.graph.nodes if node.target is QUANTIZE]
    session = session_of(file, entries, *rounded)
    held = {**program.exported.constants, **program.exported.state_dict}
    worst = 0.0
    for seed in range(5, 8):
        found, *integers = session.run(None, {"input_ids": ids(seed).numpy()})
        specs = program.exported.graph_signature.input_specs
        values = [ids(seed) if spec.target is None else held[str(spec.target)] for spec in specs]
        with torch.no_grad():
            run = _Following(program, dict(zip(rounded, integers, strict=True)))
            wanted = run.run(*values)[0].numpy()
        worst = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
    return worst


ALLOWED = tolerance("float32", "logits").rtol


@pytest.mark.parametrize(("kind", "entries"), [("int8", LITERAL), ("int4-weights", LITERAL), ("int4-weights", EXACT)])
def test_onnx_runtime_computes_the_quantised_program(kind: str, entries: dict[str, str], tmp_path: Path) -> None:
    program, after, _ = quantized(kind)
    file = written(after, tmp_path)
    assert difference(after, file, entries) <= ALLOWED
    if kind == "int4-weights":  # quantisation itself shows
        assert difference(program, file, entries) > 10 * ALLOWED


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def test_integer_kernels_compute_a_layer_to_the_last_digits(tmp_path: Path) -> None:
    """Products of integers are summed exactly and scaled once, where the program rounds every product and sum."""
    torch.manual_seed(0)
    x = torch.randn(32, 64)
    program = canonical_pipeline().run(program_of(_Layer(), {"x": x}))
    after = Pipeline((QuantizeLinear(calibrate(program, [{"x": x}], "int8")),)).run(program)
    file = written(after, tmp_path)
    (wanted,) = run(after, x)
    for entries in ({}, LITERAL):
        found = session_of(file, entries).run(None, {"x": x.numpy()})[0]
        assert np.abs(found - wanted.numpy()).max() <= ALLOWED * float(wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_integers_the_way_products_read_them(kind: str, tmp_path: Path) -> None:
    program, after, plan = quantized(kind)
    model = onnx.load(written(after, tmp_path))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in made]
    found = [made[node.input[1]] for node in products if made[node.input[1]].op_type == "DequantizeLinear"]
    assert len(found) == len(plan.weights) == 12
    for (name, weight), node in zip(plan.weights.items(), found, strict=True):
        stored = weights[node.input[0]]
        assert stored.name == f"{name}.int{weight.bits}.T"
        assert stored.data_type == {4: onnx.TensorProto.INT4, 8: onnx.TensorProto.INT8}[weight.bits]
        assert list(stored.dims) == list(weight.values.shape)[::-1]
        assert np.array_equal(onnx.numpy_helper.to_array(stored).astype(np.int8), weight.values.T.numpy())
        scale = onnx.numpy_helper.to_array(weights[node.input[1]])
        assert np.array_equal(scale, weight.scale.numpy().T)
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        assert attributes["axis"] == (0 if weight.block else 1)
        assert attributes.get("block_size", 0) == weight.block
    assert {node.domain for node in model.graph.node if "Quantize" in node.op_type or "quantize" in node.op_type} <= {
        ""
    }
    assert not {"Cast"} & {node.op_type for node in model.graph.node}
    large = {tensor.name for tensor in weights.values() if tensor.data_type == 1 and len(tensor.dims) == 2}
    assert {name for name in large if "scale" not in name} == {"embedding.weight", "head.weight.T"}
    bits = sum(weight.values.numel() * weight.bits for weight in plan.weights.values())
    whole = sum(program.exported.state_dict[name].numel() for name in plan.weights)
    assert bits <= 8 * whole * (1 if kind == "int8" else 6 / 8)  # at most half of int4-weights in 8 bits


def _other_axis(edit: GraphEditor) -> None:
    """A square weight: its scales fit both axes."""
    square = next(node for node in named(edit, DEQUANTIZE) if node.args[2:4] == (0, 0) and _is_square(node))
    edit.set_arg(square, 2, 1)


def _is_square(node: torch.fx.Node) -> bool:
    shape = node.meta["val"].shape
    return len(shape) == 2 and shape[0] == shape[1]


def _other_blocks(edit: GraphEditor) -> None:
    """The blocks of the other axis of a square weight, with as many of them."""
    node = next(node for node in named(edit, DEQUANTIZE) if len(node.args) > 3 and node.args[3] and _is_square(node))
    scale: Any = node.args[1]
    turned = edit.call(torch.ops.aten.t.default, (scale,), before=node, like=node)
    node.update_arg(1, turned)
    edit.set_arg(node, 2, 0)


def _other_scale(edit: GraphEditor) -> None:
    node = next(node for node in named(edit, DEQUANTIZE) if len(node.args) > 2)
    scale: Any = node.args[1]
    edit.set_arg(node, 1, edit.call(torch.ops.aten.mul.Tensor, (scale, 2.0), before=node, like=node))


def _other_input_scale(edit: GraphEditor) -> None:
    node = named(edit, QUANTIZE)[0]
    edit.set_arg(node, 1, edit.call(torch.ops.aten.mul.Tensor, (node.args[1], 2.0), before=node, like=node))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("int8", _other_axis),
        ("int4-weights", _other_blocks),
        ("int8", _other_scale),
        ("int4-weights", _other_scale),
        ("int8", _other_input_scale),
    ],
)
def test_a_file_of_other_scales_is_noticed(kind: str, change: Callable[[GraphEditor], None], tmp_path: Path) -> None:
    _, after, _ = quantized(kind)
    wrong = written(sabotaged(after, change), tmp_path)
    with pytest.raises(AssertionError):
        assert difference(after, wrong, LITERAL) <= ALLOWED


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_two_integers_a_byte_the_first_in_the_low_half(count: int) -> None:
    values = torch.arange(count).remainder(16).sub(8).to(torch.int8)
    tensor = onnx.helper.make_tensor("t", onnx.TensorProto.INT4, [count], values.numpy())
    assert packed(values.numpy()).tobytes() == Int4Tensor(values).tobytes()
    assert Int4Tensor(values).tobytes() == tensor.raw_data or [*Int4Tensor(values).tobytes()] == [*tensor.int32_data]
    assert Int4Tensor(values).numpy().astype(np.int8).tolist() == values.tolist()


@pytest.mark.parametrize("value", [-9, 8])
def test_integers_of_more_than_four_bits_are_refused(value: int) -> None:
    with pytest.raises(ExportError, match=r"export\.int4-range"):
        Int4Tensor(torch.tensor([0, value], dtype=torch.int8), "weight")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install 'depthwire[rtx]'")
@pytest.mark.parametrize("kind", KINDS)
def test_tensorrt_rtx_builds_an_engine(kind: str, tmp_path: Path) -> None:
    _, after, _ = quantized(kind)
    written(after, tmp_path)
    info = build(
        engine_models.artifact_of(tmp_path), load_target("rtx"), compute_capabilities=["SM86", "SM89", "SM120"]
    )
    assert info.compute_capabilities == ["SM86", "SM89", "SM120"]
