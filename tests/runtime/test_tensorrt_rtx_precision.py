"""Engines in every precision of the graph, checked to be what the graph says; engines without weights."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from depthwire.artifact import MODEL, Artifact
from depthwire.errors import BuildError
from depthwire.export.to_onnx import to_onnx
from depthwire.runtime import _build_process as process
from depthwire.runtime._build_errors import refused
from depthwire.runtime._onnx_graph import named_dtypes
from depthwire.runtime.target import load_target
from depthwire.runtime.tensorrt_rtx import FAILED_LOG, build
from tests.runtime import engine_models as models
from tests.runtime.precision_models import program

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="the builder itself is under test: pip install 'depthwire[rtx]'",
)

RTX = load_target("rtx")
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def artifact(folder: Path, kind: str, dtype: torch.dtype) -> Artifact:
    ir.save(to_onnx(program(kind, dtype)), folder / MODEL)
    return models.artifact_of(folder)


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("kind", ["block", "budget", "top-k"])
def test_an_engine_has_the_dtypes_of_its_graph(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = artifact(tmp_path, kind, dtype)
    several = ["SM80", "SM86", "SM89", "SM120"]
    info = build(made, RTX, compute_capabilities=several, max_batch=4 if kind == "budget" else None)
    assert info.compute_capabilities == several
    # Every node's value of the main graph and every weight were found in the network and compared.
    graph = onnx.load(made.model, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type in helper_kinds(dtype)}
    assert info.checked_dtypes >= len(weights) + sum(len(node.output) for node in graph.node)
    share = info.weights[NAMES[dtype]] / sum(info.weights.values())
    assert share > 0.85  # the rest: masks, indices, and what routing computes in float32
    assert info.dtypes[NAMES[dtype]] > 0
    assert Artifact.load(made.root).manifest.engines["rtx"].weights == info.weights


def helper_kinds(dtype: torch.dtype) -> set[int]:
    kinds = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
    return {kinds[dtype]}


def test_the_float16_engine_is_half_as_large(tmp_path: Path) -> None:
    sizes = []
    for dtype in (np.float32, np.float16):
        folder = tmp_path / np.dtype(dtype).name
        folder.mkdir()
        models.transformer(folder, layers=2, width=256, hidden=512, vocabulary=4000, length=32, dtype=dtype)
        sizes.append(build(models.artifact_of(folder), RTX, compute_capabilities=["SM86"]).bytes)
    assert sizes[1] <= 0.55 * sizes[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_stay_quantised(bits: int, tmp_path: Path) -> None:
    kind = TensorProto.INT8 if bits == 8 else TensorProto.INT4
    rng, width = np.random.default_rng(0), 64
    whole = rng.integers(-7, 8, (width, width))
    weight = helper.make_tensor("w", kind, [width, width], whole.reshape(-1).tolist())
    scales = np.full(width if bits == 8 else (width // 32, width), 0.01, np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=1)
        if bits == 8
        else helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    if bits == 8:
        nodes[1].input[0] = "xd"
        nodes.insert(0, helper.make_node("QuantizeLinear", ["x", "t"], ["xq"], output_dtype=TensorProto.INT8))
        nodes.insert(1, helper.make_node("DequantizeLinear", ["xq", "t"], ["xd"]))
    weights = [weight, numpy_helper.from_array(scales, "s"), numpy_helper.from_array(np.array(0.1, np.float32), "t")]
    x, y = models.value("x", 1, 8, width), models.value("y", 1, 8, width)
    models.save(tmp_path / MODEL, nodes, inputs=[x], outputs=[y], weights=weights)
    info = build(models.artifact_of(tmp_path), RTX, compute_capabilities=["SM86"])
    assert info.weights[f"int{bits}"] == width * width * bits // 8


def test_a_network_of_other_dtypes_is_refused_before_it_is_built(tmp_path: Path) -> None:
    models.tiny(tmp_path, dtype=np.float16)
    expected = named_dtypes(tmp_path / MODEL)
    assert set(expected.values()) == {"FLOAT16"}
    assert {"x", "y", "weight", "gain", "m"} <= set(expected)
    request = process.BuildRequest(str(tmp_path / MODEL), str(tmp_path / "e"), ("SM86",), dtypes=expected)
    log = tmp_path / "log"
    assert process.spawn(request, log=log, kept_log=log, estimated_seconds=1).checked == len(expected)
    other = dataclasses.replace(request, dtypes={**expected, "weight": "FLOAT", "gain": "BFLOAT16"})
    with pytest.raises(BuildError) as caught:
        process.spawn(other, log=log, kept_log=log, estimated_seconds=1)
    assert caught.value.code == "build.dtype-mismatch"
    assert caught.value.got == "weight (FLOAT in the graph, HALF); gain (BFLOAT16 in the graph, HALF)"
    assert f"{len(expected)} tensors" in (caught.value.want or "")


def test_an_engine_without_weights_needs_a_gpu_to_be_built(tmp_path: Path) -> None:
    # Where there is a GPU the same request gives an engine; tests/runtime/test_engine.py loads it.
    from depthwire.runtime.deploy.cuda import find_gpu

    if find_gpu()[0] is not None:
        pytest.skip("this machine has a GPU")
    models.tiny(tmp_path)
    made = models.artifact_of(tmp_path)
    with pytest.raises(BuildError) as caught:
        build(made, RTX, compute_capabilities=["SM86"], strip_weights=True, max_batch=2)
    assert caught.value.code == "build.strip-needs-gpu"
    assert caught.value.at == str(made.model)  # not the copy that was built from
    assert "CUDA_SUCCESS" in (caught.value.got or "")
    assert [path.name for path in (tmp_path / "engine/rtx").iterdir()] == [FAILED_LOG]
    assert Artifact.load(tmp_path).manifest.engines == {}
    # The same error without --strip-weights is no such thing, and stays what it is.
    request = process.BuildRequest(str(tmp_path / MODEL), "", ("SM86",))
    final = {"kind": "build", "version": "1", "errors": ["CHECK(status == CUDA_SUCCESS) failed"]}
    assert refused(final, request, log=tmp_path).code == "build.refused"
