"""Compiling kernels to cubins: parameters, resources, spills. No GPU is involved, and nothing is run."""

from __future__ import annotations

import re
import struct
import sys

import pytest

from depthwire.errors import BuildError, UsageError
from depthwire.runtime.triton import compile as compiler
from depthwire.runtime.triton.compile import CAPABILITIES, HIDDEN_PARAMETERS, Compiled, compile_kernel
from depthwire.runtime.triton.spec import DType, KernelSpec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux only")


def check(compiled: Compiled, *, spills: int = 0) -> None:
    """Hold what every compiled kernel must be."""
    spec = compiled.spec
    assert compiled.cubin[:4] == b"\x7fELF"
    assert struct.unpack_from("<H", compiled.cubin, 18)[0] == 190  # EM_CUDA
    assert compiled.symbol.encode() in compiled.cubin
    assert compiled.parameters == (".u64",) * (len(spec.inputs) + len(spec.outputs) + HIDDEN_PARAMETERS)
    assert 0 < compiled.registers <= 255
    assert compiled.registers * compiled.threads <= 65536  # an SM's registers
    assert compiled.spills == spills


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_widest_fused_read_spills_nowhere(capability: str) -> None:
    spec = KernelSpec("AttnResAddUnitReadNorm_9", 8192, "bfloat16", eps=1e-6, norm_eps=1e-6)
    compiled = compile_kernel(spec, capability)
    check(compiled)
    assert compiled.capability == capability
    assert f".target sm_{capability[2:]}" in compiled.ptx
    # The kernel uses neither of triton's own pointers: a launch passes null.
    body = compiled.ptx.partition("\n{")[2]
    hidden = [f"{compiled.symbol}_param_{len(spec.inputs) + len(spec.outputs) + i}" for i in range(HIDDEN_PARAMETERS)]
    assert not any(name in body for name in hidden)
    assert f"{compiled.symbol}_param_0" in body


@pytest.mark.parametrize(
    ("op_type", "width", "dtype", "queries", "capability"),
    [
        ("AttnResRead_2", 8192, "float32", 1, "SM100"),
        ("AttnResRead_9", 77, "float16", 1, "SM75"),
        ("AttnResAddMergeNorm_9", 8192, "float32", 1, "SM87"),
        ("AttnResMerge_0", 576, "float16", 1, "SM110"),
        ("AttnResInter_9", 8192, "float32", 24, "SM120"),
        ("AttnResInter_9", 8191, "float32", 24, "SM87"),
        ("AttnResInter_61", 576, "float16", 8, "SM89"),
        ("AttnResAddUnitReadNorm_129", 7168, "float16", 1, "SM90"),
        ("AttnResAddUnitReadNorm_129", 4096, "bfloat16", 1, "SM110"),
    ],
)
def test_other_kernels_do_not_spill_either(
    op_type: str, width: int, dtype: DType, queries: int, capability: str
) -> None:
    check(compile_kernel(KernelSpec(op_type, width, dtype, eps=1e-6, norm_eps=1e-6, queries=queries), capability))


def test_sources_are_loaded_in_vectors_of_16_bytes_where_rows_allow() -> None:
    compiled = compile_kernel(KernelSpec("AttnResRead_9", 576, "float16", eps=1e-6), "SM87")
    loads = re.findall(r"ld\.global(\S*) ", compiled.ptx)
    # 8 sources in tiles, the last one, and the query: all vectors but none of single elements.
    assert set(loads) == {".v4.b32"}
    odd = compile_kernel(KernelSpec("AttnResRead_9", 77, "float16", eps=1e-6), "SM87")
    assert ".v4.b32" not in re.findall(r"ld\.global(\S*) ", odd.ptx)


def test_the_code_does_not_grow_with_the_number_of_sources() -> None:
    few = compile_kernel(KernelSpec("AttnResRead_18", 576, "float16", eps=1e-6), "SM87")
    many = compile_kernel(KernelSpec("AttnResRead_256", 576, "float16", eps=1e-6), "SM87")
    check(many)
    loads = [len(re.findall(r"ld\.global", compiled.ptx)) for compiled in (few, many)]
    assert loads[0] == loads[1]


def test_bf16_is_rounded_to_nearest() -> None:
    compiled = compile_kernel(KernelSpec("AttnResAddRead_2", 576, "bfloat16", eps=1e-6), "SM80")
    assert "cvt.rn.bf16" in compiled.ptx
    assert not re.search(r"cvt\.r[zmp]\.bf16", compiled.ptx)


def test_a_spill_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_register_limits", lambda _: (32,))
    spec = KernelSpec("AttnResRead_9", 576, "float16", eps=1e-6)
    spilling = compile_kernel(spec, "SM87")
    assert spilling.registers <= 32
    assert spilling.spills > 0


def test_a_kernel_that_spills_is_compiled_again_with_more_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_register_limits", lambda _: (32, 255))
    assert compile_kernel(KernelSpec("AttnResRead_9", 576, "float16", eps=1e-6), "SM87").spills == 0


def test_parameters_that_are_not_the_nodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "HIDDEN_PARAMETERS", 1)
    with pytest.raises(BuildError, match=r"triton\.parameters"):
        compile_kernel(KernelSpec("AttnResRead_2", 64, "float16", eps=1e-6), "SM87")


@pytest.mark.parametrize(
    ("capability", "code"),
    [("SM70", "triton.compute-capability"), ("SM99", "triton.compute-capability"), ("x", "target.bad-compute")],
)
def test_what_cannot_be_compiled_for_is_refused(capability: str, code: str) -> None:
    with pytest.raises(UsageError, match=code):
        compile_kernel(KernelSpec("AttnResRead_2", 64, "float16"), capability)


def test_without_triton_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BuildError, match="depthwire\\[triton\\]") as caught:
        compile_kernel(KernelSpec("AttnResRead_2", 64, "float16"), "SM87")
    assert caught.value.code == "triton.missing"


def test_what_the_compiler_refuses_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_register_limits", lambda _: ("many",))
    with pytest.raises(BuildError) as caught:
        compile_kernel(KernelSpec("AttnResRead_3", 64, "float16"), "SM87")
    assert caught.value.code == "triton.compile-failed"
