"""The surprise gate against the operator, the paper's formulas and its own algebra; priors and routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from depthwire.models.priors import PriorFfn, prior_width
from depthwire.models.routers import LinearRouter, TemporalRouter, imitation_loss, neutral_gate, previous
from depthwire.models.routing_config import RoutingConfig
from depthwire.models.surprise import RecentSurprise, SurpriseGate
from depthwire.ops import surprise_score
from tests.models.routed import close, padding, surprise

AVERAGES = ("avg_pool1d", "conv1d", "cumsum")


def updates(tokens: int = 24, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(batch, tokens, 1, dtype=torch.float64, generator=generator) * 3
    update = torch.randn(batch, tokens, 16, dtype=torch.float64, generator=generator) * size
    return update, update + torch.randn(batch, tokens, 16, dtype=torch.float64, generator=generator)


def gate(**routing: Any) -> SurpriseGate:
    return SurpriseGate(RoutingConfig(**{"window": 7, **routing})).double()


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("padded", [False, True])
def test_it_ranks_as_the_operator_does(average: str, padded: bool) -> None:
    update, predicted = updates()
    valid = padding().bool() if padded else torch.ones(3, 24, dtype=torch.bool)
    for window in (1, 7, 100):
        module = gate(average=average, window=window)
        got = module(update, predicted, valid if padded else None).rank
        want = surprise_score(update, predicted, module.criteria(), valid, window)
        close(got[valid], want[valid])


@torch.no_grad()
def test_it_is_the_paper_s_gate_and_the_rank_orders_as_it_does() -> None:
    module, (update, predicted) = gate(), updates()
    got = module(update, predicted)
    for row in range(3):
        rank, gates = surprise(update[row], predicted[row], module)
        close(got.rank[row], rank)
        close(got.gate[row], gates)
    close(got.gate, -torch.expm1(-got.rank))
    published = gate(rank="gate")
    close(published(update, predicted).rank, got.gate)


def test_the_published_gate_saturates_and_the_rank_does_not() -> None:
    module = SurpriseGate(RoutingConfig(beta="schedule"))
    module.set_step(400, 400)
    assert [beta.item() for beta in module.steepness()] == [100.0, 100.0]
    update, predicted = (x.float() for x in updates(200, 1))
    found = module(update, predicted)
    flat = found.gate == 1  # the tokens that matter most, and the published ranking cannot tell them apart
    assert int(flat.sum()) > 100
    assert len(set(found.rank[flat].tolist())) == int(flat.sum())


def test_the_schedule_waits_and_rises() -> None:
    module = SurpriseGate(RoutingConfig(beta="schedule"))
    steps = {0: 0.1, 100: 0.1, 250: 50.05, 400: 100.0, 900: 100.0}
    for step, beta in steps.items():
        module.set_step(step, 400)
        assert float(module.beta_ce) == pytest.approx(beta, rel=1e-6)  # one fp32 number
    learned = SurpriseGate(RoutingConfig())
    learned.set_step(400, 400)
    assert [round(beta.item(), 3) for beta in learned.steepness()] == [0.554, 0.437]


def test_what_stands_under_the_logarithm_stays_positive() -> None:
    module, (update, predicted) = gate(), updates()
    with torch.no_grad():
        module.o_ce.fill_(-0.1)
        assert bool(module(update, predicted).rank.isnan().all())
        module.set_step(1, 10)
        assert bool(module(update, predicted).rank.isfinite().all())
        assert module.o_ce.item() > 0


def test_no_gradient_flows_through_the_average() -> None:
    update, predicted = updates()
    update.requires_grad_()
    rank = gate()(update, predicted).rank
    torch.autograd.backward(rank[:, -1].sum())
    assert update.grad is not None
    assert bool((update.grad[:, :-1] == 0).all())
    assert bool((update.grad[:, -1] != 0).any())


@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_chunks_have_the_average_of_the_whole(side: str) -> None:
    update, predicted = updates()
    module = gate()
    want = module(update, predicted).rank
    first = torch.ones(3, 9, dtype=torch.bool)
    filler = torch.full((3, 4, 16), 7.0, dtype=torch.float64)
    head, foreseen = update[:, :9], predicted[:, :9]
    if side == "left":
        head, foreseen = torch.cat((filler, head), 1), torch.cat((filler, foreseen), 1)
        first = torch.cat((torch.zeros(3, 4, dtype=torch.bool), first), 1)
    elif side == "right":
        head, foreseen = torch.cat((head, filler), 1), torch.cat((foreseen, filler), 1)
        first = torch.cat((first, torch.zeros(3, 4, dtype=torch.bool)), 1)
    recent = RecentSurprise(3, 7)
    got = [module(head, foreseen, first, recent).rank[first].reshape(3, 9)]
    nothing = torch.zeros(3, 2, dtype=torch.bool)
    module(filler[:, :2], filler[:, :2], nothing, recent)  # a chunk of padding alone leaves no trace
    for start, end in ((9, 10), (10, 20), (20, 24)):
        got.append(module(update[:, start:end], predicted[:, start:end], None, recent).rank)
    close(torch.cat(got, 1), want)


def test_the_neutral_gate_is_1_and_passes_the_gradient() -> None:
    score = torch.tensor([1e-30, 0.1, 0.3, 0.9999999, 1.0], requires_grad=True)
    factor = neutral_gate(score)
    assert torch.equal(factor.detach(), torch.ones(5))
    torch.autograd.backward((factor * torch.arange(5.0)).sum())
    assert score.grad is not None
    assert torch.equal(score.grad, torch.arange(5.0))


@pytest.mark.parametrize(("factor", "hidden"), [(1 / 16, 56), (1 / 8, 112), (1 / 1000, 2), (0.0034, 4), (0.5, 448)])
def test_the_width_of_a_prior_is_even(factor: float, hidden: int) -> None:
    assert prior_width(896, factor) == hidden
    assert sum(p.numel() for p in PriorFfn(896, factor, 1e-6).parameters()) == 3 * 896 * hidden + 896


def test_a_prior_is_the_swiglu_of_the_normed_input() -> None:
    prior = PriorFfn(8, 0.5, 1e-5).double()
    x = updates()[0][..., :8]
    u = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * prior.norm.weight
    gated = u @ prior.gate_proj.weight.T
    close(prior(x), (gated / (1 + (-gated).exp()) * (u @ prior.up_proj.weight.T)) @ prior.down_proj.weight.T)


def test_routers_score_in_fp32_and_the_student_sees_its_predecessor() -> None:
    x = updates()[0].bfloat16()
    assert LinearRouter(16).bfloat16()(x).dtype == torch.float32
    student = TemporalRouter(16).double()
    x, valid = updates()[0], padding().bool()
    score = student(x, previous(x, valid))
    now, then = student.proj.weight[0].chunk(2)
    close(score[2, 5], x[2, 5] @ now + x[2, 4] @ then)
    close(score[0, 5], x[0, 5] @ now)  # the first valid token has no predecessor
    close(student(x, previous(x, None, x[:, 3]))[:, 0], x[:, 0] @ now + x[:, 3] @ then)


def test_padding_has_no_part_in_the_imitation_loss() -> None:
    logits, taken, valid = updates()[0][..., 0], updates()[1][..., 0] > 0, padding().bool()
    entropy = -(logits.sigmoid().log() * taken + (-logits).sigmoid().log() * ~taken)
    close(imitation_loss(logits, taken, valid), entropy[valid].mean())
    close(imitation_loss(logits, taken, None), entropy.mean())
