"""Integers in the place of linear weights: every spelling of a linear layer, and what stays as it is."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.quantization import QuantizationPlan, QuantizedWeight, calibrate
from depthwire.passes.analysis.reads import find_reads, read_arguments
from depthwire.passes.quantize_linear import DEQUANTIZE, QUANTIZE, QuantizeLinear
from depthwire.passes.standard import canonical_pipeline
from tests import routed_tiny
from tests.export import tiny
from tests.passes.parity import check_golden, error, named_nodes, run
from tests.zoo import Spec, captured, program_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.passes._base import PassResult
    from depthwire.program import Program

INPUT_SCALE = 0.25


def planned(
    program: Program, *names: str, axis: int = 1, block: int = 0, bits: int = 8, activation: float | None = None
) -> QuantizationPlan:
    """Return a plan that rounds weights to the nearest integer; ``axis`` is the summed one."""
    return QuantizationPlan(
        "int4-weights" if block else "int8",
        {name: rounded(program.exported.state_dict[name], axis, block, bits, activation) for name in names},
    )


def rounded(weight: Tensor, axis: int, block: int, bits: int, activation: float | None) -> QuantizedWeight:
    matrix = weight.detach().float() if axis else weight.detach().float().T
    highest = 7 if bits == 4 else 127
    groups = matrix.reshape(len(matrix), -1, block or matrix.shape[1])
    scale = groups.abs().amax(-1, keepdim=True) / highest
    values = (groups / scale).round().to(torch.int8).reshape(matrix.shape)
    scale = scale.squeeze(-1)
    if not axis:
        values, scale = values.T.contiguous(), scale.T.contiguous()
    return QuantizedWeight(
        values, scale if block else scale.flatten(), axis if block else 1 - axis, block, bits, activation
    )


def exact(weight: QuantizedWeight) -> Tensor:
    """The numbers that a quantised weight stands for, spelled out without the operator."""
    scale = weight.scale
    if weight.block:
        return weight.values * scale.repeat_interleave(weight.block, weight.axis)
    return weight.values * (scale.unsqueeze(1) if weight.axis == 0 else scale)


def quantized(program: Program, plan: QuantizationPlan) -> PassResult:
    """Run the pass between the pipeline's checks; check its promise, and that a second run does nothing."""
    step = QuantizeLinear(plan)
    result = step.run(program)
    after = Pipeline((step,)).run(program)
    assert step.ensures(after) == []
    assert step.run(after).rewrites == 0
    assert step.run(after).program is after
    assert not set(plan.weights) & set(after.exported.state_dict)
    return dataclasses.replace(result, program=after)


class Spelled(nn.Module):
    """One product with a weight, in one of the ways that models write it."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn((6, 8) if spelling in ROWS else (8, 6)))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight, self.bias
        product: dict[str, Callable[[], Tensor]] = {
            "linear": lambda: functional.linear(x, w),
            "linear with bias": lambda: functional.linear(x, w, b),
            "mm of a transpose": lambda: torch.mm(x, w.t()),
            "matmul of a transpose": lambda: torch.matmul(x, w.transpose(0, 1)),
            "addmm of a transpose": lambda: torch.addmm(b, x, w.t()),
            "mm": lambda: torch.mm(x, w),
            "matmul": lambda: torch.matmul(x, w),
            "addmm": lambda: torch.addmm(b, x, w),
            "linear of a transpose": lambda: functional.linear(x, w.t()),
        }
        return product[self.spelling]().tanh()


ROWS = ("linear", "linear with bias", "mm of a transpose", "matmul of a transpose", "addmm of a transpose")
COLUMNS = ("mm", "matmul", "addmm", "linear of a transpose")


def spelled(spelling: str) -> tuple[Program, int]:
    program = canonical_pipeline().run(program_of(Spelled(spelling), torch.randn(3, 8)))
    return program, int(spelling in ROWS)


@pytest.mark.parametrize("activation", [None, INPUT_SCALE])
@pytest.mark.parametrize(("block", "bits"), [(0, 8), (4, 4), (4, 8)])
@pytest.mark.parametrize("spelling", [*ROWS, *COLUMNS])
def test_every_spelling_computes_with_the_plans_numbers(
    spelling: str, block: int, bits: int, activation: float | None
) -> None:
    program, axis = spelled(spelling)
    plan = planned(program, "weight", axis=axis, block=block, bits=bits, activation=activation)
    result = quantized(program, plan)
    assert result.rewrites == 1
    assert len(named_nodes(result.program, DEQUANTIZE)) == 1 + (activation is not None)
    weight = exact(plan.weights["weight"])
    matrix = weight.T if axis else weight
    for seed in range(3):
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)) * 20
        rows = x if activation is None else (x / activation).round().clamp(-128, 127) * activation
        bias = program.exported.state_dict["bias"].detach() if "bias" in spelling or "addmm" in spelling else 0.0
        # The same products in another order of summation: a few roundings at 6e-8.
        assert error(run(result.program, x), [torch.tanh(rows @ matrix + bias)]) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_integers_have_the_scales_of_the_weights_dtype(dtype: torch.dtype) -> None:
    program = canonical_pipeline().run(program_of(Spelled("linear").to(dtype), torch.randn(3, 8).to(dtype)))
    result = quantized(program, planned(program, "weight", activation=INPUT_SCALE))
    nodes = named_nodes(result.program, DEQUANTIZE)
    assert [node.meta["val"].dtype for node in nodes] == [dtype] * 2


def test_weights_and_inputs_on_the_grid_compute_what_they_did() -> None:
    module = Spelled("linear with bias")
    values = torch.randint(-127, 128, (6, 8))
    values[:, 0] = 127  # the largest is the scale's
    with torch.no_grad():
        module.weight.copy_(values * 0.5)
    program = canonical_pipeline().run(program_of(module, torch.randn(3, 8)))
    result = quantized(program, planned(program, "weight", activation=INPUT_SCALE))
    x = torch.randint(-127, 128, (3, 8)) * INPUT_SCALE
    assert torch.equal(run(result.program, x)[0], run(program, x)[0])


def test_golden_text() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
            self.down = nn.Linear(4, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.down(self.gate(x).sigmoid() * self.up(x))
            return out

    program = canonical_pipeline().run(program_of(Pair(), torch.randn(3, 8)))
    both = planned(program, "up.weight", "gate.weight", activation=INPUT_SCALE)
    down = planned(program, "down.weight", block=4, bits=4)
    plan = dataclasses.replace(both, weights={**both.weights, **down.weights})
    result = quantized(program, plan)
    assert len(named_nodes(result.program, QUANTIZE)) == 1  # the two that read x share its rounding
    check_golden("quantize_linear", program, result.program)


def test_a_weight_that_several_layers_read_is_stored_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(self.inner(x).tanh()).tanh()
            return out

    program = canonical_pipeline().run(program_of(Twice(), torch.randn(3, 8)))
    result = quantized(program, planned(program, "inner.weight", activation=INPUT_SCALE))
    assert result.rewrites == 1
    assert len(named_nodes(result.program, QUANTIZE)) == 2
    assert sum(name.endswith(".int8") for name in result.program.exported.constants) == 1
    scales = [name for name in result.program.exported.constants if "input_scale" in name]
    assert scales == ["inner.weight.input_scale", "inner.weight.input_scale_0"]


def plan_of_all(program: Program) -> QuantizationPlan:
    """Return a plan that names every matrix of a program, whatever it is."""
    names = [name for name, tensor in program.exported.state_dict.items() if tensor.dim() == 2]
    return planned(program, *names, activation=INPUT_SCALE)


def kept(program: Program) -> dict[str, list[str]]:
    """Return what the pass declines even if the plan names it, by code."""
    plan = plan_of_all(program)
    result = QuantizeLinear(plan).run(program)
    codes: dict[str, list[str]] = {}
    for decline in result.declines:
        codes.setdefault(decline.code.removeprefix("quantize-linear."), []).append(decline.got.split(" ")[0])
    left = set(result.program.exported.state_dict)
    assert left >= {name for names in codes.values() for name in names}
    return codes | {"quantized": sorted(set(plan.weights) - left)}


def test_heads_and_tied_embeddings_stay() -> None:
    assert kept(tiny.lifted(tiny.captured()))["head"] == ["head.weight"]
    tied = kept(tiny.lifted(tiny.captured(tied=True)))
    assert tied["shared"] == ["head.weight"]  # one of its two names
    assert len(tied["quantized"]) == 12


def test_queries_norms_and_sources_of_reads_stay() -> None:
    program = tiny.lifted(tiny.captured())
    result = quantized(program, planned(program, *kept(program)["quantized"], activation=INPUT_SCALE))
    state = result.program.exported.state_dict
    assert all(state[name] is tensor for name, tensor in program.exported.state_dict.items() if name in state)
    assert {name for name in state if "query" in name or "norm" in name or "embedding" in name} == {
        name for name in program.exported.state_dict if "query" in name or "norm" in name or "embedding" in name
    }
    reads = list(find_reads(result.program.exported.graph))
    assert reads
    for node, _ in reads:
        arguments = read_arguments(node)
        operands = [*arguments["sources"], *(each for each in arguments.values() if isinstance(each, torch.fx.Node))]
        assert not any(each.target in (QUANTIZE, DEQUANTIZE) for each in operands)


ROUTES: list[dict[str, Any]] = [
    {"score": "linear", "gate": "sigmoid"},
    {"score": "mod", "gate": "score", "rule": "top-k", "margin": 0},
    {"score": "timescale", "fallback": "linear"},
    {"score": "surprise", "gate": "surprise", "fallback": "swiglu"},
]


@pytest.mark.parametrize("options", ROUTES, ids=str)
def test_routers_and_priors_stay(options: dict[str, Any]) -> None:
    program = routed_tiny.routed(**options)
    found = kept(program)
    parts = {name for name, tensor in program.exported.state_dict.items() if name.startswith("route.")}
    matrices = {name for name in parts if program.exported.state_dict[name].dim() == 2}
    assert matrices
    assert set(found.get("router", [])) == matrices
    assert len(found["quantized"]) == 4 * routed_tiny.LAYERS
    assert not parts & set(found["quantized"])


def test_a_source_that_a_layer_reads_itself_is_not_rounded() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(8, 8, bias=False) for _ in range(3))
            self.query = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            update = self.first(x)
            own = self.second(update.reshape(6, 8)).reshape(x.shape)  # through a view, the source itself
            read = torch.ops.depthwire.attn_res_read(self.query, [x, update], 1e-6, 1.0)
            out: Tensor = self.last(read + own).tanh()
            return out

    program = canonical_pipeline().run(program_of(Reader(), torch.randn(2, 3, 8)))
    names = [f"{name}.weight" for name in ("first", "second", "last")]
    plan = calibrate(program, [{program.input_names[0]: torch.randn(2, 3, 8)}], "int8")
    assert [bool(plan.weights[name].reason) for name in names] == [True, True, False]
    for given in (plan, planned(program, *names, activation=INPUT_SCALE)):
        result = quantized(program, given)
        (rounding,) = named_nodes(result.program, QUANTIZE)
        assert "add" in str(rounding.args[0])
        (read,) = (node for node, _ in find_reads(result.program.exported.graph))
        assert [node.name for node in read_arguments(read)["sources"]] == [*program.input_names, "linear"]


def test_the_router_of_experts_stays_and_so_do_the_experts() -> None:
    _, program = captured(Spec(mlp="moe"), torch.float32)
    found = kept(canonical_pipeline().run(program))
    assert found["router"] == ["layers.0.mlp.gate.weight", "layers.1.mlp.gate.weight"]
    assert found["experts"] == ["layers.0.mlp.experts", "layers.1.mlp.experts"]
    assert len(found["quantized"]) == 8


def declined(module: nn.Module, plan: QuantizationPlan | None = None) -> list[str]:
    program = canonical_pipeline().run(program_of(module, torch.randn(8, 8)))
    result = QuantizeLinear(plan_of_all(program) if plan is None else plan).run(program)
    assert (result.program is program) == (result.rewrites == 0)
    return [decline.code for decline in result.declines]


class Both(nn.Module):
    """Products with one weight, chosen by a name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.inner.weight
        if self.kind == "both axes":
            return torch.tanh(torch.mm(functional.linear(x, w), w))
        if self.kind == "a norm of it":
            return torch.tanh(functional.linear(x, w)) * w.square().sum()
        if self.kind == "both operands":
            return torch.tanh(functional.linear(w, w))
        return functional.linear(x, w).reshape(4, 16) if self.kind == "the output" else functional.linear(x, w).tanh()


@pytest.mark.parametrize(
    ("kind", "codes"),
    [("both axes", ["axis"]), ("a norm of it", ["shared"]), ("the output", ["head"]), ("both operands", [])],
)
def test_what_is_no_plain_linear_layer_is_left_alone(kind: str, codes: list[str]) -> None:
    assert declined(Both(kind)) == [f"quantize-linear.{code}" for code in codes]


def test_a_plan_of_another_model_is_declined() -> None:
    assert declined(Both("plain"), QuantizationPlan("int8", {})) == ["quantize-linear.no-plan"]
    program = canonical_pipeline().run(program_of(Both("plain"), torch.randn(8, 8)))
    plan = planned(program, "inner.weight")
    wrong = dataclasses.replace(plan.weights["inner.weight"], values=torch.zeros(8, 4, dtype=torch.int8))
    other = dataclasses.replace(plan, weights={"inner.weight": wrong})
    assert declined(Both("plain"), other) == ["quantize-linear.shape"]
    assert QuantizeLinear(other).ensures(program) == []


def test_blocks_that_do_not_divide_a_weight_are_declined_with_the_reason() -> None:
    program = canonical_pipeline().run(program_of(Both("plain"), torch.randn(8, 8)))
    plan = calibrate(program, [{program.input_names[0]: torch.randn(8, 8)}], "int4-weights", block_size=3)
    result = QuantizeLinear(plan).run(program)
    assert [decline.code for decline in result.declines] == ["quantize-linear.block"]
    assert result.program is program


def test_a_weight_that_stays_behind_breaks_the_promise() -> None:
    program = canonical_pipeline().run(program_of(Both("plain"), torch.randn(8, 8)))
    assert QuantizeLinear(planned(program, "inner.weight")).ensures(program) == [
        "inner.weight is in the program as it was"
    ]


def test_one_plan_quantises_every_capacity_alike() -> None:
    half, quarter = (routed_tiny.routed(capacity=(Fraction(1, share),), rule="top-k", margin=0) for share in (2, 4))
    plan = calibrate(half, [{"input_ids": routed_tiny.ids()}], "int8")
    states = []
    for program in (half, quarter):
        result = quantized(program, plan)
        assert result.rewrites == len(plan.weights) == 4 * routed_tiny.LAYERS
        states.append(result.program.exported.constants)
    integers = [{name: tensor for name, tensor in state.items() if name.endswith(".int8")} for state in states]
    assert integers[0].keys() == integers[1].keys()
    assert all(integers[0][name] is integers[1][name] for name in integers[0])  # one copy in the file
    assert len({name for state in states for name in state if name.endswith("input_scale")}) > 0
