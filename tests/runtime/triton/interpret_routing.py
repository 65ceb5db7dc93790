"""Runs the routing kernels on the shared case table in Triton's interpreter and prints one JSON object a case.

A process of its own, because triton decides at import whether kernels are compiled or interpreted::

    TRITON_INTERPRET=1 python -m tests.runtime.triton.interpret_routing
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from depthwire.runtime.triton import routing_launch as kernels
from depthwire.runtime.triton.routing_spec import RoutingSpec
from tests import routing_cases as cases
from tests.runtime.triton.interpret import Machine, difference, write

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# The whole table takes minutes to interpret: every second or third case of each kind, and all that is odd.
SELECT = [*cases.SELECT_CASES[:108:5], *cases.SELECT_CASES[108:135:2], *cases.SELECT_CASES[135:]]
WINDOWS = [case for case in cases.WINDOW_CASES[::3] if case.tokens // case.window < 8]
BUDGET = [*cases.SELECT_CASES[:108:9], *cases.SELECT_CASES[-3:], *cases.BUDGET_CASES[-40:]]
MOVE = cases.MOVE_CASES[::2]
SURPRISE = [
    case for case in cases.SURPRISE_CASES if case.dtype != torch.float64 and (case.width < 500 or case.tokens == 64)
][::2]


class RoutingMachine(Machine):
    """The interpreter, which multiplies the bits of bf16 matrices as if they were numbers, corrected."""

    def __init__(self) -> None:
        super().__init__()
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        dot = InterpreterBuilder.create_dot

        def widened(handle: Any) -> Any:
            import triton.language as tl

            if str(handle.dtype.scalar) != "bf16":
                return handle
            return TensorHandle((handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32), tl.float32)

        def widened_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
            return dot(builder, widened(a), widened(b), *rest)

        InterpreterBuilder.create_dot = widened_dot


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> dict[str, Any]:
    """Compare bit by bit."""
    return {"same": all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))}


def budget_kernel(operands: cases.SelectOperands, slots: int, spec: RoutingSpec | None = None) -> tuple[Tensor, ...]:
    """Run the budget kernel on the operands of a case."""
    return kernels.select_tokens_budget(
        operands.score,
        operands.valid,
        slots,
        threshold=operands.threshold,
        budget=operands.budget,
        state=operands.state,
        spec=spec,
    )


def selections() -> Iterator[tuple[str, dict[str, Any]]]:
    """Both rules of selection."""
    for case in (*SELECT, *WINDOWS):
        operands = cases.select_operands(case)
        found = kernels.select_tokens(operands.score, operands.valid, case.slots, case.window)
        wanted = cases.expected_top_k(operands.score, operands.valid, case.slots, case.window)
        yield f"select {case}", same(found, wanted)
    for place, case in enumerate(BUDGET):
        operands = cases.select_operands(case)
        yield f"budget {place}", same(budget_kernel(operands, case.slots), cases.expected_budget(operands))
    # Rows that are longer than a block, in several steps.
    for place, case in enumerate(BUDGET[-40::4]):
        operands = cases.select_operands(case)
        stepped = budget_kernel(operands, case.slots, RoutingSpec("budget", steps=32))
        yield f"budget in steps {place}", same(stepped, cases.expected_budget(operands))


def moves() -> Iterator[tuple[str, dict[str, Any]]]:
    """Gather, and scatter into a copy and into the base itself."""
    for case in MOVE:
        operands = cases.move_operands(case)
        gathered, scattered = cases.expected_moves(operands)
        base, index, taken = operands.base, operands.index.contiguous(), operands.taken.contiguous()
        yield f"gather {case}", same((kernels.gather_tokens(base, index),), (gathered,))
        copy = kernels.scatter_tokens(base, index, taken, operands.rows)
        kept = torch.equal(base, cases.move_operands(case).base)
        kernels.scatter_tokens(base, index, taken, operands.rows, in_place=True)
        yield f"scatter {case}", {**same((copy, base), (scattered, scattered)), "base kept": kept}
    # An index that is no token's: not followed.
    base, rows = torch.arange(12.0).reshape(1, 4, 3), torch.full((1, 3, 3), 9.0)
    index, taken = torch.tensor([[4, 2, -1]]), torch.ones(1, 3, dtype=torch.bool)
    zero, third = torch.zeros(3), base[0, 2]
    yield "gather astray", same((kernels.gather_tokens(base, index),), (torch.stack([zero, third, zero])[None],))
    wanted = torch.cat([base[:, :2], rows[:, :1], base[:, 3:]], dim=1)
    yield "scatter astray", same((kernels.scatter_tokens(base, index, taken, rows),), (wanted,))


def surprises() -> Iterator[tuple[str, dict[str, Any]]]:
    """The surprise score; and those whose window is a token too long, which must be found out."""
    for place, case in enumerate(SURPRISE):
        operands = cases.surprise_operands(case)
        exact = cases.expected_surprise(case, operands)
        # As for the other bodies: sums of d fp32 products, of which the rank is a smooth function.
        budget = 4 * case.width**0.5 * 2.0**-24 * float(exact.max())
        for name, window in (("surprise", case.window), ("wrong window", case.window + 1)):
            if name == "surprise" or case.tokens > case.window:
                rank = kernels.surprise_score(*operands_of(operands), window)
                yield f"{name} {place}", {"error": difference(rank, exact), "allowed": budget}


def operands_of(operands: cases.SurpriseOperands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the operator's inputs in their order."""
    return operands.delta, operands.prior, operands.criteria, operands.valid


def exact_attention(operands: tuple[Tensor, Tensor, Tensor], kept: Tensor, position: Tensor, scale: float) -> Tensor:
    """Attention in fp64, one mask for all: a key is seen if it is kept and not behind the query's position."""
    group = operands[0].shape[2] // operands[1].shape[2]
    q, k, v = (tensor.double().transpose(1, 2) for tensor in operands)
    k, v = k.nan_to_num().repeat_interleave(group, 1), v.nan_to_num().repeat_interleave(group, 1)
    seen = kept[:, None, None, :] & (torch.arange(k.shape[2]) <= position[:, None, :, None])
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf)
    return (logits.softmax(-1).nan_to_num() @ v).transpose(1, 2)


def attentions() -> Iterator[tuple[str, dict[str, Any]]]:
    """Queries over all keys and over the slots'; and one that sees one token too many, which must be found out."""
    for dtype, cores in ((torch.float32, True), (torch.float16, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        for batch, tokens, slots, heads, kv_heads, width in ((2, 50, 13, 6, 2, 24), (1, 70, 70, 2, 2, 64)):
            generator = torch.Generator().manual_seed(width)
            shapes = [(batch, slots, heads, width), *[(batch, tokens, kv_heads, width)] * 2]
            query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
            kept = torch.rand(batch, tokens, generator=generator) < 0.8
            kept[:, :3] = False  # whose queries see no key
            key[~kept], value[~kept] = math.nan, math.nan
            index = torch.rand(batch, tokens, generator=generator).argsort(1)[:, :slots].sort(1).values.contiguous()
            name = f"{str(dtype)[6:]}-T{tokens}" + ("" if cores else "-fma")
            scale = width**-0.5
            exact = exact_attention((query, key, value), kept, index, scale)
            run = kernels.Attention(scale, tensor_cores=cores)
            yield f"attention {name}", judged(run(query, key, value, kept, index), exact, width)
            yield f"wrong attention {name}", judged(run(query, key, value, kept, index + 1), exact, width)
            own = [tensor[:, :slots].nan_to_num(7.0).contiguous() for tensor in (key, value)]
            taken = (torch.arange(slots) < slots - 3).expand(batch, slots).contiguous()
            place = torch.arange(slots).expand(batch, slots)
            exact = exact_attention((query, own[0], own[1]), taken, place, scale)
            yield f"slot attention {name}", judged(run(query, own[0], own[1], taken), exact, width)


def judged(found: Tensor, exact: Tensor, width: int) -> dict[str, Any]:
    """Compare with the exact result.

    Logits are sums of ``width`` products in fp32, whose error moves the weights; the weights are rounded to the dtype
    before the second product, and the result once more.
    """
    rounding = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[found.dtype]
    largest = float(exact.abs().max())
    allowed = (2 * rounding + 4 * width**0.5 * 2.0**-24) * largest
    return {"error": difference(found, exact), "allowed": allowed}


def traffic(machine: Machine) -> Iterator[tuple[str, dict[str, Any]]]:
    """Count the bytes of some launches: B = 2, T = 40, K = 20, of which 15 are taken, d = 24."""
    generator = torch.Generator().manual_seed(0)
    x, rows = torch.randn(2, 40, 24, generator=generator), torch.randn(2, 20, 24, generator=generator)
    index = torch.rand(2, 40, generator=generator).argsort(1)[:, :20].contiguous()
    taken = (torch.arange(20) < 15).expand(2, 20).contiguous()
    yield "bytes gather", machine.count(lambda: (kernels.gather_tokens(x, index),), [x])
    yield "bytes scatter", machine.count(lambda: (kernels.scatter_tokens(x, index, taken, rows),), [x, rows])
    in_place = machine.count(lambda: (kernels.scatter_tokens(x, index, taken, rows, in_place=True),), [x, rows])
    yield "bytes in place", in_place
    valid, bits = torch.ones(2, 40, dtype=torch.bool), torch.ones(2, 40, dtype=torch.int8)
    sums, rank = torch.empty(2, 2, 40), torch.empty(2, 40)
    first, second = RoutingSpec("sums", width=24), RoutingSpec("rank", window=8)
    given = {"delta": x, "prior": x * 0.5, "valid": bits, "sums": sums}
    yield "bytes sums", machine.count(lambda: kernels.run(first, given, 2, 40), [given["delta"], given["prior"]])
    given |= {"criteria": torch.tensor([0.02, 1.1, 0.5, 0.4]), "rank": rank}
    yield "bytes rank", machine.count(lambda: kernels.run(second, given, 2, 40), [sums])
    given |= {"criteria": torch.tensor([0.02, 1.1, 0.5, 0.4])}
    whole_score = RoutingSpec("surprise", width=24, window=8)
    moved = [given["delta"], given["prior"]]
    yield "bytes surprise", machine.count(lambda: kernels.run(whole_score, given, 2, 40), moved)
    score = x[..., 0].contiguous()
    yield "bytes select", machine.count(lambda: kernels.select_tokens(score, valid, 20), [score])
    query, key = torch.randn(2, 20, 4, 32, generator=generator), torch.randn(2, 40, 2, 32, generator=generator)
    value, even = key * 2, (torch.arange(20) * 2).expand(2, 20).contiguous()
    operands = (query.half(), key.half(), value.half())
    whole = machine.count(lambda: (kernels.Attention(0.2)(*operands, valid, even),), list(operands))
    yield "bytes attention", whole


def main() -> None:
    """Run everything."""
    torch.set_num_threads(1)
    machine = RoutingMachine()
    for part in (selections(), moves(), surprises(), attentions(), traffic(machine)):
        for name, result in part:
            write(name, result)


if __name__ == "__main__":
    main()
