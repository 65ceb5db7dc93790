"""What the GPU kernels cost on every architecture: registers, shared memory, spills, and bytes moved.

Compiles each kernel to a cubin, for which no GPU is needed, and reads its resources from the cubin. ``ratio`` is the
number of bytes that a row's sources and outputs move, over the bound of touching each once; ``loads`` counts loads of
sources alone. Nothing is run or timed.

Prints one JSON object a kernel and architecture; the last line says how many there were and how many spill.
"""

from __future__ import annotations

import argparse
import json

from depthwire.runtime.triton.compile import CAPABILITIES, compile_kernel
from depthwire.runtime.triton.spec import DType, KernelSpec
from depthwire.runtime.triton.traffic import traffic

WIDTHS = (576, 2048, 4096, 7168, 8192)
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
OPERATORS = {  # number of queries by operator; others have one
    "AttnResRead_9": 1,
    "AttnResAddReadNorm_9": 1,
    "AttnResAddUnitReadNorm_129": 1,
    "AttnResAddMergeNorm_9": 1,
    "AttnResInter_9": 8,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cc", action="append", help="a compute capability; all by default")
    parser.add_argument("--width", action="append", type=int, help="a width; by default 576 to 8192")
    parser.add_argument("--op", action="append", choices=OPERATORS, help="an operator; all by default")
    arguments = parser.parse_args()
    count = spilling = 0
    for op_type in arguments.op or OPERATORS:
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
                    print(json.dumps(line), flush=True)
    print(json.dumps({"kernels": count, "spilling": spilling}))


if __name__ == "__main__":
    main()
