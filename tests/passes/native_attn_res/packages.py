"""Form G: operators of other packages, registered here under their names and schemas with reference bodies."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, DEPTH, EPS = 8, 3, 1e-5

_SCHEMAS = {
    "flash_attn_res::_phase_1_batched_attention_forward_with_aux": (
        "(Tensor block_representations, Tensor pseudo_queries, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "flash_attn_res::_phase_2_online_softmax_merge_forward_with_aux": (
        "(Tensor intrablock_partial_sum, Tensor pseudo_query, Tensor interblock_normalized_output, "
        "Tensor interblock_lse, float eps) -> (Tensor, Tensor, Tensor)"
    ),
    "attnres::_fixed_tail_forward_with_aux": (
        "(Tensor values, Tensor query, float eps, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "attnres::_fixed_tail_sources_forward_with_aux": (
        "(Tensor[] sources, Tensor query, float eps, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "attnres::_multiquery_forward_with_aux": (
        "(Tensor[] sources, Tensor queries, Tensor? selected_ids, bool packed, float eps, float scale, "
        "str strategy, str output_layout) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "trtllm::attn_res_fwd": (
        "(Tensor layer_residual, Tensor block_residual, Tensor res_weight, Tensor rms_weight, float rms_eps) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


def _attend(values: Tensor, queries: Tensor, eps: float, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values ``[n, …, d]``, queries ``[M, d]``: out ``[M, …, d]``, lse ``[M, …]``, rstd ``[n, …]``, logits."""
    rstd = torch.rsqrt(values.square().mean(-1) + eps)
    logits = torch.einsum("md,n...d->mn...", queries, values) * rstd * scale
    out = torch.einsum("mn...,n...d->m...d", logits.softmax(1), values)
    return out, logits.logsumexp(1), rstd, logits


def _phase_1(values: Tensor, queries: Tensor, eps: float) -> tuple[Tensor, ...]:
    out, lse, rstd, logits = _attend(values, queries, eps)
    return out, lse, rstd.movedim(0, -1).clone(), logits.movedim(1, -1).clone()


def _phase_2(partial: Tensor, query: Tensor, out: Tensor, lse: Tensor, eps: float) -> tuple[Tensor, ...]:
    rstd = torch.rsqrt(partial.square().mean(-1) + eps)
    logit = partial @ query * rstd
    share = torch.sigmoid(logit - lse).unsqueeze(-1)
    return out + share * (partial - out), logit, rstd


def _fixed_tail(values: Tensor, query: Tensor, eps: float, scale: float) -> tuple[Tensor, ...]:
    out, lse, rstd, logits = _attend(values, query[None], eps, scale)
    return out[0], out[0].clone(), rstd, logits[0], lse.expand(2, *lse.shape[1:]).clone()


def _fixed_tail_sources(sources: Sequence[Tensor], query: Tensor, eps: float, scale: float) -> tuple[Tensor, ...]:
    return _fixed_tail(torch.stack(list(sources)), query, eps, scale)


def _multiquery(  # noqa: PLR0917 - the operator's schema
    sources: Sequence[Tensor],
    queries: Tensor,
    selected_ids: Tensor | None,  # noqa: ARG001
    packed: bool,
    eps: float,
    scale: float,
    strategy: str,  # noqa: ARG001
    output_layout: str,
) -> tuple[Tensor, ...]:
    out, lse, rstd, logits = _attend(sources[0] if packed else torch.stack(list(sources)), queries, eps, scale)
    out = out if output_layout == "query_major" else out.movedim(0, -2).contiguous()
    return out, out.clone(), rstd, logits, lse


def _trtllm(layer: Tensor, bank: Tensor, weight: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, ...]:
    out, lse, rstd, logits = _attend(torch.cat([bank, layer[None]]), (weight * gain)[None], eps)
    return out[0], rstd, lse, logits


_BODIES = dict(zip(_SCHEMAS, (_phase_1, _phase_2, _fixed_tail, _fixed_tail_sources, _multiquery, _trtllm), strict=True))
_libraries: list[torch.library.Library] = []


@functools.cache
def register() -> None:
    """Register the operators, unless a package has done so."""
    for name, schema in _SCHEMAS.items():
        namespace, operator = name.split("::")
        library = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define(operator + schema)  # type: ignore[no-untyped-call]
        library.impl(operator, _BODIES[name], "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        _libraries.append(library)


class Packages(nn.Module):
    """Full AttnRes; ``form`` names the operator that reads."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.queries = nn.Parameter(torch.randn(DEPTH + 2, WIDTH))
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.bodies = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, d]`` to the same."""
        if self.form == "two-phase":
            return self.two_phase(x)
        sources = [x]
        for index, body in enumerate(self.bodies):
            sources.append(torch.tanh(body(self.read(index, sources))))
        return self.read(DEPTH, sources)

    def read(self, index: int, sources: list[Tensor]) -> Tensor:
        """One read."""
        query = self.queries[index]
        if self.form == "list":
            return torch.ops.attnres._fixed_tail_sources_forward_with_aux(sources, query, EPS, 0.5)[0]  # type: ignore[no-any-return]
        if self.form == "packed":
            values = torch.stack(sources).reshape(len(sources), -1, WIDTH)
            return torch.ops.attnres._fixed_tail_forward_with_aux(values, query, EPS, 1.0)[0].view_as(sources[0])  # type: ignore[no-any-return]
        if self.form == "trtllm":
            rows = [each.reshape(-1, 1, WIDTH) for each in sources]
            bank = torch.stack(rows[:-1]) if rows[:-1] else rows[0].new_empty(0, *rows[0].shape)
            return torch.ops.trtllm.attn_res_fwd(rows[-1], bank, query, self.gain, EPS)[0].view_as(sources[0])  # type: ignore[no-any-return]
        layout = "query_major" if self.form == "multi" else "token_major"
        packed = self.form == "multi"
        given = [torch.stack(sources)] if packed else sources
        both = torch.ops.attnres._multiquery_forward_with_aux(
            given, self.queries[index : index + 2], None, packed, EPS, 1.0, "auto", layout
        )[0]
        first, second = both.unbind(0 if layout == "query_major" else -2)
        return first - 0.5 * second  # type: ignore[no-any-return]

    def two_phase(self, x: Tensor) -> Tensor:
        """Block AttnRes with blocks of two sublayers: phase 1 once per block, phase 2 for the second."""
        bank, partial = [x], x
        flash = torch.ops.flash_attn_res
        for start in range(0, DEPTH + 1, 2):
            queries = self.queries[start : start + 2]
            out, lse, _, _ = flash._phase_1_batched_attention_forward_with_aux(torch.stack(bank), queries, EPS)
            partial = torch.tanh(self.bodies[start % DEPTH](out[0]))
            h, _, _ = flash._phase_2_online_softmax_merge_forward_with_aux(partial, queries[1], out[1], lse[1], EPS)
            partial = partial + torch.tanh(self.bodies[(start + 1) % DEPTH](h))
            bank.append(partial)
        return partial


# Form -> reads.
READS = {"list": DEPTH + 1, "packed": DEPTH + 1, "trtllm": DEPTH + 1, "multi": 8, "multi-list": 8, "two-phase": 4}


def build(form: str) -> nn.Module:
    """Return the model in fp64 with random queries."""
    register()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Packages(form).double().eval()
