"""What routed graphs compute, against counts by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from depthwire.errors import BuildError
from depthwire.export.to_onnx import to_onnx
from depthwire.runtime.accounting import Account, Work, account
from tests.export.tiny import HEADS, VOCABULARY, WIDTH
from tests.routed_tiny import BATCH, LAYERS, ROUTED, TOKENS, routed

if TYPE_CHECKING:
    from pathlib import Path

HEAD = WIDTH // HEADS


def layer_by_hand(tokens: int, keys: int | None = None, mlp_tokens: int | None = None) -> Work:
    """Products of one layer: qkv, attention, its output, two of the MLP; two operations a multiplication."""
    keys = tokens if keys is None else keys
    mlp_tokens = tokens if mlp_tokens is None else mlp_tokens
    linear = 2 * BATCH * tokens * WIDTH * WIDTH * 2 + 2 * BATCH * keys * WIDTH * 2 * WIDTH
    mlp = 2 * BATCH * mlp_tokens * WIDTH * 2 * WIDTH * 2
    attention = 2 * 2 * BATCH * HEADS * tokens * keys * HEAD
    return Work(linear + mlp + attention, attention, 2 * BATCH * keys * WIDTH * 4)


DENSE = layer_by_hand(TOKENS)
HALF = TOKENS // 2
ROUTER = 2 * BATCH * TOKENS * WIDTH


def counted(path: Path, **options: Any) -> Account:
    file = path / "model.onnx"
    ir.save(to_onnx(routed(**options)), file)
    return account(file)


@pytest.mark.parametrize("target", ["op", "decomposed"])
def test_a_routed_block_is_counted_as_by_hand(target: str, tmp_path: Path) -> None:
    # Attention is one operator for one target, and two products around a softmax for the other.
    found = counted(tmp_path, margin=0, target=target)
    assert [layer.layer for layer in found.layers] == list(range(LAYERS))
    for layer in found.layers:
        assert layer.dense == DENSE
        if layer.layer in ROUTED:
            assert (layer.computed, layer.tokens) == (HALF, TOKENS)
            assert layer.spent == layer_by_hand(HALF)
            assert layer.spent.attention_flops * 4 == DENSE.attention_flops
            assert layer.spent.kv_bytes * 2 == DENSE.kv_bytes
            assert layer.routing == ROUTER
            assert layer.ratio == (layer_by_hand(HALF).flops + ROUTER) / DENSE.flops
        else:
            assert (layer.spent, layer.routing, layer.computed) == (DENSE, 0, 0)
    assert found.rest.spent == found.rest.dense == Work(2 * BATCH * TOKENS * WIDTH * VOCABULARY)
    spent = 2 * DENSE.flops + 2 * (layer_by_hand(HALF).flops + ROUTER)
    assert found.layers_ratio == spent / (LAYERS * DENSE.flops)
    assert found.total.dense.flops == LAYERS * DENSE.flops + found.rest.dense.flops


# One linear layer makes queries, keys and values here: all of it runs on all tokens, and again on the selected ones.
TWICE = Work(2 * BATCH * TOKENS * WIDTH * WIDTH + 2 * BATCH * HALF * WIDTH * 2 * WIDTH)

CASES: list[tuple[dict[str, Any], Work]] = [
    ({"unit": "mlp", "margin": 0}, layer_by_hand(TOKENS, mlp_tokens=HALF)),
    ({"unit": "attention", "margin": 0}, layer_by_hand(HALF, mlp_tokens=TOKENS)),
    ({"keys_values": "all", "margin": 0}, layer_by_hand(HALF, keys=TOKENS) + TWICE),
    ({"rule": "top-k", "score": "mod", "gate": "score"}, layer_by_hand(HALF)),
]


@pytest.mark.parametrize(("options", "spent"), CASES, ids=lambda case: str(case)[:40])
def test_what_is_routed_decides_what_is_counted(options: dict[str, Any], spent: Work, tmp_path: Path) -> None:
    for layer in counted(tmp_path, **options).layers:
        assert layer.dense == DENSE
        assert layer.spent == (spent if layer.layer in ROUTED else DENSE)


def test_priors_are_routing_and_not_the_models_own_work(tmp_path: Path) -> None:
    hidden = 2  # d / 16
    prior = 3 * 2 * BATCH * TOKENS * WIDTH * hidden
    found = counted(tmp_path, score="surprise", gate="surprise", fallback="swiglu", margin=0)
    for layer in found.layers:
        assert layer.dense == DENSE
        assert layer.routing == (2 * prior if layer.layer in ROUTED else 0)


def model_of(nodes: list[onnx.NodeProto], **shapes: list[int]) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_empty_tensor_value_info("y")
    graph = helper.make_graph(nodes, "g", inputs, [output])
    domains = [helper.make_opsetid("", 23), helper.make_opsetid("depthwire", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


@pytest.mark.parametrize(
    ("node", "shapes", "flops"),
    [
        (helper.make_node("Gemm", ["a", "b"], ["y"], transA=1), {"a": [5, 3], "b": [5, 7]}, 2 * 3 * 5 * 7),
        (helper.make_node("Conv", ["a", "b"], ["y"]), {"a": [2, 3, 8], "b": [4, 3, 3]}, 2 * 2 * 4 * 6 * 9),
        (helper.make_node("Einsum", ["a", "b"], ["y"], equation="bij,bjk->bik"), {"a": [2, 3, 4], "b": [2, 4, 5]}, 240),
        (
            helper.make_node("Attention", ["a", "b", "c"], ["y"], q_num_heads=4, kv_num_heads=2),
            {"a": [2, 6, 32], "b": [2, 9, 16], "c": [2, 9, 16]},
            2 * 2 * 4 * 6 * 9 * (8 + 8),
        ),
        (helper.make_node("Add", ["a", "b"], ["y"]), {"a": [5, 3], "b": [5, 3]}, 0),
    ],
    ids=["Gemm", "Conv", "Einsum", "Attention", "Add"],
)
def test_every_product_has_its_count(
    node: onnx.NodeProto, shapes: dict[str, list[int]], flops: int, tmp_path: Path
) -> None:
    onnx.save(model_of([node], **shapes), tmp_path / "m.onnx")
    found = account(tmp_path / "m.onnx")
    assert found.total.spent.flops == found.total.dense.flops == flops


def test_products_inside_function_bodies_count(tmp_path: Path) -> None:
    body = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["z"])]
    function = helper.make_function("depthwire", "Twice", ["x", "w"], ["z"], body, [helper.make_opsetid("", 23)])
    model = model_of([helper.make_node("Twice", ["a", "b"], ["y"], domain="depthwire")], a=[6, 4], b=[4, 4])
    model.functions.append(function)
    onnx.save(model, tmp_path / "m.onnx")
    assert account(tmp_path / "m.onnx").total.spent.flops == 2 * 2 * 6 * 4 * 4


def test_a_graph_whose_shapes_are_not_known_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("NonZero", ["a"], ["y"])
    onnx.save(model_of([node], a=[5, 3]), tmp_path / "m.onnx")
    with pytest.raises(BuildError) as raised:
        account(tmp_path / "m.onnx")
    assert raised.value.code == "runtime.shapes"
    (tmp_path / "n.onnx").write_bytes(b"\xff\x00no model")
    with pytest.raises(BuildError):
        account(tmp_path / "n.onnx")
