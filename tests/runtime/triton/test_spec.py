"""What a kernel is: its operands, its launch, its name; and what is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch

from depthwire.errors import UsageError
from depthwire.runtime.triton.launch import launch
from depthwire.runtime.triton.spec import KernelSpec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux only")


@pytest.mark.parametrize(
    ("op_type", "inputs", "outputs"),
    [
        ("AttnResRead_2", "query source_0 source_1", "out"),
        ("AttnResAddUnitReadNorm_1", "query norm_weight source_0 delta", "out sum"),
        ("AttnResInter_1", "queries source_0", "out lse"),
        ("AttnResMerge_0", "query inter_out inter_lse", "out"),
        ("AttnResAddMergeNorm_1", "query norm_weight inter_out inter_lse source_0 delta", "out sum"),
    ],
)
def test_the_operands_are_those_of_the_node(op_type: str, inputs: str, outputs: str) -> None:
    spec = KernelSpec(op_type, 64, "float16")
    assert (" ".join(spec.inputs), " ".join(spec.outputs)) == (inputs, outputs)


@pytest.mark.parametrize("op_type", ["AttnResRead_256", "AttnResInter_61", "AttnResAddMergeNorm_9"])
@pytest.mark.parametrize("width", [1, 64, 77, 576, 2048, 2049, 7168, 8192, 16384])
def test_a_launch_covers_the_row_and_the_sources(op_type: str, width: int) -> None:
    spec = KernelSpec(op_type, width, "bfloat16", queries=11)
    plan = spec.launch
    assert width <= plan.block < max(64, 2 * width)
    assert 32 <= 32 * plan.warps <= plan.block
    assert plan.tile * plan.groups >= (spec.count if spec.kind == "inter" else spec.count - 1)
    if spec.kind == "inter":
        assert plan.share * plan.programs >= 11 > plan.share * (plan.programs - 1)
    else:
        assert (plan.share, plan.programs) == (1, 1)
    for size in (plan.block, plan.warps, plan.tile, plan.groups, plan.share):
        assert size & (size - 1) == 0


def test_the_key_holds_every_constant_of_the_kernel() -> None:
    spec = KernelSpec("AttnResReadNorm_9", 576, "float16", eps=1e-6, scale=0.5, last_bias=2.0, norm_eps=1e-5)
    assert spec.key == "AttnResReadNorm_9-d576-fp16-fp32-358637bd-3f000000-40000000-3727c5ac-i0-s1"
    others: list[dict[str, Any]] = [
        {"op_type": "AttnResReadNorm_8"},
        {"width": 577},
        {"dtype": "bfloat16"},
        {"query_dtype": "float16"},
        {"eps": 1e-5},
        {"scale": 1.0},
        {"last_bias": 0.0},
        {"norm_eps": 1e-6},
    ]
    fields: dict[str, Any] = {
        name: getattr(spec, name) for name in ("op_type", "width", "dtype", "eps", "scale", "last_bias", "norm_eps")
    }
    assert KernelSpec(**fields).key == spec.key
    assert len({KernelSpec(**{**fields, **other}).key for other in others} | {spec.key}) == len(others) + 1


def test_what_a_form_does_not_have_is_not_in_its_key() -> None:
    plain = KernelSpec("AttnResRead_9", 576, "float16", eps=1e-6)
    assert KernelSpec("AttnResRead_9", 576, "float16", eps=1e-6, norm_eps=1.0, index=3, queries=7).key == plain.key
    inter = KernelSpec("AttnResInter_9", 576, "float16", eps=1e-6, queries=7)
    assert KernelSpec("AttnResInter_9", 576, "float16", eps=1e-6, queries=7, last_bias=1.0).key == inter.key


@pytest.mark.parametrize(
    ("wrong", "at"),
    [
        ({"op_type": "AttnResRead_0"}, "op_type"),
        ({"op_type": "AttnResAddMerge_0"}, "op_type"),
        ({"op_type": "AttnResRead_257"}, "op_type"),
        ({"op_type": "AttnResAddInter_3"}, "op_type"),
        ({"op_type": "MatMul"}, "op_type"),
        ({"width": 0}, "width"),
        ({"width": 16385}, "width"),
        ({"dtype": "float64"}, "dtype"),
        ({"query_dtype": "int32"}, "query_dtype"),
        ({"index": -1}, "index"),
        ({"queries": 0}, "queries"),
    ],
)
def test_what_no_kernel_computes_is_refused(wrong: dict[str, Any], at: str) -> None:
    with pytest.raises(UsageError) as caught:
        KernelSpec(**{"op_type": "AttnResRead_2", "width": 8, "dtype": "float32", **wrong})
    assert (caught.value.code, caught.value.at) == ("triton.bad-spec", at)


@pytest.mark.parametrize(
    ("place", "tensor", "at"),
    [
        (0, torch.ones(9), "query"),
        (1, torch.ones(2, 8).double(), "source_0"),
        (2, torch.ones(3, 8), "source_1"),
        (2, torch.ones(8, 2).T, "source_1"),
    ],
)
def test_operands_that_do_not_fit_are_refused(place: int, tensor: torch.Tensor, at: str) -> None:
    operands = [torch.ones(8), torch.ones(2, 8), torch.ones(2, 8)]
    operands[place] = tensor
    with pytest.raises(UsageError) as caught:
        launch(KernelSpec("AttnResRead_2", 8, "float32"), operands)
    assert (caught.value.code, caught.value.at) == ("triton.bad-operands", at)


def test_too_few_operands_and_a_missing_row_are_refused() -> None:
    with pytest.raises(UsageError, match=r"triton\.bad-operands"):
        launch(KernelSpec("AttnResRead_2", 8, "float32"), [torch.ones(8), torch.ones(2, 8)])
    inter = (torch.ones(2, 5, 8), torch.ones(2, 5))
    with pytest.raises(UsageError) as caught:
        launch(KernelSpec("AttnResMerge_0", 8, "float32", index=2), [torch.ones(8), *inter])
    assert (caught.value.at, caught.value.want) == ("inter_out", "contiguous torch.float32[3, 5, 8]")


def test_no_rows_need_no_kernel() -> None:
    out = launch(KernelSpec("AttnResRead_1", 8, "float16"), [torch.ones(8), torch.ones(2, 0, 8).half()])
    assert [tuple(tensor.shape) for tensor in out] == [(2, 0, 8)]


def test_triton_is_imported_only_when_a_kernel_is_wanted() -> None:
    modules = ", ".join(f"depthwire.runtime.triton.{name}" for name in ("spec", "launch", "compile", "traffic"))
    done = subprocess.run([sys.executable, "-c", f"import sys, {modules}; print('triton' in sys.modules)"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "False"


def test_the_other_ways_to_launch_a_kernel_divide_the_same_row() -> None:
    for op_type, width in itertools.product(
        ("AttnResRead_9", "AttnResAddMergeNorm_2", "AttnResInter_9"), (64, 577, 8192)
    ):
        spec = KernelSpec(op_type, width, "float16", queries=8)
        first, *others = spec.alternatives
        assert first is spec
        assert len({each.key for each in spec.alternatives}) == len(spec.alternatives)
        for other in others:
            assert 4 <= other.launch.block // (32 * other.launch.warps) <= 32
            assert (other.launch.block, other.inputs, other.outputs) == (spec.launch.block, spec.inputs, spec.outputs)
            assert other.launch.warps in (2 * spec.launch.warps, spec.launch.warps // 2)
    assert len(KernelSpec("AttnResRead_9", 64, "float16").alternatives) == 1
    assert [each.launch.warps for each in KernelSpec("AttnResRead_9", 577, "float16").alternatives] == [4, 8, 2]
    with pytest.raises(UsageError, match=r"triton\.bad-spec"):
        KernelSpec("AttnResRead_9", 64, "float16", warp_factor=3)
