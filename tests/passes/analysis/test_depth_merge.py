"""Reads in two phases, merged by online softmax: found as one read where they are one, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from depthwire.passes.recognize_attn_res import RecognizeAttnRes
from tests.passes.native_attn_res import merges, spellings
from tests.passes.native_attn_res.capture import canonical, reads_of, stacks_of
from tests.passes.native_attn_res.merges import WIDTH, Part
from tests.passes.parity import apply

if TYPE_CHECKING:
    from collections.abc import Callable

STEP = RecognizeAttnRes()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("merge", merges.MERGES, ids=lambda merge: merge.__name__)
def test_merged_parts_are_one_read(merge: merges.Merge, joint: bool) -> None:
    program = canonical(merges.build(merge, joint=joint), spellings.example())
    result = apply(STEP, program)
    assert result.rewrites == merges.READS
    assert not result.declines
    assert [len(read.args[1]) for read in reads_of(result.program)] == [1, 2, 2, 3, 3, 4]  # type: ignore[arg-type]
    assert stacks_of(result.program) == []
    operators = {str(node.target) for node in result.program.exported.graph.nodes if node.op == "call_function"}
    assert operators == {
        "depthwire.attn_res_read.default",
        "aten.linear.default",
        "aten.tanh.default",
        "aten.add.Tensor",
    }


class Two(nn.Module):
    """Two sources and two others, each with logits of their own, merged."""

    def __init__(self, merge: Callable[[Part, Part], Tensor], eps: float = 1e-3, late: int = 2) -> None:
        super().__init__()
        self.merge, self.eps, self.late = merge, eps, late
        self.queries = nn.Parameter(torch.randn(2, WIDTH))
        self.bias = nn.Parameter(torch.tensor(0.7))
        self.other = 0

    def part(self, sources: list[Tensor], row: int, eps: float) -> Part:
        v = torch.stack(sources)
        return Part(v, v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) @ self.queries[row])

    def forward(self, x: Tensor) -> Tensor:
        sources = [x, x.sin(), x.cos(), x.tanh()]
        split = 4 - self.late
        first, second = self.part(sources[:split], 0, 1e-3), self.part(sources[split:], self.other, self.eps)
        return self.merge(first, second)


def largest(model: nn.Module) -> tuple[int, torch.fx.Node | None]:
    """Return how many sources the largest read of a model has, and that read. Parity is checked."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    reads = reads_of(apply(STEP, canonical(model.double(), spellings.example(batch=3, length=3))).program)
    return max(((len(read.args[1]), read) for read in reads), key=lambda each: each[0], default=(0, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("late", [1, 3])
def test_parts_of_any_size(late: int) -> None:
    assert largest(Two(merges.accumulators, late=late))[0] == 4


def test_a_bias_of_the_last_source_stays_its_own() -> None:
    model = Two(lambda a, b: merges.exponentials(a, b._replace(logits=b.logits + model.bias)), late=1)
    count, read = largest(model)
    assert count == 4
    assert read is not None
    assert read.args[5] == pytest.approx(float(model.bias.detach()))


def test_a_bias_of_both_parts_is_none() -> None:
    model = Two(lambda a, b: merges.shares(*(Part(each.values, each.logits + model.bias) for each in (a, b))))
    count, read = largest(model)
    assert count == 4
    assert read is not None
    assert len(read.args) == 4


def other_query(model: Two) -> None:
    model.other = 1


def other_eps(model: Two) -> None:
    model.eps = 1e-2


@pytest.mark.parametrize("change", [other_query, other_eps], ids=lambda change: change.__name__)
@pytest.mark.parametrize("merge", merges.MERGES[::3], ids=lambda merge: merge.__name__)
def test_parts_with_other_logits_stay_apart(merge: merges.Merge, change: Callable[[Two], None]) -> None:
    model = Two(merge, late=1)
    change(model)
    assert largest(model)[0] < 4


def swapped_weights(a: Part, b: Part) -> Tensor:
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    m = torch.maximum(lse1, lse2)
    w1, w2 = torch.exp(lse1 - m).unsqueeze(-1), torch.exp(lse2 - m).unsqueeze(-1)
    return (w2 * o1 + w1 * o2) / (w1 + w2)


def not_rescaled(a: Part, b: Part) -> Tensor:
    e1, e2 = torch.exp(a.logits - a.logits.amax(0)), torch.exp(b.logits - b.logits.amax(0))
    total = (e1.unsqueeze(-1) * a.values).sum(0) + (e2.unsqueeze(-1) * b.values).sum(0)
    return total / (e1.sum(0) + e2.sum(0)).unsqueeze(-1)


def rescaled_in_part(a: Part, b: Part) -> Tensor:
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    w1, w2 = torch.exp(lse1 - torch.maximum(lse1, lse2)).unsqueeze(-1), lse2.exp().unsqueeze(-1)
    return (w1 * o1 + w2 * o2) / (w1 + w2)


def maximum_of_other_tokens(a: Part, b: Part) -> Tensor:
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    m = torch.maximum(lse1, lse2)
    w1, w2 = torch.exp(lse1 - m).unsqueeze(-1), torch.exp(lse2 - m.mT).unsqueeze(-1)
    return (w1 * o1 + w2 * o2) / (w1 + w2)


def weights_of_other_tokens(a: Part, b: Part) -> Tensor:
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    w1, w2 = lse1.exp().mT.unsqueeze(-1), lse2.exp().mT.unsqueeze(-1)
    return (w1 * o1 + w2 * o2) / (w1 + w2)


def doubled_total(a: Part, b: Part) -> Tensor:
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    w1, w2 = lse1.exp().unsqueeze(-1), lse2.exp().unsqueeze(-1)
    return (w1 * o1 + w2 * o2) / (w1 + 2 * w2)


def reversed_share(a: Part, b: Part) -> Tensor:
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    return o1 + torch.sigmoid(lse1 - lse2).unsqueeze(-1) * (o2 - o1)


def moved_too_far(a: Part, b: Part) -> Tensor:
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    return o1 + torch.sigmoid(lse2 - lse1).unsqueeze(-1) * (o2 + o1)


def moved_from_elsewhere(a: Part, b: Part) -> Tensor:
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    return o2 + torch.sigmoid(lse2 - lse1).unsqueeze(-1) * (o2 - o1)


def shifted_share(a: Part, b: Part) -> Tensor:
    (o1, lse1), (o2, lse2) = a.read(), b.read()
    share = torch.sigmoid(lse2 - lse1 - torch.maximum(lse1, lse2)).unsqueeze(-1)
    return (1 - share) * o1 + share * o2


def part_of_itself(a: Part, b: Part) -> Tensor:
    (o1, lse1), (o2, _) = a.read(), b.read()
    w1, w2 = lse1.exp().unsqueeze(-1), lse1.exp().unsqueeze(-1)
    return (w1 * o1 + w2 * o2) / (w1 + w2)


@pytest.mark.parametrize(
    "merge",
    [
        swapped_weights,
        not_rescaled,
        rescaled_in_part,
        maximum_of_other_tokens,
        weights_of_other_tokens,
        doubled_total,
        reversed_share,
        moved_too_far,
        moved_from_elsewhere,
        shifted_share,
        part_of_itself,
    ],
    ids=lambda merge: merge.__name__,
)
def test_what_is_no_merge_stays(merge: merges.Merge) -> None:
    assert largest(Two(merge))[0] < 4
