"""What the plugins of a model cost on every GPU that a device target has: parameters, registers, spills, form.

Compiles every launch of every operator of ONNX files for each compute capability, for which no GPU is needed, checks
that the cubin takes exactly what TensorRT passes, and reads its resources. Nothing is run or timed.

Prints one JSON object a file and capability; the last line says how many kernels there were and how many spill.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import onnx

from depthwire.errors import BuildError
from depthwire.runtime.triton.plugin_operators import plugin_operators, tactics_of
from depthwire.runtime.triton.plugin_ptx import PluginCode, entry_parameters, plugin_code

CAPABILITIES = ("SM80", "SM86", "SM87", "SM89", "SM90", "SM100", "SM110", "SM121")
"""Of the Jetson boards, the data-centre GPUs and DGX Spark (``depthwire targets``)."""


def compiled(model: Path, capability: str) -> tuple[list[PluginCode], int]:
    """Return the kernels of a file, and how many launches besides the first were left out."""
    codes: dict[str, PluginCode] = {}
    skipped: set[str] = set()
    for _, operator in plugin_operators(onnx.load(str(model), load_external_data=False)):
        for place, tactic in enumerate(tactics_of(operator)):
            if tactic.spec.key not in codes and tactic.spec.key not in skipped:
                try:
                    code = plugin_code(tactic.spec, capability, tactic.parameters)
                except BuildError as error:
                    if place == 0 or error.code != "plugin.resources":
                        raise
                    skipped.add(tactic.spec.key)
                    continue
                if entry_parameters(code.ptx)[1] != tactic.parameters:
                    raise SystemExit(f"{tactic.spec.key} takes {entry_parameters(code.ptx)[1]}")
                codes[tactic.spec.key] = code
    return list(codes.values()), len(skipped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path, help="ONNX files")
    parser.add_argument("--cc", action="append", help="a compute capability; all by default")
    arguments = parser.parse_args()
    count = spilling = 0
    for model in arguments.models:
        for capability in arguments.cc or CAPABILITIES:
            began = time.process_time()
            codes, skipped = compiled(model, capability)
            forms = [code.form for code in codes]
            found = {
                "model": model.parent.name,
                "cc": capability,
                "kernels": len(codes),
                "left_out": skipped,
                "ptx": forms.count("ptx"),
                "cubin": forms.count("cubin"),
                "registers": max(code.registers for code in codes),
                "shared": max(code.shared for code in codes),
                "spills": max(code.spills for code in codes),
                "bytes": sum(len(code.code) for code in codes),
                "seconds": round(time.process_time() - began, 1),
            }
            print(json.dumps(found), flush=True)
            count, spilling = count + len(codes), spilling + sum(code.spills > 0 for code in codes)
    print(json.dumps({"kernels": count, "spilling": spilling}))


if __name__ == "__main__":
    main()
