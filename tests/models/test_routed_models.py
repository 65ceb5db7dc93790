"""Routed decoders against their mathematics, and what must hold of every one (acceptance of routing)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor

from depthwire.models.attn_res import AttnResDecoder
from depthwire.models.routed_decoder import annealed_capacity
from tests.models.routed import FP64, KINDS, SPELLINGS, TOKENS, close, ids, make, padding, plainly, plainly_attn_res

if TYPE_CHECKING:
    from depthwire.models._stream import LayerRecord
    from depthwire.models.routed_decoder import RoutedDecoder
    from depthwire.models.routing_config import Kind

BLOCKS = KINDS[:3]
# Padding on the left moves the positions, whose angles (up to 64 here) are rounded to fp32: 4e-6 of a turned vector.
SHIFTED = 1e-5


def chosen(record: LayerRecord) -> list[list[int]]:
    """Positions that each row computed, ascending."""
    selection = record.selection
    taken = torch.ones_like(selection.index, dtype=torch.bool) if selection.taken is None else selection.taken
    return [
        sorted(row[bits].tolist()) for row, bits in zip(selection.positions(), taken, strict=True)
    ]  # an untaken slot's position means nothing


def dense_twin(model: RoutedDecoder) -> AttnResDecoder:
    """The decoder without routing, of the same weights."""
    twin = AttnResDecoder(model.config.decoder).double().eval()
    new = model.new_weights()
    twin.load_state_dict({name: x for name, x in model.state_dict().items() if name not in new}, strict=True)
    return twin


def open_thresholds(model: RoutedDecoder) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(-torch.inf)


# --- the mathematics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(
    "routing",
    [
        {"rule": "top-k", "kv": "selected", "gate": "score"},
        {"rule": "top-k", "kv": "all", "gate": "unit", "capacity": 0.25},
        {"rule": "budget", "kv": "selected", "gate": "unit"},
    ],
    ids=lambda routing: "-".join(map(str, routing.values())),
)
@torch.no_grad()
def test_every_kind_computes_its_equations(kind: Kind, routing: dict[str, Any]) -> None:
    model, tokens = make(kind, **routing), ids(tokens=8)
    close(model(tokens), torch.stack([plainly(model, row) for row in tokens]))


@pytest.mark.parametrize(
    "routing",
    [
        {"unit": "both", "fallback": "zero", "rule": "top-k", "residual": "block-layers:2"},
        {"unit": "both", "fallback": "prior", "rule": "budget", "residual": "full"},
        {"unit": "attention", "fallback": "prior", "rule": "top-k", "residual": "full", "layers": (0, 3)},
        {"unit": "mlp", "fallback": "zero", "rule": "top-k", "residual": "block-layers:1", "gate": "score"},
    ],
    ids=lambda routing: "-".join(map(str, routing.values())),
)
@torch.no_grad()
def test_a_source_left_out_is_zero_or_its_prior_for_every_later_read(routing: dict[str, Any]) -> None:
    model, tokens = make("attn_res", **routing), ids(tokens=8)
    close(model(tokens), torch.stack([plainly_attn_res(model, row) for row in tokens]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["top-k", "budget"])
@torch.no_grad()
def test_spellings_are_one_function(kind: Kind, rule: str) -> None:
    tokens, mask = ids(3), padding()
    for kv in ("selected", "all") if kind != "attn_res" else ("selected",):
        first, *others = [make(kind, rule=rule, kv=kv, gate="score", spelling=spelling) for spelling in SPELLINGS]
        alone, padded = first(tokens), first(tokens, mask)[mask.bool()]
        for other in others:
            close(other(tokens), alone)
            close(other(tokens, mask)[mask.bool()], padded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", SPELLINGS)
@torch.no_grad()
def test_every_spelling_is_exported_with_static_shapes(kind: Kind, spelling: str) -> None:
    # The rule is code that all kinds share: one of them shows that it is exported.
    for rule in ("top-k", "budget") if kind == "mixture_of_depths" else ("top-k",):
        model = make(kind, spelling=spelling, rule=rule, depth=2)
        program = torch.export.export(model, (ids(3), padding()))
        shapes = [n.meta["val"].shape for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        assert all(isinstance(size, int) for shape in shapes for size in shape)
        close(program.module()(ids(3, seed=5), padding()), model(ids(3, seed=5), padding()))


@pytest.mark.parametrize("average", ["avg_pool1d", "conv1d", "cumsum"])
@pytest.mark.parametrize("kind", ["subjective_depth"])
@torch.no_grad()
def test_the_average_s_spelling_changes_nothing(kind: Kind, average: str) -> None:
    close(make(kind, average=average)(ids()), make(kind)(ids()))


# --- what must hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["top-k", "budget"])
@torch.no_grad()
def test_at_capacity_1_an_untrained_router_leaves_the_dense_function(kind: Kind, rule: str) -> None:
    tokens, mask = ids(3), padding()
    for spelling in SPELLINGS:
        model = make(kind, rule=rule, spelling=spelling)
        want = dense_twin(model)(tokens)
        assert (model(tokens) - want).abs().max() > 1e-3  # at .5 it is another function
        model.capacity = 1.0
        open_thresholds(model)
        close(model(tokens), want)
        padded, twin = model(tokens, mask), dense_twin(model)
        for row, bits, got in zip(tokens, mask.bool(), padded, strict=True):
            torch.testing.assert_close(got[bits], twin(row[bits][None])[0], rtol=SHIFTED, atol=SHIFTED)


@pytest.mark.parametrize("kind", KINDS)
def test_in_training_at_capacity_1_too(kind: Kind) -> None:
    model, tokens = make(kind).train(), ids()
    model.capacity = 1.0
    losses = model.losses(tokens[:, :-1], tokens[:, 1:])
    logits = dense_twin(model)(tokens[:, :-1])
    want = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    # The loss is a mean of fp32 logits: two fp64 results that differ in the last digits may round apart.
    torch.testing.assert_close(losses.lm, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["top-k", "budget"])
@torch.no_grad()
def test_rows_of_the_batch_know_nothing_of_each_other(kind: Kind, rule: str) -> None:
    model, tokens, mask = make(kind, rule=rule), ids(3), padding()
    order = torch.tensor([2, 0, 1])
    close(model(tokens[order], mask[order]), model(tokens, mask)[order])
    other = ids(3, seed=9)
    other[0] = tokens[0]
    close(model(other, mask)[0], model(tokens, mask)[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_under_the_budget_the_future_changes_nothing(kind: Kind) -> None:
    for kv in ("selected", "all") if kind != "attn_res" else ("selected",):
        model, changed = make(kind, rule="budget", kv=kv), ids()
        changed[:, 15:] = ids(seed=7)[:, 15:]
        close(model(changed)[:, :15], model(ids())[:, :15])
        model.rule = "top-k"  # which looks ahead: the test can tell
        assert (model(changed)[:, :15] - model(ids())[:, :15]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_budget_is_one_function_in_every_bucket_and_on_either_side_of_padding(kind: Kind) -> None:
    model, row = make(kind, rule="budget"), ids(1)
    want = model(row)[0]
    for left, right in ((0, 9), (9, 0), (4, 17), (0, 40)):
        filled = torch.cat((ids(1, left, seed=5), row, ids(1, right, seed=6)), 1)
        mask = torch.tensor([[0] * left + [1] * TOKENS + [0] * right])
        bound = SHIFTED if left else FP64
        torch.testing.assert_close(model(filled, mask)[0, left : left + TOKENS], want, rtol=bound, atol=bound)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", SPELLINGS)
@torch.no_grad()
def test_exactly_k_tokens_are_computed_and_never_padding(kind: Kind, spelling: str) -> None:
    model, tokens, mask = make(kind, spelling=spelling, capacity=0.375), ids(3), padding()
    for equal in (False, True):
        if equal:  # every score the same: routers of zeros, and a gate of no steepness
            for name, weight in model.named_parameters():
                if ".router." in name:
                    weight.zero_()
                elif "raw_beta" in name:
                    weight.fill_(-1e9)
        for record in model.trace(tokens)[1]:
            assert not equal or len(set(record.score.flatten().tolist())) == 1
            assert [len(set(row)) for row in chosen(record)] == [9, 9, 9]
        for record in model.trace(tokens, mask)[1]:
            rows = chosen(record)
            assert [len(set(row)) for row in rows] == [9, 9, 9]
            assert all(bool(mask[b, t]) for b, row in enumerate(rows) for t in row)
    mask[0, : TOKENS - 4] = 0  # fewer tokens than slots: those, and nothing else
    assert all(chosen(record)[0] == list(range(TOKENS - 4, TOKENS)) for record in model.trace(tokens, mask)[1])


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", ["unit", "score"])
def test_every_weight_learns(kind: Kind, gate: str) -> None:
    extra: dict[str, Any] = {"fallback": "prior"} if kind == "attn_res" else {}
    model = make(kind, gate=gate, predictor=kind != "subjective_timescale", gate_weight=0.1, **extra).train()
    tokens = ids()
    losses = model.losses(tokens[:, :-1], tokens[:, 1:])
    torch.autograd.backward(losses.total)
    # The first read has one source and no use for its query; with a gate of units no loss asks for a raw MoD weight.
    unused = {"layers.0.self_attention_res_proj.weight", "layers.0.self_attention_res_norm.weight"}
    still = {name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)}
    assert still <= unused
    routing = model.config.routing
    parts = losses.lm + routing.prior_weight * losses.prior + routing.router_weight * losses.router
    close(losses.total, parts + routing.gate_weight * losses.gate)


@pytest.mark.parametrize("kind", ["mixture_of_depths", "subjective_depth", "attn_res"])
@pytest.mark.parametrize("gate", ["unit", "score"])
def test_training_passes_on_what_inference_computes(kind: Kind, gate: str) -> None:
    model, tokens = make(kind, gate=gate), ids()
    logits, records = model.trace(tokens[:, :-1])
    losses = model.train().losses(tokens[:, :-1], tokens[:, 1:])
    want = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(losses.lm, want, rtol=1e-6, atol=0)  # fp32 logits, as above
    assert [chosen(record) for record in losses.records] == [chosen(record) for record in records]


def test_the_teacher_s_choice_is_what_the_student_would_compute() -> None:
    """A Subjective Timescale layer in training runs its inference pass, on the teacher's tokens."""
    model, tokens = make("subjective_timescale", layers=(3,)), ids()
    layer = cast("Any", model.layers[3])
    records = model.train().losses(tokens[:, :-1], tokens[:, 1:]).records
    teacher = records[0].score
    layer.router.forward = lambda x, before: teacher.detach()  # noqa: ARG005 - a student that has learned all
    logits = model.eval()(tokens[:, :-1])
    want = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    got = model.train().losses(tokens[:, :-1], tokens[:, 1:]).lm
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    dense = make("subjective_timescale", layers=(3,), teacher_output="dense")
    plain = dense_twin(dense)(tokens[:, :-1])
    want = torch.nn.functional.cross_entropy(plain.float().flatten(0, 1), tokens[:, 1:].flatten())
    got = dense.train().losses(tokens[:, :-1], tokens[:, 1:]).lm
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_a_teacher_s_threshold_is_the_student_s_target() -> None:
    tokens = ids()
    everyone = make("subjective_timescale", teacher_threshold=0.0).train()
    loss = everyone.losses(tokens[:, :-1], tokens[:, 1:])
    students = [cast("Tensor", record.student) for record in loss.records]
    taken = [
        torch.zeros_like(s).scatter(1, r.selection.index, 1.0) for s, r in zip(students, loss.records, strict=True)
    ]
    want = [torch.nn.functional.binary_cross_entropy_with_logits(s, t) for s, t in zip(students, taken, strict=True)]
    close(loss.router, torch.stack(want).mean())
    nobody = make("subjective_timescale", teacher_threshold=1.1).train().losses(tokens[:, :-1], tokens[:, 1:])
    close(nobody.router, torch.stack([torch.nn.functional.softplus(s).mean() for s in students]).mean())


def test_capacity_falls_from_1_to_its_end() -> None:
    fall = [annealed_capacity(done / 20, 0.25) for done in range(25)]
    assert fall[0] == 1.0
    assert fall[20:] == [0.25] * 5
    assert fall == sorted(fall, reverse=True)
