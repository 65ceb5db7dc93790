"""The routing operators' bodies through TensorRT-RTX: they parse, keep to what TensorRT is quick at, and build."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.onnx_routing import budget_model, gather_model, scatter_model, surprise_model, top_k_model
from tests.routing_cases import (
    MoveCase,
    SelectCase,
    SurpriseCase,
    move_operands,
    select_operands,
    surprise_operands,
)

if TYPE_CHECKING:
    import onnx

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="the builder is needed: pip install 'depthwire[rtx]'",
)

TOP_K_LIMIT = 3840


def build(model: onnx.ModelProto, slots: tuple[int, int, int] | None = None) -> Any:
    """Build for one GPU and return the network; ``slots`` is the profile of a dynamic K."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    if slots is not None:
        profile = builder.create_optimization_profile()
        profile.set_shape("slots", *((count,) for count in slots))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 10_000
    _check(network, trt)
    return network


def _check(network: Any, trt: Any) -> None:
    """No loop, no shape that depends on data, no TopK index in use, no K beyond the limit."""
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    read = {layer.get_input(i).name for layer in layers for i in range(layer.num_inputs) if layer.get_input(i)}
    read |= {network.get_output(i).name for i in range(network.num_outputs)}
    slow = {"TRIP_LIMIT", "RECURRENCE", "ITERATOR", "LOOP_OUTPUT", "CONDITION", "NON_ZERO", "CUMULATIVE", "PLUGIN_V3"}
    assert not {layer.type.name for layer in layers} & slow
    for layer in layers:
        if layer.type == trt.LayerType.TOPK:
            assert layer.get_output(1).name not in read
            assert layer.get_output(0).shape[-1] <= TOP_K_LIMIT


@pytest.mark.parametrize(
    ("tokens", "slots", "window"), [(1, 1, 0), (7, 3, 0), (512, 256, 0), (512, 256, 128), (16384, 8192, 1024)]
)
def test_top_k(tokens: int, slots: int, window: int) -> None:
    case = SelectCase(tokens, slots, 1 if tokens > 7 else 3, window=window)
    network = build(top_k_model(select_operands(case), window))
    assert tuple(network.get_output(0).shape) == (case.batch, slots)


def test_a_top_k_beyond_the_limit_is_what_the_check_is_for() -> None:
    # Teeth: without windows K is 8192 here, which the parser or the check must not let pass.
    with pytest.raises(AssertionError):
        build(top_k_model(select_operands(SelectCase(16384, 8192, 1))))


@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (7, 3), (512, 256), (16384, 8192)])
def test_running_budget(tokens: int, slots: int) -> None:
    case = SelectCase(tokens, slots, 1 if tokens > 7 else 3)
    network = build(budget_model(select_operands(case)))
    assert tuple(network.get_output(0).shape) == (case.batch, slots)


def test_one_engine_takes_several_capacities() -> None:
    operands = select_operands(SelectCase(512, 256))
    for model in (top_k_model(operands, dynamic=True), budget_model(operands, dynamic=True)):
        network = build(model, (64, 256, 512))
        assert tuple(network.get_output(0).shape) == (2, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("tail", [(), (64,), (4, 8)], ids=str)
def test_moves(tail: tuple[int, ...], dtype: torch.dtype) -> None:
    operands = move_operands(MoveCase(64, 32, 2, tail, dtype))
    assert tuple(build(gather_model(operands)).get_output(0).shape) == (2, 32, *tail)
    assert tuple(build(scatter_model(operands)).get_output(0).shape) == (2, 64, *tail)


@pytest.mark.parametrize(
    "case",
    [
        SurpriseCase(1, 64),
        SurpriseCase(512, 64, 1, torch.float16),
        SurpriseCase(64, 64, 2, torch.bfloat16, window=1),
        SurpriseCase(16384, 64, 1),
    ],
    ids=str,
)
def test_surprise(case: SurpriseCase) -> None:
    network = build(surprise_model(surprise_operands(case), case.window))
    assert tuple(network.get_output(0).shape) == (case.batch, case.tokens)
