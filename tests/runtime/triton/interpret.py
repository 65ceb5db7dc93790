"""Runs the kernels of the shared case table in Triton's interpreter and prints one JSON object a case.

A process of its own, because triton decides at import whether kernels are compiled or interpreted::

    TRITON_INTERPRET=1 python -m tests.runtime.triton.interpret
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from depthwire.ops import _reference
from depthwire.runtime.triton.launch import launch
from depthwire.runtime.triton.spec import DType, KernelSpec
from tests.attn_res_cases import (
    CASES,
    TWO_PHASE_CASES,
    Case,
    Operands,
    TwoPhaseCase,
    allowed,
    expected,
    operands,
    two_phase_operands,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Machine:
    """The interpreter's memory, counted; and its one conversion that no GPU makes, corrected.

    triton 3.9's interpreter cuts fp32 off to bf16, where the compiled kernel rounds to nearest even
    (``test_compile.py`` finds the ``cvt.rn.bf16`` instructions).
    """

    def __init__(self) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.counting = False
        self.loads: list[Any] = []
        self.stores: list[Any] = []
        load, store, cast = (
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
            InterpreterBuilder.cast_impl,
        )

        def counted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            if self.counting:
                self.loads.append((pointers.data[mask.data], pointers.get_element_ty().primitive_bitwidth // 8))
            return load(builder, pointers, mask, *rest)

        def counted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            if self.counting:
                self.stores.append((pointers.data[mask.data], pointers.get_element_ty().primitive_bitwidth // 8))
            return store(builder, pointers, value, mask, *rest)

        def rounded_cast(builder: Any, source: Any, target: Any) -> Any:
            result = cast(builder, source, target)
            if str(source.dtype.scalar) == "fp32" and str(target.scalar) == "bf16":
                rounded = torch.from_numpy(np.array(source.data, np.float32)).bfloat16()
                result.data = rounded.view(torch.uint16).numpy().reshape(source.data.shape)
            return result

        InterpreterBuilder.create_masked_load = counted_load
        InterpreterBuilder.create_masked_store = counted_store
        InterpreterBuilder.cast_impl = rounded_cast

    def count(self, call: Callable[[], object], row_tensors: list[Tensor]) -> dict[str, Any]:
        """Run a kernel: bytes loaded from some tensors and from elsewhere, bytes stored, and the most loads of one."""
        self.loads, self.stores, self.counting = [], [], True
        call()
        self.counting = False
        addresses = Counter[int]()
        sizes: dict[int, int] = {}
        for pointers, size in self.loads:
            addresses.update(pointers.ravel().tolist())
            sizes.update(dict.fromkeys(pointers.ravel().tolist(), size))
        spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in row_tensors]
        inside = {a: n for a, n in addresses.items() if any(low <= a < high for low, high in spans)}
        return {
            "rows": sum(sizes[a] * n for a, n in inside.items()),
            "parameters": sum(sizes[a] * n for a, n in addresses.items() if a not in inside),
            "stores": sum(size * pointers.size for pointers, size in self.stores),
            "most": max(inside.values()),
        }


def read_spec(case: Case, **changes: Any) -> KernelSpec:
    """Return the kernel of a case."""
    attributes = {"eps": case.eps, "scale": case.scale, "last_bias": case.last_bias, "norm_eps": case.eps}
    return KernelSpec(case.op_type, case.width, dtype(case.dtype), **{**attributes, **changes})


def dtype(name: str) -> DType:
    """Narrow a case's dtype to those of a kernel."""
    assert name in ("float32", "float16", "bfloat16")
    return name  # type: ignore[return-value]


def read_inputs(case: Case, tensors: Operands) -> list[Tensor]:
    """Return the operands in the node's order."""
    gain, delta = [tensors.norm_weight] * case.norm, [tensors.delta] * case.add
    return [tensors.query, *gain, *tensors.sources, *delta]


def judge(case: Case, tensors: Operands, outputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Compare a read's outputs with the exact result."""
    exact, total = expected(case, tensors)
    same = total is None or torch.equal(outputs[1].double(), total)
    return {"error": difference(outputs[0], exact), "allowed": allowed(case, exact), "sum": same}


def difference(value: Tensor, exact: Tensor) -> float:
    """Return the largest absolute difference; infinite where the value is not a number."""
    error = float((value.double() - exact).abs().max())
    return float("inf") if math.isnan(error) else error


@functools.cache
def phase_1(case: TwoPhaseCase) -> tuple[dict[str, float], Tensor, Tensor]:
    """Run phase 1 of a group, whose merge is plain, and compare it: the errors, the result, its logsumexp."""
    queries, tensors = two_phase_operands(case)
    bank = tensors.sources[: case.bank]
    attributes: dict[str, Any] = {"eps": case.eps, "scale": case.scale, "queries": case.queries}
    spec = KernelSpec(f"AttnResInter_{case.bank}", case.width, dtype(case.dtype), **attributes)
    out, lse = launch(spec, [queries, *bank])
    exact, exact_lse = _reference.phase_1(queries.double(), [s.double() for s in bank], case.eps, case.scale)
    errors = {
        "inter_error": difference(out, exact),
        "inter_allowed": allowed(case.reads(), exact),
        "lse_error": difference(lse, exact_lse),
        # The logits' own error, as in ``allowed``, and that of exp and log.
        "lse_allowed": max(32.0, 4 * case.width**0.5) * 2.0**-24 * max(1.0, float(exact_lse.abs().max())),
    }
    return errors, out, lse


def two_phase(case: TwoPhaseCase) -> dict[str, Any]:
    """Run both phases of a group and compare both."""
    errors, out, lse = phase_1(dataclasses.replace(case, norm=False, add=False))
    _, tensors = two_phase_operands(case)
    attributes: dict[str, Any] = {"eps": case.eps, "scale": case.scale, "norm_eps": case.eps, "index": case.index}
    spec = KernelSpec(case.op_type, case.width, dtype(case.dtype), **attributes)
    gain, delta = [tensors.norm_weight] * case.norm, [tensors.delta] * case.add
    outputs = launch(spec, [tensors.query, *gain, out, lse, *tensors.sources[case.bank :], *delta])
    return {**judge(case.reads(), tensors, outputs), **errors}


def sabotaged() -> dict[str, dict[str, Any]]:
    """Judge kernels with one attribute slightly wrong: each must be found out."""
    case = Case(9, 77, norm=True, last_bias=0.5, magnitude=1e-2, eps=1e-5)
    tensors = operands(case)
    wrong = {"scale": 1.001, "last_bias": 0.501, "eps": 1.1e-5, "norm_eps": 1.1e-5}
    return {
        f"wrong {name}": judge(case, tensors, launch(read_spec(case, **{name: value}), read_inputs(case, tensors)))
        for name, value in wrong.items()
    }


def traffic_cases(machine: Machine) -> dict[str, dict[str, Any]]:
    """Count the bytes of some kernels."""
    found = {}
    for case in (Case(9, 576, norm=True), Case(20, 77, "float16", add=True), Case(1, 64), Case(33, 2048, "bfloat16")):
        tensors = operands(case)
        inputs = read_inputs(case, tensors)
        rows = [*tensors.sources, *([tensors.delta] * case.add)]
        found[f"bytes {case}"] = machine.count(lambda i=inputs, c=case: launch(read_spec(c), i), rows)  # type: ignore[misc]
    tensors = operands(Case(7, 2048, "float16"))
    spec = KernelSpec("AttnResInter_7", 2048, "float16", queries=11, eps=1e-6)
    queries = torch.ones(11, 2048)
    found["bytes inter"] = machine.count(lambda: launch(spec, [queries, *tensors.sources]), tensors.sources)
    inter = (torch.ones(4, 3, 2048).half(), torch.ones(4, 3))
    merge = KernelSpec("AttnResMergeNorm_7", 2048, "float16", index=2, eps=1e-6)
    operand = [queries[0].contiguous(), queries[1].contiguous(), *inter, *tensors.sources]
    found["bytes merge"] = machine.count(lambda: launch(merge, operand), [*inter, *tensors.sources])
    return found


def main() -> None:
    """Run everything."""
    torch.set_num_threads(1)
    machine = Machine()
    for case in CASES:
        tensors = operands(case)
        write(str(case), judge(case, tensors, launch(read_spec(case), read_inputs(case, tensors))))
    for group in TWO_PHASE_CASES:
        write(str(group), two_phase(group))
    for name, result in {**sabotaged(), **traffic_cases(machine)}.items():
        write(name, result)


def write(name: str, result: dict[str, Any]) -> None:
    """Print one line."""
    sys.stdout.write(json.dumps({"case": name, **result}) + "\n")


if __name__ == "__main__":
    main()
