"""What the GPU kernels cost on every architecture: registers, shared memory, spills, and bytes moved.

Compiles each kernel to a cubin, for which no GPU is needed, and reads its resources from the cubin. ``ratio`` is the
number of bytes that a row's sources and outputs move, over the bound of touching each once; ``loads`` counts loads of
sources alone. ``--routing`` does so for the kernels of token routing, a row of the batch. Nothing is run or timed.

Prints one JSON object a kernel and architecture; the last line says how many there were and how many spill.
"""

from __future__ import annotations

import argparse
import json

from depthwire.runtime.triton.compile import CAPABILITIES, Compiled, capability_of, compile_kernel
from depthwire.runtime.triton.routing_spec import RoutingSpec
from depthwire.runtime.triton.routing_traffic import routing_traffic
from depthwire.runtime.triton.spec import DType, KernelSpec
from depthwire.runtime.triton.traffic import Traffic, traffic

WIDTHS = (576, 2048, 4096, 7168, 8192)
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
OPERATORS = {  # number of queries by operator; others have one
    "AttnResRead_9": 1,
    "AttnResAddReadNorm_9": 1,
    "AttnResAddUnitReadNorm_129": 1,
    "AttnResAddMergeNorm_9": 1,
    "AttnResInter_9": 8,
}

TOKENS, SLOTS = 2048, 512  # of a routed block, for the bytes; the cubins serve others too
ROUTING = (
    RoutingSpec("select", block=2048),
    RoutingSpec("select", block=8192),
    RoutingSpec("select", block=16384),
    RoutingSpec("budget", block=2048),
    RoutingSpec("budget"),
    RoutingSpec("gather", row_bytes=1152),
    RoutingSpec("gather", row_bytes=16384),
    RoutingSpec("scatter", row_bytes=1152),
    RoutingSpec("scatter", row_bytes=16384),
    RoutingSpec("sums", width=576, dtype="bfloat16"),
    RoutingSpec("sums", width=4096, dtype="bfloat16"),
    RoutingSpec("rank", window=100),
    *(
        RoutingSpec(kind, width=width, dtype=dtype, kv_heads=kv_heads, group=group, scale=width**-0.5)
        for kind in ("attention", "slot_attention")
        for width, kv_heads, group in ((64, 3, 3), (128, 8, 4))
        for dtype in DTYPES
    ),
)


def resources(compiled: Compiled, moved: Traffic) -> dict[str, object]:
    """Return what a kernel costs, as one line of the output."""
    return {
        "cc": compiled.capability,
        "threads": compiled.threads,
        "registers": compiled.registers,
        "shared": compiled.shared,
        "spills": compiled.spills,
        "cubin": len(compiled.cubin),
        "loads": moved.sources,
        "stores": moved.stores,
        "bound": moved.bound,
        "ratio": round(moved.ratio, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cc", action="append", help="a compute capability; all by default")
    parser.add_argument("--width", action="append", type=int, help="a width; by default 576 to 8192")
    parser.add_argument("--op", action="append", choices=OPERATORS, help="an operator; all by default")
    parser.add_argument("--routing", action="store_true", help="the kernels of token routing instead")
    arguments = parser.parse_args()
    count = spilling = 0
    for routed in ROUTING if arguments.routing else ():
        tokens = max(TOKENS, routed.block, 0 if routed.kind != "budget" or routed.block else 2 * TOKENS)
        for capability in arguments.cc or CAPABILITIES:
            compiled = compile_kernel(routed.on(capability_of(capability)), capability)
            count, spilling = count + 1, spilling + (compiled.spills > 0)
            line = {"kernel": routed.key, "tokens": tokens, "slots": SLOTS}
            line |= resources(compiled, routing_traffic(routed.on(compiled.capability), tokens, SLOTS))
            print(json.dumps(line), flush=True)
    for op_type in () if arguments.routing else arguments.op or OPERATORS:
        for width in arguments.width or WIDTHS:
            for dtype in DTYPES:
                spec = KernelSpec(op_type, width, dtype, eps=1e-6, norm_eps=1e-6, queries=OPERATORS[op_type])
                moved = traffic(spec)
                for capability in arguments.cc or CAPABILITIES:
                    compiled = compile_kernel(spec, capability)
                    count, spilling = count + 1, spilling + (compiled.spills > 0)
                    line = {
                        "op": op_type,
                        "queries": spec.queries,
                        "width": width,
                        "dtype": dtype,
                        **resources(compiled, moved),
                    }
                    print(json.dumps(line), flush=True)
    print(json.dumps({"kernels": count, "spilling": spilling}))


if __name__ == "__main__":
    main()
