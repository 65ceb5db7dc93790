"""Routed blocks as people write them, and what looks like one and is not: ``[batch, tokens, width]`` to the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, SLOTS = 8, 5


class Block(nn.Module):
    """A router, an MLP and one head of attention, put together by a function."""

    threshold: Tensor

    def __init__(self, forward: Callable[..., Any], *, slots: int = SLOTS) -> None:
        super().__init__()
        self.router, self.project = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)
        self.experts = nn.Linear(WIDTH, 4)
        self.register_buffer("threshold", torch.tensor(0.05))
        self.slots, self.spelled = slots, forward
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None, other: Tensor | None = None) -> Any:
        return self.spelled(self, x, *(given for given in (mask, other) if given is not None))

    def mlp(self, x: Tensor) -> Tensor:
        return self.project(x)  # type: ignore[no-any-return]

    def score(self, x: Tensor) -> Tensor:
        return self.router(x).squeeze(-1)  # type: ignore[no-any-return]

    def attend(self, rows: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        heads = rows.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask, is_causal=causal)
        return self.mlp(mixed.squeeze(1))


def wide(index: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, WIDTH)


def mixture_of_depths(block: Block, x: Tensor) -> Tensor:
    """As several public implementations: weights and indices of one top-k, sorted together, and scatter_add."""
    weights, chosen = block.score(x).topk(block.slots, dim=1, sorted=False)
    index, order = chosen.sort(dim=1)
    weights = weights.gather(1, order)
    rows = x.gather(1, wide(index))
    update = block.attend(rows, causal=True) * weights.unsqueeze(-1)
    return x.scatter_add(1, wide(index), update)


def argsorted(block: Block, x: Tensor) -> Tensor:
    """A stable argsort, and an assignment by index."""
    index = block.score(x).argsort(dim=1, descending=True)[:, : block.slots].sort(dim=1)[0]
    rows = torch.take_along_dim(x, index.unsqueeze(-1), dim=1)
    out = x.clone()
    out[torch.arange(x.shape[0])[:, None], index] = block.attend(rows, causal=True)
    return out


def kth_value(block: Block, x: Tensor) -> Tensor:
    """Bits by comparison with the k-th value, slots by a sort of the bits."""
    score = block.score(x)
    bits = score >= score.topk(block.slots, dim=1).values[:, -1:]
    index = (~bits).to(torch.int64).argsort(dim=1, stable=True)[:, : block.slots]
    rows = x.gather(1, wide(index))
    return x.scatter(1, wide(index), rows + block.attend(rows, causal=True))


def dispatched(block: Block, x: Tensor) -> Tensor:
    """One matrix to dispatch and to combine, by batched products, and zeros for the tokens left out."""
    index = block.score(x).topk(block.slots, dim=1).indices.sort(dim=1).values
    matrix = F.one_hot(index, x.shape[1]).to(x.dtype)
    return torch.bmm(matrix.transpose(1, 2), block.attend(torch.bmm(matrix, x), causal=True))


def unsorted_mlp(block: Block, x: Tensor) -> Tensor:
    """Slots in the order of the scores: the same for a block in which tokens do not meet."""
    index = block.score(x).topk(block.slots, dim=1).indices
    return x.scatter(1, wide(index), torch.tanh(block.mlp(x.gather(1, wide(index)))))


def thresholded(block: Block, x: Tensor) -> Tensor:
    """Every token above a constant, in as many slots as there are tokens."""
    bits = block.score(x) >= 0.1
    index = (~bits).to(torch.int64).argsort(dim=1, stable=True)
    taken = bits.gather(1, index)
    rows = x.gather(1, wide(index))
    new = rows + block.attend(rows, causal=True)
    return x.scatter(1, wide(index), torch.where(taken.unsqueeze(-1), new, rows))


def additive_mask(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    """Padding by a large negative number, bits gathered from the mask."""
    score = block.score(x) + (1 - mask.to(x.dtype)) * -1e9
    index = score.topk(block.slots, dim=1).indices.sort(dim=1).values
    taken = mask.gather(1, index).bool()
    rows = x.gather(1, wide(index))
    lower = torch.ones(block.slots, block.slots, dtype=torch.bool).tril()
    visible = (lower & taken[:, None, :]) | torch.eye(block.slots, dtype=torch.bool)
    new = rows + block.attend(rows, visible[:, None])
    return x.scatter(1, wide(index), torch.where(taken.unsqueeze(-1), new, rows))


def with_outputs(block: Block, x: Tensor) -> tuple[Tensor, ...]:
    """The index, the bits of the tokens and the scores of the slots are outputs, too."""
    score = block.score(x)
    values, index = score.topk(block.slots, dim=1)
    index, order = index.sort(dim=1)
    bits = torch.zeros_like(score, dtype=torch.bool).scatter(1, index, value=True)
    rows = x.gather(1, wide(index))
    return x.scatter(1, wide(index), block.mlp(rows)), index + 1, bits.to(x.dtype), values.gather(1, order)


RECOGNISED: dict[str, Callable[..., Any]] = {
    "mixture-of-depths": mixture_of_depths,
    "argsort": argsorted,
    "kth-value": kth_value,
    "dispatch": dispatched,
    "unsorted-mlp": unsorted_mlp,
    "threshold": thresholded,
    "additive-mask": additive_mask,
    "outputs": with_outputs,
}


def across_sequences(block: Block, x: Tensor) -> Tensor:
    index = block.score(x).flatten().topk(block.slots).indices.sort().values
    row, place = index // x.shape[1], index % x.shape[1]
    return x.index_put((row, place), block.mlp(x[row, place]))


def bottom(block: Block, x: Tensor) -> Tensor:
    index = block.score(x).topk(block.slots, dim=1, largest=False).indices.sort(dim=1).values
    return x.scatter(1, wide(index), block.mlp(x.gather(1, wide(index))))


def two_masks(block: Block, x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
    score = block.score(x).masked_fill(mask == 0, -torch.inf).masked_fill(other != 0, -torch.inf)
    index = score.topk(block.slots, dim=1).indices.sort(dim=1).values
    return x.scatter(1, wide(index), block.mlp(x.gather(1, wide(index))))


def overwrites_padding(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    score = block.score(x).masked_fill(mask == 0, -torch.inf)
    index = score.topk(block.slots, dim=1).indices.sort(dim=1).values
    return x.scatter(1, wide(index), block.mlp(x.gather(1, wide(index))))


def sees_padding(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    score = block.score(x).masked_fill(mask == 0, -torch.inf)
    index = score.topk(block.slots, dim=1).indices.sort(dim=1).values
    taken = (mask != 0).gather(1, index)
    rows = x.gather(1, wide(index))
    return x.scatter(1, wide(index), torch.where(taken.unsqueeze(-1), block.attend(rows), rows))


def expert_choice(block: Block, x: Tensor) -> Tensor:
    index = block.experts(x).transpose(1, 2).topk(block.slots, dim=2).indices
    out = x
    for expert in range(index.shape[1]):
        rows = x.gather(1, wide(index[:, expert]))
        out = out.scatter_add(1, wide(index[:, expert]), block.mlp(rows))
    return out


def mixes_slots(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    score = block.score(x).masked_fill(mask == 0, -torch.inf)
    index = score.topk(block.slots, dim=1).indices.sort(dim=1).values
    taken = (mask != 0).gather(1, index)
    rows = x.gather(1, wide(index))
    return x.scatter(1, wide(index), torch.where(taken.unsqueeze(-1), block.mlp(rows.cumsum(1)), rows))


def unsorted_causal(block: Block, x: Tensor) -> Tensor:
    index = block.score(x).topk(block.slots, dim=1).indices
    return x.scatter(1, wide(index), block.attend(x.gather(1, wide(index)), causal=True))


DECLINED: dict[str, Callable[..., Any]] = {
    "across-sequences": across_sequences,
    "another-rule": bottom,
    "padding-form": two_masks,
    "padding-overwritten": overwrites_padding,
    "padding-visible": sees_padding,
    "several-choices": expert_choice,
    "slots-mixed": mixes_slots,
    "unsorted": unsorted_causal,
}


def experts(block: Block, x: Tensor) -> Tensor:
    weights, chosen = block.experts(x).softmax(-1).topk(2, dim=-1)
    gates = torch.zeros(*x.shape[:2], 4, dtype=x.dtype).scatter(2, chosen, weights)
    return x + gates.sum(-1, keepdim=True) * block.mlp(x)


def sampling(block: Block, x: Tensor) -> Tensor:
    logits = block.experts(x[:, -1])
    values, chosen = logits.topk(3, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(1, chosen, values).softmax(-1)


def beams(block: Block, x: Tensor) -> Tensor:
    total = (block.experts(x[:, -1]).log_softmax(-1)).flatten(1)
    values, chosen = total.topk(2, dim=1)
    return x[torch.arange(x.shape[0])[:, None], chosen % x.shape[1]] * values.unsqueeze(-1)  # type: ignore[no-any-return]


def dense(block: Block, x: Tensor) -> Tensor:
    score = block.score(x)
    bits = score >= score.topk(block.slots, dim=1).values[:, -1:]
    return torch.where(bits.unsqueeze(-1), block.mlp(x), x)


def pruned(block: Block, x: Tensor) -> Tensor:
    index = block.score(x).topk(block.slots, dim=1).indices.sort(dim=1).values
    return torch.tanh(block.mlp(x.gather(1, wide(index))))


def attention(block: Block, x: Tensor) -> Tensor:
    heads = x.unsqueeze(1)
    return x + ((heads @ heads.transpose(-1, -2)).softmax(-1) @ heads).squeeze(1) + x.softmax(-1) @ block.project.weight


NO_ROUTING: dict[str, Callable[..., Any]] = {
    "experts": experts,
    "sampling": sampling,
    "beams": beams,
    "dense": dense,
    "pruned": pruned,
    "attention": attention,
}
