"""Decoding under the budget: chunks and single tokens compute what the whole sequence computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from depthwire.errors import UsageError
from tests.models.routed import FP64, KINDS, SPELLINGS, close, ids, make

if TYPE_CHECKING:
    from depthwire.models.routed_decoder import RoutedDecoder
    from depthwire.models.routing_config import Kind

kinds = pytest.mark.parametrize("kind", KINDS)


def stepped(model: RoutedDecoder, tokens: Tensor, chunks: list[int]) -> Tensor:
    state = model.start(tokens.shape[0], tokens.shape[1], max(chunks))
    return torch.cat([model.step(chunk, state) for chunk in torch.split(tokens, chunks, dim=1)], 1)


@kinds
@pytest.mark.parametrize("spelling", SPELLINGS)
@torch.no_grad()
def test_a_prompt_and_single_steps_are_the_whole(kind: Kind, spelling: str) -> None:
    tokens = ids()
    for kv in ("selected", "all") if kind != "attn_res" else ("selected",):
        model = make(kind, rule="budget", kv=kv, spelling=spelling)
        want = model(tokens)
        close(stepped(model, tokens, [14] + [1] * 10), want)


@kinds
@torch.no_grad()
def test_the_way_it_is_cut_does_not_matter(kind: Kind) -> None:
    model, tokens = make(kind, rule="budget", predictor=kind != "subjective_timescale"), ids(3)
    want = model(tokens)
    for chunks in ([1] * 24, [5, 7, 12], [24], [1, 22, 1]):
        close(stepped(model, tokens, chunks), want)


@kinds
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_ragged_prompts_go_on_as_if_alone(kind: Kind, side: str) -> None:
    model, tokens = make(kind, rule="budget"), ids(2)
    padded, mask = ids(2, 16, seed=4), torch.zeros(2, 16, dtype=torch.int64)
    lengths = (9, 16)
    for row, length in enumerate(lengths):
        part = slice(16 - length, 16) if side == "left" else slice(0, length)
        padded[row, part], mask[row, part] = tokens[row, :length], 1
    state = model.start(2, 24, 16)
    prompt = model.step(padded, state, mask)
    after = torch.cat([model.step(torch.stack((tokens[0, 9 + i : 10 + i], tokens[1, 16 + i : 17 + i])), state)
                       for i in range(8)], 1)  # fmt: skip
    assert state.seen.tolist() == [17, 24]
    # Padding on the left moves the positions, whose angles are rounded to fp32: 4e-6 of a turned vector.
    bound = 1e-5 if side == "left" else FP64
    for row, length in enumerate(lengths):
        want = model(tokens[row : row + 1])[0]
        for got, part in ((prompt[row][mask[row].bool()], want[:length]), (after[row], want[length : length + 8])):
            torch.testing.assert_close(got, part, rtol=bound, atol=bound)


@kinds
@torch.no_grad()
def test_the_cache_of_a_routed_layer_is_as_short_as_its_budget(kind: Kind) -> None:
    model, tokens = make(kind, rule="budget", capacity=0.25), ids()
    state = model.start(2, 24)
    for token in torch.split(tokens, 1, dim=1):
        model.step(token, state)
    for index, layer in enumerate(state.layers):
        routed = index in model.config.routed_layers
        assert layer.cache.key.shape[2] == (6 + 2 + 1 if routed else 24)
        assert layer.cache.length.tolist() == (layer.taken.tolist() if routed else [24, 24])
    counts = [layer.taken for index, layer in enumerate(state.layers) if index in model.config.routed_layers]
    assert 0 < int(torch.stack(counts).max()) <= 8
    records = model.trace(tokens)[1]
    taken = [r.selection.taken.sum(1) for r in records if not r.name.endswith("mlp") and r.selection.taken is not None]
    assert [count.tolist() for count in counts] == [count.tolist() for count in taken]


def test_what_cannot_be_decoded_is_refused() -> None:
    model = make("mixture_of_depths")
    with pytest.raises(UsageError) as error:
        model.step(ids(), model.start(2, 24, 24))
    assert error.value.code == "routed-model.not-causal"
    model.rule = "budget"
    state = model.start(2, 10, 4)
    model.step(ids(2, 4), state)
    model.step(ids(2, 4), state)
    for tokens in (5, 3):
        with pytest.raises(UsageError) as error:
            model.step(ids(2, tokens), state)
        assert error.value.code == "routed-model.length"
