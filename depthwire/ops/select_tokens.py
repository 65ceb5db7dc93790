"""``depthwire::select_tokens`` and ``depthwire::select_tokens_budget``: which tokens a routed block computes.

    select_tokens(score, valid, slots, window)                                  -> index, taken
    select_tokens_budget(score, valid, threshold, budget, state, slots)         -> index, taken, state_out

``score [B, T]`` is fp32 (or fp64), ``valid [B, T]`` bool (False for padding), ``slots [K]`` int64 and read for its
length alone: K is a constant of a static graph and an input's dimension in others. Results are ``index [B, K]`` int64
and ``taken [B, K]`` bool; they have no gradient.

**Scores are made canonical first**, so that every backend orders them alike: NaN, -inf and what lies below -FLT_MAX
become -FLT_MAX, and magnitudes below FLT_MIN (denormals, which backends may flush, and -0) become 0. +inf stays.

**Slots.** The selected tokens come first, in ascending order; the slots left over hold the smallest unselected tokens,
ascending, which are computed and thrown away. ``taken[b, j]`` is j < the number selected in row b. So the indices of a
row are distinct, and a K x K triangle over the slots is a right causal mask for every taken slot.

**Rule top-k**: the min(K, number of valid tokens) valid tokens that come first by (score descending, index ascending).
With a ``window`` the rule holds apart in each of the T / window windows, with K * window / T slots each. It looks
ahead.

**Rule running budget**: causal, and the same function in every bucket, chunk and decode step. ``budget`` is
(numerator, denominator, margin) with numerator >= 0 and denominator >= 1, ``state [B, 2]`` holds the numbers of valid
tokens seen and of tokens taken before this chunk, zeros at the start::

    a_t   = valid_t and score_t >= threshold                     false for a threshold of NaN
    pos_t = seen + number of valid tokens up to and including t
    cap_t = min(numerator * pos_t // denominator + margin, taken + K)
    t is selected iff a_t and fewer than cap_t were taken before it, those before this chunk included

With A_t the running count of a_s in this chunk and cap'_t = min(max(cap_t - taken, 0), K), the number selected up to t
is A_t + min(0, min over s <= t of (cap'_s - A_s)): the caps never fall, so each token adds min(1, room) and the
recursion C_t = min(C_{t-1} + a_t, cap'_t) unrolls to that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthwire.ops._register import register
from depthwire.ops._token_checks import check_exact, check_score, check_slots, check_window

if TYPE_CHECKING:
    from collections.abc import Mapping

FLT_MAX = torch.finfo(torch.float32).max
FLT_MIN = torch.finfo(torch.float32).tiny


def canonical_score(score: Tensor) -> Tensor:
    """Return scores that every backend compares alike: no NaN, no -inf, no denormal, no -0."""
    finite = torch.where(score >= -FLT_MAX, score, -FLT_MAX)
    return torch.where(finite.abs() < FLT_MIN, 0.0, finite)


def select_tokens_reference(score: Tensor, valid: Tensor, slots: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
    """Select the K valid tokens of the highest scores, the lower index first among equals."""
    batch, tokens = score.shape
    width = window or tokens
    share = slots.shape[0] * width // tokens
    # Canonical scores are finite or +inf, so -inf puts padding behind all of them.
    ranked = torch.where(valid, canonical_score(score), -torch.inf).reshape(batch, tokens // width, width)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :share]
    first = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, order, value=True)
    return _packed(first.reshape(batch, tokens) & valid, slots.shape[0])


def select_tokens_budget_reference(
    score: Tensor, valid: Tensor, threshold: Tensor, budget: Tensor, state: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Select, in order, the valid tokens that reach the threshold, as far as the running budget goes."""
    seen, before = state[:, :1], state[:, 1:]
    numerator, denominator, margin = budget.unbind()
    asked = (valid & (canonical_score(score) >= threshold)).long().cumsum(1)
    position = seen + valid.long().cumsum(1)
    cap = torch.div(numerator * position, denominator, rounding_mode="floor") + margin
    room = (cap - before).clamp(0, slots.shape[0])
    count = asked + (room - asked).cummin(1).values.clamp(max=0)
    selected = count.diff(dim=1, prepend=torch.zeros_like(before)) > 0
    index, taken = _packed(selected, slots.shape[0])
    return index, taken, torch.cat([position[:, -1:], before + count[:, -1:]], dim=1)


def _packed(selected: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Return the slots: the selected tokens ascending, then the others ascending."""
    index = selected.logical_not().byte().sort(dim=1, stable=True).indices[:, :slots].contiguous()
    taken = torch.arange(slots, device=selected.device) < selected.sum(1, keepdim=True)
    return index, taken


def _shapes(arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    score: Tensor = arguments["score"]
    batch, tokens = check_score(score)
    check_exact("valid", arguments["valid"], (batch, tokens), torch.bool)
    slots = check_slots(arguments["slots"], tokens)
    index = score.new_empty((batch, slots), dtype=torch.int64)
    taken = score.new_empty((batch, slots), dtype=torch.bool)
    if "budget" not in arguments:
        check_window(arguments["window"], tokens, slots)
        return index, taken
    threshold: Tensor = arguments["threshold"]
    if tuple(threshold.shape) not in ((), (1,)) or threshold.dtype != score.dtype:
        raise ValueError(
            f"threshold must be {score.dtype}[] or {score.dtype}[1], not {threshold.dtype}{list(threshold.shape)}"
        )
    check_exact("budget", arguments["budget"], (3,), torch.int64)
    check_exact("state", arguments["state"], (batch, 2), torch.int64)
    return index, taken, score.new_empty((batch, 2), dtype=torch.int64)


select_tokens = register("select_tokens", select_tokens_reference, _shapes)
select_tokens_budget = register("select_tokens_budget", select_tokens_budget_reference, _shapes)
