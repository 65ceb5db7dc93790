"""Calls that cannot be meant: each is an error of ONNX Runtime that names the operator and the input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.attn_res_cases import Case, TwoPhaseCase, operands, two_phase_operands
from tests.runtime.native.one_node import Node, read_node, run, two_phase_nodes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

WIDTH = 64
CASE = Case(3, WIDTH, rows=5, norm=True, add=True)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


READS: dict[str, tuple[str, Tensor, str]] = {
    "a query of rank 2": ("query", zeros(1, WIDTH), r"'query' is float \[1, 64\], wanted float \[64\]"),
    "a query too long": ("query", zeros(WIDTH + 1), r"'query' is float \[65\]"),
    "a query of another type": ("query", zeros(WIDTH, dtype=torch.float64), r"'query' is double \[64\]"),
    "a gain too short": ("norm_weight", zeros(WIDTH - 1), r"'norm_weight' is float \[63\], wanted"),
    "a source of another width": ("source_1", zeros(5, 63), r"'source 1' is float \[5, 63\], wanted float \[5, 64\]"),
    "a source of another length": (
        "source_2",
        zeros(4, WIDTH),
        r"'source 2' is float \[4, 64\], wanted float \[5, 64\]",
    ),
    "a source of another rank": ("source_1", zeros(1, 5, WIDTH), r"'source 1' is float \[1, 5, 64\]"),
    "a source of another dtype": ("source_1", zeros(5, WIDTH, dtype=torch.float16), r"'source 1' is float16 \[5, 64\]"),
    "a scalar for a source": ("source_0", zeros(), r"'source 0' is float \[\], wanted \[\.\.\., width\]"),
    "no width": ("source_0", zeros(5, 0), r"'source 0' is float \[5, 0\], wanted \[\.\.\., width\]"),
    "fp64 sources": (
        "source_0",
        zeros(5, WIDTH, dtype=torch.float64),
        r"'source 0' is double .* wanted float,",
    ),
    "a delta of another length": ("delta", zeros(6, WIDTH), r"'delta' is float \[6, 64\], wanted float \[5, 64\]"),
    "a delta of another dtype": ("delta", zeros(5, WIDTH, dtype=torch.bfloat16), r"'delta' is bfloat16 \[5, 64\]"),
}


@pytest.mark.parametrize("name", READS)
def test_a_read(name: str) -> None:
    node = read_node(CASE, operands(CASE))
    place, tensor, message = READS[name]
    node.inputs[place] = tensor
    with pytest.raises(Exception, match=rf"depthwire AttnResAddReadNorm_3: input {message}"):
        run([node], dynamic=True)


MERGES: dict[str, tuple[str, Tensor, str]] = {
    "a mean without rows": ("inter_out", zeros(WIDTH), r"'inter_out' is float \[64\], wanted \[S, \.\.\., width\]"),
    "a mean of other rows": ("inter_out", zeros(4, 2, WIDTH), r"'inter_lse' is float \[4, 3\], wanted float \[4, 2\]"),
    "a logsumexp of fp16": ("inter_lse", zeros(4, 3, dtype=torch.float16), r"'inter_lse' is float16 \[4, 3\]"),
    "a logsumexp of another rank": (
        "inter_lse",
        zeros(4, 3, 1),
        r"'inter_lse' is float \[4, 3, 1\], wanted float \[4, 3\]",
    ),
    "a source of another length": (
        "source_0",
        zeros(2, WIDTH),
        r"'source 0' is float \[2, 64\], wanted float \[3, 64\]",
    ),
}


def merge_node() -> Node:
    case = TwoPhaseCase(2, 4, 2, WIDTH, index=3)
    _, node = two_phase_nodes(case, *two_phase_operands(case))
    node.inputs |= {"inter_out": zeros(4, 3, WIDTH), "inter_lse": zeros(4, 3)}
    return node


@pytest.mark.parametrize("name", MERGES)
def test_a_merge(name: str) -> None:
    node = merge_node()
    place, tensor, message = MERGES[name]
    node.inputs[place] = tensor
    with pytest.raises(Exception, match=rf"depthwire AttnResMerge_2: input {message}"):
        run([node], dynamic=True)


@pytest.mark.parametrize("index", [-1, 4, 2**40])
def test_an_index_out_of_range(index: int) -> None:
    node = merge_node()
    node.attributes["index"] = index
    with pytest.raises(Exception, match=f"'index' is {index}, and input 'inter_out' is .*no such row"):
        run([node])


@pytest.mark.parametrize("shape", [(WIDTH,), (0, WIDTH), (2, WIDTH + 1), (1, 2, WIDTH), (4097, WIDTH)], ids=str)
def test_queries_of_phase_1(shape: tuple[int, ...]) -> None:
    inputs = {"queries": zeros(*shape), "source_0": zeros(3, WIDTH)}
    node = Node("AttnResInter_1", inputs, {"eps": 1e-6, "scale": 1.0}, ("out", "lse"))
    with pytest.raises(Exception, match=r"AttnResInter_1: input 'queries' is float \[.*, wanted float \[S, 64\]"):
        run([node], dynamic=True)


def drop(name: str) -> Callable[[Node], object]:
    return lambda node: node.inputs.pop(name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("source_2"), "has 5 inputs, wanted 6"),
        (drop("delta"), "has 5 inputs, wanted 6"),
        (lambda node: node.attributes.pop("eps"), "has no attribute 'eps'"),
        (lambda node: node.attributes.pop("norm_eps"), "has no attribute 'norm_eps'"),
    ],
    ids=["a source is missing", "delta is missing", "no eps", "no norm_eps"],
)
def test_a_node_that_is_incomplete(spoil: Callable[[Node], object], message: str) -> None:
    node = read_node(CASE, operands(CASE))
    spoil(node)
    with pytest.raises(Exception, match=f"depthwire AttnResAddReadNorm_3: {message}"):
        run([node])


def test_a_merge_without_its_index() -> None:
    node = merge_node()
    del node.attributes["index"]
    with pytest.raises(Exception, match="AttnResMerge_2: has no attribute 'index'"):
        run([node])


def test_no_sources_at_all() -> None:
    with pytest.raises(Exception, match="no operator 'AttnResRead_0'"):
        run([Node("AttnResRead_0", {"query": zeros(WIDTH)}, {"eps": 1e-6, "scale": 1.0})])
