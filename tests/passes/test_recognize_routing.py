from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from depthwire.export.capture import capture
from depthwire.models._token_movement import select_top, select_within_budget
from depthwire.models.routing_config import exact_capacity
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.routing_ops import GATHER, SCATTER, SELECT, SELECT_BUDGET, SURPRISE
from depthwire.passes.analysis.token_rules import budget_of
from depthwire.passes.recognize_routing import REASONS, RecognizeRouting
from depthwire.passes.standard import canonical_pipeline, standard_pipeline
from tests.models.routed import ids, make, padding
from tests.passes.native_routing.blocks import DECLINED, NO_ROUTING, RECOGNISED, SLOTS, WIDTH, Block
from tests.passes.parity import FP64, apply, assert_parity, check_golden, error, named, run, runner, sabotaged
from tests.zoo import Spec, captured

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.models.routing_config import Kind, Spelling
    from depthwire.passes._edit import GraphEditor
    from depthwire.program import Program

STEP = RecognizeRouting()
READ = torch.ops.depthwire.attn_res_read.default
# What a selection, or the movement of its tokens, is spelled with.
SPELLED = ("topk", "sort", "argsort", "cumsum", "cummin", "index_put", "scatter", "masked_fill", "argmax")
SPELLINGS: tuple[Spelling, ...] = ("gather", "index", "onehot")


def canonical(module: nn.Module, **inputs: Tensor) -> Program:
    return canonical_pipeline().run(capture(module, example_inputs=inputs))


def count(program: Program, *targets: object) -> int:
    return sum(node.target in targets for node in program.exported.graph.nodes)


def spelled(program: Program) -> list[str]:
    """Return what is left of the selections' own operations."""
    names = [str(getattr(node.target, "_opname", "")) for node in program.exported.graph.nodes]
    return [name for name in names if name in SPELLED]


def lowered(program: Program, inputs: list[list[Tensor]]) -> Program:
    """Run the pass between the pipeline's checks; check parity on inputs, the promise, and that it has an end."""
    after = Pipeline((STEP,)).run(program)
    assert STEP.ensures(after) == []
    assert STEP.run(after).rewrites == 0
    got, want = runner(after), runner(program)
    for examples in inputs:
        assert error(got(*examples), want(*examples)) <= FP64
    return after


# kind, spelling, padding, options: every spelling of every model, every rule, gate and moving average among them.
MODELS: list[tuple[Kind, Spelling, bool, dict[str, Any]]] = [
    ("mixture_of_depths", "gather", True, {"gate": "score", "depth": 4}),
    ("mixture_of_depths", "index", True, {"rule": "budget", "predictor": True}),
    ("mixture_of_depths", "onehot", False, {"capacity": 0.3}),
    ("subjective_depth", "gather", True, {"gate": "score", "kv": "all"}),
    ("subjective_depth", "index", False, {"rule": "budget", "gate": "score", "rank": "gate", "average": "conv1d"}),
    ("subjective_depth", "onehot", True, {"gate": "score", "rank": "gate", "average": "cumsum", "beta": "schedule"}),
    ("subjective_timescale", "gather", True, {"kv": "all", "rule": "budget", "capacity": 0.3}),
    ("subjective_timescale", "index", False, {"gate": "score"}),
    ("subjective_timescale", "onehot", True, {"rule": "budget"}),
    ("attn_res", "gather", True, {"fallback": "prior"}),
    ("attn_res", "index", True, {"rule": "budget", "gate": "score"}),
    ("attn_res", "onehot", False, {"depth": 4}),
]


def model_inputs(*, padded: bool) -> list[list[Tensor]]:
    """Three seeds; padding on either side, and rows of fewer tokens than slots."""
    found = []
    for seed in range(3):
        mask = padding(24)
        mask[2, : 20 * (seed % 2)] = 0
        mask[1, 3 if seed == 2 else 20 :] = 0
        found.append([ids(3, 24, seed), mask] if padded else [ids(3, 24, seed)])
    return found


@pytest.mark.parametrize(("kind", "spelling", "padded", "options"), MODELS)
def test_every_spelling_of_every_model(kind: Kind, spelling: Spelling, padded: bool, options: dict[str, Any]) -> None:
    model = make(kind, **{"depth": 2, "spelling": spelling, **options})
    cases = model_inputs(padded=padded)
    before = canonical(model, **dict(zip(("input_ids", "attention_mask"), cases[0], strict=False)))
    after = lowered(before, cases)
    routed = len(model.config.routed_layers) * (2 if kind == "attn_res" else 1)
    assert count(after, SELECT if model.rule == "top-k" else SELECT_BUDGET) == routed
    assert count(after, SCATTER) == routed
    assert after.history[-1].declines == ()
    assert count(after, SURPRISE) == (routed if kind == "subjective_depth" else 0)
    assert spelled(after) == []
    with torch.no_grad():
        for examples in cases:
            assert error(run(after, *examples), [model(*examples)]) <= FP64


class Moved(nn.Module):
    """A block whose tokens are chosen and moved by the reference models' own functions."""

    threshold: Tensor

    def __init__(self, spelling: Spelling, *, capacity: float | None = None, slots: int = SLOTS) -> None:
        super().__init__()
        self.block = Block(lambda _, x: x)
        self.spelling, self.capacity, self.slots = spelling, capacity, slots
        self.register_buffer("threshold", torch.tensor(0.0))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        valid = None if mask is None else mask != 0
        score = self.block.score(x)
        if self.capacity is None:
            chosen = select_top(score, valid, self.slots, self.spelling)
        else:
            exact = exact_capacity(self.capacity)
            share: dict[str, Any] = {"capacity": exact, "margin": 1, "slots": self.slots, "spelling": self.spelling}
            chosen = select_within_budget(score, valid, self.threshold, **share)
        rows = chosen.gather(x)
        return chosen.scatter(x, rows, torch.tanh(self.block.mlp(rows)))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("capacity", "padded"), [(None, True), (0.25, False)])
def test_sizes_and_spellings(spelling: Spelling, capacity: float | None, padded: bool) -> None:
    for batch, tokens, most in ((1, 7, 1), (3, 9, 9), (2, 17, 6)):
        x = torch.randn(batch, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
        inputs = {"x": x, "mask": torch.ones(batch, tokens, dtype=torch.int64)} if padded else {"x": x}
        slots = most if capacity is None else min(tokens, int(tokens * capacity) + 1)
        before = canonical(Moved(spelling, capacity=capacity, slots=slots).double(), **inputs)
        result = apply(STEP, before)
        assert (result.rewrites, result.declines) == (1, ())
        assert spelled(result.program) == []


def test_the_budget_is_read_off_the_choice() -> None:
    x = torch.randn(2, 24, WIDTH, dtype=torch.float64)
    after = Pipeline((STEP,)).run(canonical(Moved("gather", capacity=0.375, slots=10).double(), x=x))
    assert after.exported.constants["routing.budget_0"].tolist() == [3, 8, 1]
    assert budget_of([True, False, False, True, True, True], 6) is None  # a share that grows
    assert budget_of([True] * 5 + [False] * 3, 8) == (0, 1, 5)  # the first five, whatever comes
    assert budget_of([True] * 8, 8) == (1, 1, 0)


@pytest.mark.parametrize("name", RECOGNISED)
def test_other_spellings(name: str) -> None:
    before = canonical(Block(RECOGNISED[name]).double(), **block_inputs(RECOGNISED[name]))
    result = apply(STEP, before)
    assert (result.rewrites, result.declines) == (1, ())
    # Bits that are made of the index alone, in a way of their own, stay on the operator's index.
    assert spelled(result.program) == (["scatter"] if name == "outputs" else [])
    if name == "dispatch":
        check_golden("recognize_routing", before, result.program)


def block_inputs(forward: Callable[..., Any]) -> dict[str, Tensor]:
    x = torch.randn(3, 12, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, :9], mask[1, 8:] = 0, 0
    names = list(inspect.signature(forward).parameters)[1:]
    return dict(zip(names, (x, mask, mask.flip(1)), strict=False))


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_declined(name: str) -> None:
    result = STEP.run(canonical(Block(DECLINED[name]).double(), **block_inputs(DECLINED[name])))
    assert result.rewrites == 0
    assert [decline.code for decline in result.declines] == [f"recognize-routing.{name}"]


def test_every_reason_is_provoked_and_documented() -> None:
    assert {*DECLINED, "surprise"} == set(REASONS)  # "surprise": tests/passes/analysis/test_surprise.py
    page = (Path(__file__).resolve().parents[2] / "docs/troubleshooting.md").read_text(encoding="utf-8")
    assert {f"## recognize-routing.{reason}" for reason in REASONS} <= set(page.splitlines())


@pytest.mark.parametrize("name", NO_ROUTING)
def test_what_only_looks_like_routing(name: str) -> None:
    before = canonical(Block(NO_ROUTING[name]).double(), **block_inputs(NO_ROUTING[name]))
    result = STEP.run(before)
    assert (result.rewrites, result.declines) == (0, ())
    assert result.program is before


@pytest.mark.parametrize("spec", [Spec(mlp="moe"), Spec()], ids=["experts", "dense"])
def test_models_without_routing_are_left_alone(spec: Spec) -> None:
    _, program = captured(spec)
    result = STEP.run(canonical_pipeline().run(program))
    assert (result.rewrites, result.declines) == (0, ())


def test_reads_and_routing_of_one_model() -> None:
    """At capacity 1 the model computes what it does without routing, and at a half what its own code does."""
    for capacity in (1.0, 0.5):
        model = make("attn_res", depth=2, spelling="onehot", capacity=capacity)
        program = capture(model, example_inputs={"input_ids": ids(2, 12)})
        after = standard_pipeline(attn_res=None).run(program)
        assert (count(after, SELECT), count(after, SCATTER), count(after, READ)) == (2, 2, 4)
        examples = [ids(2, 12, 5)]
        with torch.no_grad():
            assert error(run(after, *examples), [model(*examples)]) <= FP64
        if capacity == 1.0:
            model.rule, threshold = "budget", -torch.inf  # every token, as it comes
            for name, buffer in model.named_buffers():
                if name.endswith("threshold"):
                    buffer.fill_(threshold)
            with torch.no_grad():
                assert error(run(after, *examples), [model(*examples)]) <= FP64


def test_gates_of_one_score_share_a_selection() -> None:
    """Two blocks that follow one choice."""

    def twice(block: Block, x: Tensor) -> Tensor:
        index = block.score(x).topk(SLOTS, dim=1).indices.sort(dim=1).values
        places = index.unsqueeze(-1).expand(-1, -1, WIDTH)
        x = x.scatter(1, places, block.mlp(x.gather(1, places)))
        return x.scatter(1, places, torch.tanh(block.mlp(x.gather(1, places))))

    before = canonical(Block(twice).double(), x=torch.randn(2, 12, WIDTH, dtype=torch.float64))
    result = apply(STEP, before)
    assert (result.rewrites, count(result.program, SCATTER)) == (1, 2)


def wrong_index(edit: GraphEditor) -> None:
    """Take out the rows of other tokens than those that are put back."""
    gather = named(edit, GATHER)[0]
    place: Any = gather.args[1]
    edit.set_arg(gather, 1, edit.call(torch.ops.aten.flip.default, (place, [1]), before=gather, like=gather))


def wrong_score(edit: GraphEditor) -> None:
    """Take the tokens of the lowest scores."""
    select = named(edit, SELECT)[0]
    score: Any = select.args[0]
    edit.set_arg(select, 0, edit.call(torch.ops.aten.neg.default, (score,), before=select, like=select))


def no_padding(edit: GraphEditor) -> None:
    """Select padding, too."""
    select = named(edit, SELECT)[0]
    valid: Any = select.args[1]
    true = edit.call(torch.ops.aten.ones_like.default, (valid,), before=select, like=select)
    edit.set_arg(select, 1, true)


def wrong_base(edit: GraphEditor) -> None:
    """Lose the tokens that are left out."""
    scatter = named(edit, SCATTER)[0]
    base: Any = scatter.args[0]
    edit.set_arg(scatter, 0, edit.call(torch.ops.aten.zeros_like.default, (base,), before=scatter, like=scatter))


@pytest.mark.parametrize("wrong", [wrong_index, wrong_score, no_padding, wrong_base])
def test_a_sabotaged_rewrite_fails(wrong: Callable[[GraphEditor], None]) -> None:
    inputs = block_inputs(RECOGNISED["additive-mask"])
    before = canonical(Block(RECOGNISED["additive-mask"]).double(), **inputs)
    after = Pipeline((STEP,)).run(before)
    assert_parity(before, after)
    with pytest.raises(AssertionError):
        assert_parity(before, sabotaged(after, wrong))
