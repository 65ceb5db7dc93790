"""Kimi Linear (delta attention, latent attention, sparse experts): from transformers to ONNX Runtime and an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import depthwire
from depthwire.export.capture import capture
from depthwire.export.to_onnx import to_onnx
from depthwire.passes.standard import standard_pipeline
from depthwire.runtime.tolerances import tolerance
from tests.export.kimi_k3 import EXPERTS, LENGTH, TOP_K, KimiK3, kimi_linear, reads, save, tokens

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from depthwire.program import Program

SPARSE = (1, 2)  # the layers whose MLP is sparse
BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"
FORCED = (4, 1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("kimi") / "model")


@pytest.fixture(scope="module")
def program(directory: Path) -> Program:
    return capture(directory, seq_len=LENGTH)


@pytest.fixture(scope="module", params=[None, "block:2"])
def exported(request: pytest.FixtureRequest, program: Program) -> onnx.ModelProto:
    return ir.to_proto(to_onnx(standard_pipeline(attn_res=request.param).run(program)))


def reference() -> Any:
    """The model as its authors run it: a loop over the experts that were hit."""
    model = kimi_linear()
    model.config._experts_implementation = "eager"
    return model


def logits(model: Any, ids: torch.Tensor) -> NDArray[Any]:
    with torch.no_grad():
        result: NDArray[Any] = model(input_ids=ids, use_cache=False).logits.numpy()
    return result


def run(model: onnx.ModelProto, ids: torch.Tensor) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[Any] = session.run(None, {"input_ids": ids.numpy()})[0]
    return result


def assert_close(got: NDArray[Any], wanted: NDArray[Any]) -> None:
    assert float(np.abs(got - wanted).max()) <= tolerance("float32", "logits").allowed(float(np.abs(wanted).max()))


def rows_per_expert(model: Any, ids: torch.Tensor) -> list[list[int]]:
    """How many rows each expert of each sparse layer gets."""
    counts: list[list[int]] = []
    hooks = [
        model.model.layers[index].mlp.gate.register_forward_hook(
            lambda _module, _inputs, outputs: counts.append(
                torch.bincount(outputs[2].flatten(), minlength=EXPERTS).tolist()
            )
        )
        for index in SPARSE
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return counts


def test_parity_on_other_splits_than_the_examples(program: Program, exported: onnx.ModelProto) -> None:
    model = reference()
    examples = rows_per_expert(model, program.example_inputs["input_ids"])
    for ids in (program.example_inputs["input_ids"], tokens(1), tokens(2), torch.full((1, LENGTH), 7)):
        assert_close(run(exported, ids), logits(model, ids))
        same = torch.equal(ids, program.example_inputs["input_ids"])
        assert (rows_per_expert(model, ids) == examples) is same


def test_all_tokens_to_the_same_experts(exported: onnx.ModelProto) -> None:
    """The file as it is, but for the routers' biases: two experts get every token, the others none."""
    bias = np.full(EXPERTS, -10.0, np.float32)
    bias[list(FORCED)] = 10.0
    forced, model = onnx.ModelProto(), reference()
    forced.CopyFrom(exported)
    for index in SPARSE:
        (initializer,) = [item for item in forced.graph.initializer if item.name == BIAS.format(index)]
        initializer.CopyFrom(onnx.numpy_helper.from_array(bias, initializer.name))
        model.model.layers[index].mlp.gate.e_score_correction_bias.copy_(torch.from_numpy(bias))
    ids = tokens(3)
    wanted = [LENGTH if expert in FORCED else 0 for expert in range(EXPERTS)]
    assert rows_per_expert(model, ids) == [wanted] * len(SPARSE)
    assert_close(run(forced, ids), logits(model, ids))
    assert float(np.abs(run(exported, ids) - logits(model, ids)).max()) > 1e-2  # the bias does matter


def test_the_graph_is_small_and_static(exported: onnx.ModelProto) -> None:
    operators = [node.op_type for node in exported.graph.node]
    assert not set(operators) & {"NonZero", "Loop", "Scan", "If", "ScatterND", "Compress", "SequenceAt"}
    scatters = [node for node in exported.graph.node if node.op_type == "ScatterElements"]
    reductions = {field.s for node in scatters for field in node.attribute if field.name == "reduction"}
    assert reductions <= {b"none"}
    assert len(operators) < 500  # the captured program has 1,600 operations
    assert operators.count("TopK") == 3 * len(SPARSE)  # the router's own; none to sort rows


def test_the_passes_found_everything(program: Program) -> None:
    after = standard_pipeline(attn_res="block:2").run(program)
    history = {record.name: record for record in after.history}
    assert history["recognize_triangular_inverse"].rewrites == 1
    assert history["legalize_experts"].rewrites == len(SPARSE)
    assert all(record.declines == () for record in after.history)
    assert TOP_K * LENGTH > EXPERTS  # the dense form


def test_convert_end_to_end(directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    sizes: dict[str, Any] = {"seq_len": LENGTH, "windows": 2, "compute_capabilities": ["SM86"]}
    result = depthwire.convert(directory, tmp_path / "out", attn_res="block:2", target="rtx", **sizes)
    assert result.verdict is not None
    assert result.verdict.passed
    assert (result.artifact.root / "engine/rtx/model.engine").stat().st_size > 0


def test_convert_plain(program: Program, tmp_path: Path) -> None:
    result = depthwire.convert(program, tmp_path / "out", windows=2)
    assert result.verdict is not None
    assert result.verdict.passed


def test_kimi_k3() -> None:
    """The same layers between native depth reads, as K3 spells them."""
    model = KimiK3().eval()
    captured = capture(model, example_inputs={"input_ids": tokens(0)})
    after = standard_pipeline(attn_res=None).run(captured)
    proto = ir.to_proto(to_onnx(after))
    for seed in range(2):
        with torch.no_grad():
            wanted = model(tokens(seed)).numpy()
        assert_close(run(proto, tokens(seed)), wanted)
    found = [node for node in after.exported.graph.nodes if str(node.target).startswith("depthwire.attn_res_read")]
    assert len(found) == reads(len(model.layers))
