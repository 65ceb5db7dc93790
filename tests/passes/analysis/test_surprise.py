from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from depthwire.export.capture import capture
from depthwire.models.routing_config import RoutingConfig
from depthwire.models.surprise import SurpriseGate
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.routing_ops import SCATTER, SELECT, SELECT_BUDGET, SURPRISE
from depthwire.passes.recognize_routing import RecognizeRouting
from depthwire.passes.standard import canonical_pipeline
from tests.passes.parity import FP64, error, named, run, sabotaged

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.passes._edit import GraphEditor
    from depthwire.program import Program

STEP = RecognizeRouting()
TOKENS, WIDTH, SLOTS = 14, 8, 6


class Scored(nn.Module):
    """Tokens chosen by a score of an update and its prediction, in a block that is scaled by a gate."""

    def __init__(self, score: Callable[..., tuple[Tensor, Tensor]], gate: nn.Module | None = None) -> None:
        super().__init__()
        self.spelled, self.gate, self.mlp = score, gate, nn.Linear(WIDTH, WIDTH)
        self.o_ce, self.m_cu = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.tensor(1.1))
        self.beta = nn.Parameter(torch.tensor([0.7, 0.4]))

    def forward(self, delta: Tensor, prior: Tensor, mask: Tensor | None = None) -> Tensor:
        valid = None if mask is None else mask != 0
        rank, gate = self.spelled(self, delta, prior, valid)
        ranked = rank if valid is None else rank.masked_fill(~valid, -torch.inf)
        index = ranked.topk(SLOTS, dim=1).indices.sort(dim=1).values
        places = index.unsqueeze(-1).expand(-1, -1, WIDTH)
        rows = delta.gather(1, places)
        new = rows + gate.gather(1, index).unsqueeze(-1) * self.mlp(rows)
        if valid is not None:
            new = torch.where(valid.gather(1, index).unsqueeze(-1), new, rows)
        return delta.scatter(1, places, new)


def reference(module: Any, delta: Tensor, prior: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    found = module.gate(delta, prior, valid)
    return found.rank, found.gate


def average(static: Tensor, window: int = 5) -> Tensor:
    """By a product with a band."""
    first = static[:, :1].expand(-1, window - 1)
    filled = torch.cat((first, static), 1)
    places = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS + window - 1)[None, :] + window - 1
    return filled @ ((places >= 0) & (places < window)).to(static.dtype).t() / window


def otherwise(module: Any, delta: Tensor, prior: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Powers, errors and a product of complements; the gate is ranked."""
    del valid
    static = delta.pow(2).sum(-1) / WIDTH
    change = F.mse_loss(delta, prior, reduction="none").mean(-1)
    a = (static - change + module.o_ce.log()) * module.beta[0]
    b = (static - average(delta.pow(2).mean(-1).detach()) * module.m_cu) * module.beta[1]
    gate = 1 - (1 - a.sigmoid()) * (1 - b.sigmoid())
    return gate, gate


def logarithms(module: Any, delta: Tensor, prior: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softplus by logarithms, and a prediction that is subtracted the other way round."""
    del valid
    static, change = (delta * delta).mean(-1), (prior - delta).square().mean(-1)
    a = module.beta[0] * static - module.beta[0] * change + module.beta[0] * module.o_ce.log()
    b = module.beta[1] * (static - module.m_cu * average(static))
    rank = torch.log1p(a.exp()) - F.logsigmoid(-b)
    return rank, 1 - (-rank).exp()


def no_average(module: Any, delta: Tensor, prior: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Half of it: the expected change twice."""
    del valid
    static, change = delta.square().mean(-1), (delta - prior).square().mean(-1)
    gate = (module.beta[0] * (static - change)).sigmoid() + (module.beta[1] * (static - change)).sigmoid()
    return gate, gate


def other_gate(module: Any, delta: Tensor, prior: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean of the sigmoids, not their probabilistic or."""
    del valid
    static, change = delta.square().mean(-1), (delta - prior).square().mean(-1)
    a, b = module.beta[0] * (static - change), module.beta[1] * (static - module.m_cu * average(static))
    gate = (a.sigmoid() + b.sigmoid()) / 2
    return gate, gate


def inputs(seed: int, *, padded: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    delta, prior = torch.randn(2, 3, TOKENS, WIDTH, generator=generator, dtype=torch.float64).unbind()
    mask = torch.ones(3, TOKENS, dtype=torch.int64)
    mask[0, : 3 + 3 * seed], mask[1, 9 - 2 * seed :] = 0, 0
    return [delta, prior * 0.5, mask] if padded else [delta, prior * 0.5]


def canonical(module: nn.Module, *, padded: bool = False) -> Program:
    examples = dict(zip(("delta", "prior", "mask"), inputs(0, padded=padded), strict=False))
    return canonical_pipeline().run(capture(module.double(), example_inputs=examples))


def difference(before: Program, after: Program, *, padded: bool = False) -> float:
    return max(error(run(after, *one), run(before, *one)) for one in (inputs(seed, padded=padded) for seed in range(3)))


@pytest.mark.parametrize("spelling", ["avg_pool1d", "conv1d", "cumsum"])
@pytest.mark.parametrize(("rank", "padded"), [("gate", True), ("softplus", False)])
def test_every_average_and_rank(spelling: Any, rank: Any, padded: bool) -> None:
    gate = SurpriseGate(RoutingConfig(average=spelling, rank=rank, window=4, beta="schedule" if padded else "learned"))
    before = canonical(Scored(reference, gate), padded=padded)
    after = Pipeline((STEP,)).run(before)
    score = [node for node in after.exported.graph.nodes if node.target is SURPRISE]
    assert [node.args[4] for node in score] == [4]
    assert not [node for node in after.exported.graph.nodes if "sigmoid" in str(node.target) or "pool" in node.name]
    assert difference(before, after, padded=padded) <= FP64
    assert STEP.run(after).rewrites == 0


@pytest.mark.parametrize("score", [otherwise, logarithms])
def test_other_spellings(score: Callable[..., tuple[Tensor, Tensor]]) -> None:
    before = canonical(Scored(score))
    after = Pipeline((STEP,)).run(before)
    assert [node.args[4] for node in after.exported.graph.nodes if node.target is SURPRISE] == [5]
    assert difference(before, after) <= FP64


@pytest.mark.parametrize("score", [no_average, other_gate])
def test_another_score_is_kept(score: Callable[..., tuple[Tensor, Tensor]]) -> None:
    before = canonical(Scored(score))
    after = Pipeline((STEP,)).run(before)
    assert after.history[-1].rewrites == 1
    assert [decline["code"] for decline in map(_as_dict, after.history[-1].declines)] == ["recognize-routing.surprise"]
    assert not [node for node in after.exported.graph.nodes if node.target is SURPRISE]
    assert difference(before, after) <= FP64


def _as_dict(decline: Any) -> dict[str, str]:
    return decline if isinstance(decline, dict) else decline.as_dict()


def test_a_saturated_gate_is_ranked_by_the_surprise() -> None:
    """Where the gates are 1 to the last bits, top-k of the gate takes what it likes; of the surprise, the greatest."""
    gate = SurpriseGate(RoutingConfig(rank="gate", window=4, beta="schedule"))
    gate.set_step(1, 1)
    with torch.no_grad():
        gate.beta_ce.fill_(4000.0)
    module = Scored(reference, gate)
    delta = inputs(3, padded=False)[0].float()
    examples = [delta, delta * 0.9]
    assert gate(*examples).gate.unique().numel() < SLOTS
    before = canonical_pipeline().run(capture(module, example_inputs={"delta": delta, "prior": examples[1]}))
    after = Pipeline((STEP,)).run(before)
    changed = (run(after, *examples)[0] != examples[0]).any(-1)
    gate.ranked = "softplus"
    wanted = gate(*examples).rank.topk(SLOTS, dim=1).indices.sort(dim=1).values
    assert torch.equal(changed.nonzero()[:, 1].reshape(3, SLOTS), wanted)


def test_a_threshold_on_the_gate_is_one_on_the_surprise() -> None:
    class Budget(Scored):
        def forward(self, delta: Tensor, prior: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: ARG002
            _, gate = self.spelled(self, delta, prior, None)
            bits = gate >= 0.8
            index = (~bits).to(torch.int64).argsort(dim=1, stable=True)
            places = index.unsqueeze(-1).expand(-1, -1, WIDTH)
            rows = delta.gather(1, places)
            return delta.scatter(1, places, torch.where(bits.gather(1, index).unsqueeze(-1), self.mlp(rows), rows))

    before = canonical(Budget(reference, SurpriseGate(RoutingConfig(window=4))))
    after = Pipeline((STEP,)).run(before)
    assert [node.target for node in after.exported.graph.nodes].count(SELECT_BUDGET) == 1
    assert difference(before, after) <= FP64
    changed = (run(after, *inputs(0, padded=False))[0] != inputs(0, padded=False)[0]).any(-1)
    assert 0 < int(changed.sum()) < changed.numel()


def test_a_wrong_criterion_is_noticed() -> None:
    before = canonical(Scored(logarithms))
    after = Pipeline((STEP,)).run(before)

    def swap(edit: GraphEditor) -> None:
        score = named(edit, SURPRISE)[0]
        delta, prior = score.args[:2]
        edit.set_arg(score, 0, prior)
        edit.set_arg(score, 1, delta)

    assert named_targets(after) == {SURPRISE, SELECT, SCATTER}
    assert difference(before, sabotaged(after, swap)) > 1e-3


def named_targets(program: Program) -> set[Any]:
    wanted = {SURPRISE, SELECT, SCATTER}
    return {node.target for node in program.exported.graph.nodes} & wanted
