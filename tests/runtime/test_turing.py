"""Small float32 products written as sums compute the same, and let float16 graphs build for Turing."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from depthwire.artifact import MODEL
from depthwire.errors import BuildError
from depthwire.export.to_onnx import to_onnx
from depthwire.runtime._turing import small_products, without_small_products
from depthwire.runtime.target import load_target
from depthwire.runtime.tensorrt_rtx import build
from depthwire.runtime.tolerances import tolerance
from tests.runtime import engine_models as models
from tests.runtime.precision_models import program
from tests.runtime.test_batch_profile import session, tokens

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="the builder is needed: pip install 'depthwire[rtx]'",
)


def products(model: onnx.ModelProto) -> int:
    nodes = [node for function in model.functions for node in function.node]
    return len([node for node in (*nodes, *model.graph.node) if node.op_type == "MatMul"])


@pytest.mark.parametrize("kind", ["block", "full", "budget"])
def test_sums_compute_what_products_compute(kind: str, tmp_path: Path) -> None:
    model = ir.to_proto(to_onnx(program(kind, torch.float32)))
    onnx.save(model, tmp_path / MODEL)
    small = small_products(tmp_path / MODEL)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    without_small_products(changed, frozenset(small))
    onnx.checker.check_model(changed)
    # What is left are the linear layers and attention; every read, merge and router is a sum.
    assert products(changed) < products(model)
    assert not any(node.op_type == "MatMul" for function in changed.functions for node in function.node)
    for seed in (1, 2):
        ids = tokens(seed)[:1]
        value, found = (session(each).run(None, {"input_ids": ids})[0] for each in (model, changed))
        allowed = tolerance("float32", "logits").allowed(float(np.abs(value).max()))
        assert np.abs(found - value).max() <= allowed


@pytest.mark.parametrize("kind", ["plain", "block", "full", "budget", "top-k"])
def test_a_float16_graph_builds_for_turing(kind: str, tmp_path: Path) -> None:
    ir.save(to_onnx(program(kind, torch.float16)), tmp_path / MODEL)
    info = build(models.artifact_of(tmp_path), load_target("rtx"), compute_capabilities=["SM75"])
    assert info.compute_capabilities == ["SM75"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_other_graphs_do_not(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        ir.save(to_onnx(program("plain", dtype)), folder / MODEL)
        with pytest.raises(BuildError) as caught:
            build(models.artifact_of(folder), load_target("rtx"), compute_capabilities=["SM75"])
        assert caught.value.code == "build.turing-float32", str(caught.value)
