"""Compiling the routing kernels to cubins: parameters, resources, spills. No GPU is involved, and nothing is run."""

from __future__ import annotations

import re
import sys

import pytest

from depthwire.runtime.triton.compile import CAPABILITIES, HIDDEN_PARAMETERS, Compiled, compile_kernel
from depthwire.runtime.triton.routing_spec import RoutingKind, RoutingSpec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux only")

# What a launch may ask for without the kernel's attribute being set; and what every GPU since 7.5 has. Triton's own
# launcher, the only one of attention, sets the attribute.
UNASKED_MEMORY, SHARED_MEMORY = 48 * 1024, 64 * 1024


def checked(spec: RoutingSpec, capability: str) -> Compiled:
    """Compile, and hold what every compiled kernel must be."""
    compiled = compile_kernel(spec, capability)
    pointers = (".u64",) * (len(spec.inputs) + len(spec.outputs))
    assert compiled.parameters == pointers + (".u32",) * len(spec.scalars) + (".u64",) * HIDDEN_PARAMETERS
    # Triton's own pointers are not used: a launch passes null.
    body, used = compiled.ptx.partition("\n{")[2], len(compiled.parameters)
    assert not any(f"_param_{used - 1 - hidden}]" in body for hidden in range(HIDDEN_PARAMETERS))
    assert compiled.registers * compiled.threads <= 65536
    assert compiled.shared <= (SHARED_MEMORY if spec.attends else UNASKED_MEMORY)
    assert compiled.spills == 0
    assert compiled.programs >= 1
    return compiled


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_of_every_kind_spill_nowhere(capability: str) -> None:
    for spec in (
        RoutingSpec("select", block=512),
        RoutingSpec("budget", block=512),
        RoutingSpec("gather", row_bytes=1152),
        RoutingSpec("scatter", row_bytes=1152),
        RoutingSpec("sums", width=576, dtype="bfloat16"),
        RoutingSpec("rank", window=100),
        RoutingSpec("attention", width=128, dtype="bfloat16", kv_heads=8, group=4).on(capability),
    ):
        checked(spec, capability)


@pytest.mark.parametrize(
    ("spec", "capability"),
    [
        (RoutingSpec("select", block=4096, window=4096), "SM87"),
        (RoutingSpec("select", block=8192), "SM120"),
        (RoutingSpec("budget"), "SM87"),
        (RoutingSpec("budget"), "SM120"),
        (RoutingSpec("gather", row_bytes=1), "SM110"),
        (RoutingSpec("scatter", row_bytes=1), "SM75"),
        (RoutingSpec("scatter", row_bytes=32768), "SM90"),
        (RoutingSpec("sums", width=8192), "SM87"),
        (RoutingSpec("rank", window=1, dtype="bfloat16"), "SM89"),
        (RoutingSpec("slot_attention", width=64, kv_heads=3, group=3), "SM87"),
        (RoutingSpec("slot_attention", width=80, dtype="float16", kv_heads=2, group=1), "SM110"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.key,
)
def test_other_kernels_do_not_spill_either(spec: RoutingSpec, capability: str) -> None:
    checked(spec, capability)


def test_tokens_are_moved_in_vectors_of_16_bytes_where_they_allow() -> None:
    kinds: tuple[RoutingKind, ...] = ("gather", "scatter")
    for kind in kinds:
        ptx = compile_kernel(RoutingSpec(kind, row_bytes=1152), "SM87").ptx
        assert {".v4.b32"} == set(re.findall(r"st\.global(\S*) ", ptx))
        odd = compile_kernel(RoutingSpec(kind, row_bytes=154), "SM87").ptx
        assert set(re.findall(r"st\.global(\S*) ", odd)) == {".b16"}


def test_halves_are_multiplied_by_tensor_cores_but_on_7_5() -> None:
    spec = RoutingSpec("attention", width=64, dtype="float16", kv_heads=3, group=3)
    for capability, instruction in (("SM80", "mma.sync"), ("SM90", "wgmma.mma_async"), ("SM120", "mma.sync")):
        assert spec.on(capability) == spec
        assert instruction in compile_kernel(spec, capability).ptx
    assert spec.on("SM75").key == spec.key + "-fma"
    assert "mma." not in compile_kernel(spec.on("SM75"), "SM75").ptx
