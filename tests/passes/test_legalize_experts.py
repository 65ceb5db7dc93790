from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transformers.integrations.moe  # noqa: F401 - registers the grouped product
from torch import Tensor, nn

from depthwire.passes._pipeline import Pipeline
from depthwire.passes.canonicalize_constants import CanonicalizeConstants
from depthwire.passes.legalize_experts import LegalizeExperts
from depthwire.passes.remove_noops import RemoveNoops
from tests.passes.parity import apply, assert_parity, check_golden, error, named, run, sabotaged
from tests.zoo import program_of

if TYPE_CHECKING:
    from depthwire.passes._edit import GraphEditor
    from depthwire.program import Program

aten = torch.ops.aten
WIDTH, INNER = 4, 6


class Experts(nn.Module):
    """Sparse experts as transformers spells them, with a router whose scores are an input.

    ``form``: gated (one product for gate and up), bias, norm (behind the second product), or a break of the pattern.
    """

    def __init__(self, experts: int, top_k: int, form: str = "gated") -> None:
        super().__init__()
        self.experts, self.top_k, self.form = experts, top_k, form
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inner = INNER if form in ("bias", "single") else 2 * INNER
            self.up = nn.Parameter(torch.randn(experts, inner, WIDTH))
            self.down = nn.Parameter(torch.randn(experts, WIDTH, INNER))
            self.up_bias = nn.Parameter(torch.randn(experts, inner))
            self.down_bias = nn.Parameter(torch.randn(experts, WIDTH))
            self.norm = nn.RMSNorm(WIDTH)
        self.double()

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        weights, chosen = scores.topk(self.top_k, -1)
        if self.form == "given":
            chosen = scores[:, : self.top_k].long()
        flat = chosen.reshape(-1)
        ids, order = torch.sort(flat)
        rows = x[order // self.top_k]
        counts = torch.histc(ids.float(), bins=self.experts, min=0, max=self.experts - 1)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        hidden = product(rows, self.up.transpose(-2, -1), ends)
        if self.form == "bias":
            hidden = torch.nn.functional.gelu(hidden + self.up_bias[ids])
        elif self.form == "single":
            hidden = hidden.relu().clamp(max=3.0) * rows[:, :1]
        else:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = torch.nn.functional.silu(gate) * up
        out = product(hidden, self.down.transpose(-2, -1), ends)
        out = out + self.down_bias[ids] if self.form == "bias" else out
        out = self.norm(out) if self.form == "norm" else out
        weighted = out * weights.reshape(-1)[order].unsqueeze(-1)
        inverse = torch.empty_like(order).index_put((order,), torch.arange(order.shape[0]))
        result: Tensor = weighted[inverse].view(x.shape[0], self.top_k, WIDTH).sum(1)
        if self.form == "sorted":
            result = result + weighted.amax()
        return result


def program(experts: int, top_k: int, tokens: int, form: str = "gated") -> Program:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=generator)
    scores = torch.rand(tokens, experts, dtype=torch.float64, generator=generator)
    captured = program_of(Experts(experts, top_k, form), {"x": x, "scores": scores})
    return Pipeline((RemoveNoops(), CanonicalizeConstants())).run(captured)


def splits(experts: int, tokens: int) -> dict[str, Tensor]:
    """Scores that send rows to experts in ways that the example does not: to few, to the last, to all alike."""
    generator = torch.Generator().manual_seed(2)
    ramp = torch.arange(1, experts + 1, dtype=torch.float64)
    turning = torch.stack([torch.roll(ramp, token) for token in range(tokens)])
    return {
        "first": 1.0 / ramp.expand(tokens, experts),
        "last": ramp.expand(tokens, experts),
        "turning": turning,
        "random": torch.randn(tokens, experts, dtype=torch.float64, generator=generator),
    }


DENSE, GATHERED = (4, 2, 7), (9, 2, 3)  # experts, top-k, tokens


@pytest.mark.parametrize("sizes", [DENSE, GATHERED, (4, 1, 5), (6, 6, 1)])
@pytest.mark.parametrize("form", ["gated", "bias", "norm", "single"])
def test_every_split(sizes: tuple[int, int, int], form: str) -> None:
    before = program(*sizes, form)
    result = apply(LegalizeExperts(), before)
    assert (result.rewrites, result.declines) == (1, ())
    names = {node.name for node in result.program.exported.graph.nodes}
    assert not any(name.startswith(("grouped_mm", "sort", "histc", "index_put")) for name in names)
    x = before.example_inputs["x"]
    for name, scores in splits(sizes[0], sizes[2]).items():
        assert error(run(result.program, x, scores), run(before, x, scores)) <= 1e-12, name


def test_an_expert_that_overflows_for_tokens_of_others_does_no_harm() -> None:
    before = program(*DENSE)
    state = dict(before.exported.state_dict)
    state["up"] = nn.Parameter(state["up"].detach().clone().index_fill_(0, torch.tensor([3]), float("inf")))
    before = before.with_state(state)
    after = LegalizeExperts().run(before).program
    x, scores = before.example_inputs["x"], splits(DENSE[0], DENSE[2])["first"]
    (got,) = run(after, x, scores)
    assert bool(got.isfinite().all())
    assert error([got], run(before, x, scores)) <= 1e-12


def test_the_form_follows_from_the_shape() -> None:
    dense = LegalizeExperts().run(program(*DENSE)).program.exported.graph
    gathered = LegalizeExperts().run(program(*GATHERED)).program.exported.graph
    shapes = [
        [tuple(n.meta["val"].shape) for n in g.nodes if n.target is aten.matmul.default] for g in (dense, gathered)
    ]
    experts, top_k, tokens = DENSE
    assert shapes[0] == [(experts, tokens, 2 * INNER), (experts, tokens, WIDTH)]  # not experts x rows
    experts, top_k, tokens = GATHERED
    assert shapes[1] == [(tokens * top_k, 1, 2 * INNER), (tokens * top_k, 1, WIDTH)]


@pytest.mark.parametrize(("form", "code"), [("given", "unbounded-ids"), ("sorted", "sorted-rows")])
def test_declines(form: str, code: str) -> None:
    result = LegalizeExperts().run(program(*DENSE, form))
    assert result.rewrites == 0
    assert [decline.code for decline in result.declines] == [f"legalize-experts.{code}"]


@pytest.mark.parametrize(("name", "sizes"), [("", (3, 2, 2)), ("_gathered", (4, 2, 2))])
def test_golden(name: str, sizes: tuple[int, int, int]) -> None:
    before = program(*sizes)
    check_golden(f"legalize_experts{name}", before, apply(LegalizeExperts(), before).program)


def test_gradients_reach_every_weight() -> None:
    before = program(*DENSE)
    module = LegalizeExperts().run(before).program.module()
    x, scores = before.example_inputs["x"], before.example_inputs["scores"]
    module(x, scores).square().sum().backward()
    reference = before.module()
    reference(x, scores).square().sum().backward()
    for (name, got), (_, want) in zip(module.named_parameters(), reference.named_parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_the_wrong_expert_is_noticed() -> None:
    before = program(*DENSE)
    after = LegalizeExperts().run(before).program

    def shift(edit: GraphEditor) -> None:
        pick = named(edit, aten.index_select.default)[-1]
        place = pick.args[2]
        assert isinstance(place, torch.fx.Node)
        other = edit.call(aten.remainder.Scalar, (place, 4 * 7 - 1), before=pick, like=pick)
        edit.reroute(pick, place, other)

    x, last = before.example_inputs["x"], splits(DENSE[0], DENSE[2])["last"]
    assert error(run(sabotaged(after, shift), x, last), run(before, x, last)) > 1e-3
    with pytest.raises(AssertionError):
        assert_parity(before, sabotaged(after, lambda edit: edit.replace(*_product_and_operand(edit))))


def _product_and_operand(edit: GraphEditor) -> tuple[torch.fx.Node, torch.fx.Node]:
    weighted = [node for node in named(edit, aten.mul.Tensor) if isinstance(node.args[1], torch.fx.Node)][-1]
    operand = weighted.args[0]
    assert isinstance(operand, torch.fx.Node)
    return weighted, operand
