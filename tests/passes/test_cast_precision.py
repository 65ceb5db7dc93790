"""Half precision with islands of fp32: what is cast, what is not, and what the result still computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch import Tensor, nn

from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.observe import observe
from depthwire.passes.analysis.precision import assign, is_read
from depthwire.passes.analysis.ranges import measure
from depthwire.passes.cast_precision import LOW, CastPrecision
from depthwire.passes.standard import standard_pipeline
from depthwire.runtime.tolerances import tolerance
from tests.export import tiny
from tests.passes.parity import apply, check_golden, error, named_nodes, run, sabotaged
from tests.routed_tiny import captured as decoder
from tests.routed_tiny import routed
from tests.zoo import Spec, build, inputs, program_of

if TYPE_CHECKING:
    from depthwire.passes._edit import GraphEditor
    from depthwire.program import Program

Dtype = Literal["fp16", "bf16"]

aten, own = torch.ops.aten, torch.ops.depthwire
PRODUCTS = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default)


def bound(dtype: Dtype) -> float:
    return tolerance(str(LOW[dtype]).removeprefix("torch."), "logits").rtol


def lowered(attn_res: str | None = None, *, attention: Any = "decomposed") -> Program:
    return standard_pipeline(attn_res=attn_res, attention=attention, schedule="auto").run(decoder())


def dtypes_of(program: Program, *targets: object) -> set[torch.dtype]:
    return {node.meta["val"].dtype for node in named_nodes(program, *targets)}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("attn_res", [None, "block:3", "full"])
@pytest.mark.parametrize("attention", ["op", "decomposed"])
def test_a_decoder_keeps_its_function_and_its_interface(dtype: Dtype, attn_res: str | None, attention: str) -> None:
    before = lowered(attn_res, attention=attention)
    after = apply(CastPrecision(dtype), before, parity=bound(dtype)).program
    assert dtypes_of(after, *PRODUCTS) == {LOW[dtype]}
    assert [node.meta["val"].dtype for node in after.exported.graph.nodes if node.name in after.output_nodes] == [
        torch.float32
    ]
    assert after.weight_bytes < 0.6 * before.weight_bytes


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "spec",
    [Spec(norm="layer", bias=True), Spec(placement="post"), Spec(block="parallel-one"), Spec(placement="sandwich")],
)
def test_other_transformers(dtype: Dtype, spec: Spec) -> None:
    program = standard_pipeline(attn_res=None).run(program_of(build(spec, dtype=torch.float32), inputs()))
    after = apply(CastPrecision(dtype), program, parity=bound(dtype)).program
    assert dtypes_of(after, *PRODUCTS) == {LOW[dtype]}
    assert dtypes_of(after, aten.rms_norm.default, aten.layer_norm.default) == {torch.float32}


def test_golden_text() -> None:
    program = lowered("block:2")
    check_golden("cast_precision", program, apply(CastPrecision("fp16"), program, parity=bound("fp16")).program)


def test_queries_and_gains_of_reads_stay_fp32_and_sources_do_not() -> None:
    after = CastPrecision("fp16").run(lowered("full")).program
    reads = [node for node in after.exported.graph.nodes if node.op == "call_function" and is_read(node)]
    assert reads
    for read in reads:
        target: Any = read.target
        given = dict(zip((argument.name for argument in target._schema.arguments), read.args, strict=False))
        vectors = [given[name] for name in ("query", "queries", "norm_weight", "inter_lse") if name in given]
        assert {arg.meta["val"].dtype for arg in vectors} == {torch.float32}
        rows = [*given["sources"], *(given[name] for name in ("delta", "inter_out") if name in given)]
        assert {arg.meta["val"].dtype for arg in rows} == {torch.float16}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": "top-k"},
        {"gate": "sigmoid"},
        {"score": "surprise", "gate": "surprise", "fallback": "linear"},
        {"score": "timescale", "fallback": "swiglu"},
        {"unit": "mlp", "keys_values": "all"},
    ],
)
def test_what_decides_the_routing_is_fp32(options: dict[str, Any]) -> None:
    program = routed(target="decomposed", **options)
    assert assign(program).islands["scores"] > 0
    after = Pipeline((CastPrecision("bf16"),)).run(program)
    selections = named_nodes(after, own.select_tokens.default, own.select_tokens_budget.default)
    assert len(selections) == 2
    for node in selections:
        score: Any = node.args[0]
        pending, seen = [score], 0
        while pending:  # back to the stream: no rounding on the way
            made = pending.pop()
            if made.op == "call_function" and made.target != aten.to.dtype and made.meta["val"].dim() <= 3:
                assert made.meta["val"].dtype == torch.float32, made.name
                seen += 1
                pending += [arg for arg in made.all_input_nodes if set(arg.users) <= {made}]
        assert seen
    assert_selects_alike(program, after)


def assert_selects_alike(before: Program, after: Program) -> None:
    """On these inputs no score lies near enough to another one for bf16 to exchange them."""
    taken = []
    for program in (before, after):
        found: list[Tensor] = []

        def look(node: torch.fx.Node, value: Any, found: list[Tensor] = found) -> None:
            if "select_tokens" in str(node.target):
                found.append(value[0])

        observe(program, dict(program.example_inputs), look)
        taken.append(found)
    same = [float((left == right).float().mean()) for left, right in zip(*taken, strict=True)]
    assert min(same) > 0.85


def test_logits_can_stay_fp32() -> None:
    before = lowered("block:2")
    after = apply(CastPrecision("bf16", logits="fp32"), before, parity=bound("bf16")).program
    head = named_nodes(after, aten.linear.default)[-1]
    assert head.meta["val"].dtype == torch.float32
    assert head.name == after.output_nodes[0]
    assert [node.meta["val"].dtype for node in named_nodes(after, aten.linear.default)[:-1]].count(torch.float32) == 0


@pytest.mark.parametrize("logits", ["same", "fp32"])
def test_a_tied_table_is_stored_once(logits: Any) -> None:
    program = standard_pipeline(attn_res=None).run(tiny.captured(tied=True))
    after = apply(CastPrecision("fp16", logits=logits), program, parity=bound("fp16")).program
    tables = {
        tensor.data_ptr()
        for name, tensor in after.exported.state_dict.items()
        if name in ("head.weight", "embedding.weight")
    }
    assert len(tables) == 1
    wide = after.exported.state_dict["head.weight"].dtype == torch.float32
    assert wide == (logits == "fp32")


class Masked(nn.Module):
    def forward(self, scores: Tensor, hidden: Tensor) -> Tensor:
        product = scores @ scores.transpose(-1, -2)
        filled = torch.masked_fill(product, hidden, torch.finfo(torch.float32).min)
        return torch.softmax(filled, -1) @ scores


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_row_that_is_hidden_entirely_stays_finite(dtype: Dtype) -> None:
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    hidden[2] = True
    program = program_of(Masked(), {"scores": torch.randn(4, 8), "hidden": hidden})
    after = CastPrecision(dtype).run(program).program
    (fill,) = [node.args[2] for node in named_nodes(after, aten.masked_fill.Scalar)]
    assert fill == torch.finfo(LOW[dtype]).min
    assert bool(run(after, *program.example_inputs.values())[0].isfinite().all())


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.product(x) * 0.1767766952966369
        return out


def test_a_number_is_what_the_graphs_constant_holds() -> None:
    program = program_of(Scaled(), {"x": torch.randn(2, 8)})
    after = CastPrecision("fp16").run(program).program
    (factor,) = [node.args[1] for node in named_nodes(after, aten.mul.Tensor)]
    assert factor == float(torch.tensor(0.1767766952966369).half())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_twin_has_the_same_weights_and_computes_in_fp32(dtype: Dtype) -> None:
    program = lowered("block:3")
    low = CastPrecision(dtype).run(program).program
    twin = CastPrecision(dtype, arithmetic="fp32").run(program).program
    for name, tensor in twin.exported.state_dict.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, low.exported.state_dict[name].float())
    assert all(node.meta["val"].dtype == torch.float32 for node in named_nodes(twin, *PRODUCTS))
    assert CastPrecision(dtype, arithmetic="fp32").run(twin).rewrites == 0
    examples = list(program.example_inputs.values())
    assert 0 < error(run(twin, *examples), run(program, *examples)) <= bound(dtype)


def test_a_program_in_half_precision_is_left_alone() -> None:
    program = standard_pipeline(attn_res=None).run(tiny.captured(dtype=torch.float16))
    assert CastPrecision("fp16").run(program).rewrites == 0


def test_ranges_name_the_largest_value_and_skip_the_fills_of_masks() -> None:
    program = lowered()
    low = assign(program).low
    feeds = [dict(program.example_inputs)]
    ranges = measure(program, feeds, low)
    assert set(ranges.magnitudes) <= low
    assert 0 < ranges.largest < 1e4
    state = dict(program.exported.state_dict)
    fqn = next(name for name in state if "layers.2" in name and state[name].dim() == 2)
    state[fqn] = torch.nn.Parameter(state[fqn] * 1e6)
    grown = measure(program.with_state(state), feeds, low)
    assert grown.largest > 65504
    assert grown.largest_at is not None
    assert grown.largest_at.split(" ")[0].split(".")[0] == fqn.split(".")[0]


class LargeNorm(nn.Module):
    """Activations whose squares float16 does not hold, though it holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=1e-6)
        self.product = nn.Linear(16, 16, bias=False)
        nn.init.eye_(self.product.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.product(self.norm(self.product(x) * 1000.0))
        return out


def narrow_the_norm(edit: GraphEditor) -> None:
    """Sabotage: spell the norm out in half precision."""
    for node in list(edit.graph.nodes):
        if node.target is aten.rms_norm.default:
            narrow: Any = node.args[0]
            source = narrow.args[0]
            square = edit.call(aten.mul.Tensor, (source, source), before=node, like=node)
            mean = edit.call(aten.mean.dim, (square, [-1], True), before=node, like=node)
            rstd = edit.call(aten.rsqrt.default, (mean,), before=node, like=node)
            normed = edit.call(aten.mul.Tensor, (source, rstd), before=node, like=node)
            edit.replace(node, edit.call(aten.to.dtype, (normed, torch.float32), before=node, like=node))


def test_a_norm_in_half_precision_fails_the_parity_test() -> None:
    program = program_of(LargeNorm(), {"x": torch.randn(4, 16)})
    after = Pipeline((CastPrecision("fp16"),)).run(program)
    examples = list(program.example_inputs.values())
    want = run(program, *examples)
    assert error(run(after, *examples), want) <= bound("fp16")
    assert not error(run(sabotaged(after, narrow_the_norm), *examples), want) <= bound("fp16")


def test_a_product_of_two_dtypes_breaks_the_promise() -> None:
    after = CastPrecision("fp16").run(lowered()).program

    def widen_one(edit: GraphEditor) -> None:
        node = next(node for node in edit.graph.nodes if node.target is aten.matmul.default)
        node.update_arg(0, edit.call(aten.to.dtype, (node.args[0], torch.float32), before=node, like=node))

    (broken,) = CastPrecision("fp16").ensures(sabotaged(after, widen_one))
    assert "multiplies torch.float16, torch.float32" in broken
