"""The routing pass against the dense model at capacity 1, and against an eager reference below it."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
import torch

from depthwire.errors import PassError
from depthwire.passes.analysis.routing_ops import SELECT, SELECT_BUDGET
from depthwire.route import RouteSpec
from tests.passes.parity import FP64, check_golden, error, node_values, run, runner
from tests.routable import FORMS, Form, Model, Reference, build, canonical, examples, parts_of, routed

if TYPE_CHECKING:
    from torch import Tensor

    from depthwire.program import Program
    from depthwire.route_parts import RouteParts

HALF, QUARTER, WHOLE = Fraction(1, 2), Fraction(1, 4), Fraction(1)
EVERYTHING = float("-inf")


@functools.lru_cache(maxsize=64)
def program(form: Form, batch: int = 3, length: int = 12) -> tuple[Model, Program]:
    model = build(form)
    return model, canonical(model, examples(form, batch=batch, length=length))


def spec_of(capacity: Fraction = HALF, layers: tuple[int, ...] = (1,), **options: Any) -> RouteSpec:
    return RouteSpec(layers, (capacity,), **options)


def valid_of(named_inputs: dict[str, Tensor]) -> Tensor:
    mask = named_inputs.get("attention_mask")
    return torch.ones_like(named_inputs["ids"]).bool() if mask is None else mask.bool()


def selections(after: Program, *inputs: Tensor) -> list[list[list[int]]]:
    """Return, unit by unit, the tokens that each sequence computes."""
    values = node_values(after, *inputs)
    chosen = [values[node.name] for node in after.exported.graph.nodes if node.target in (SELECT, SELECT_BUDGET)]
    return [[row[bits].tolist() for row, bits in zip(part[0], part[1], strict=True)] for part in chosen]


def check_against_reference(form: Form, parts: RouteParts, *, batch: int = 3, length: int = 12) -> list[list[int]]:
    """Compare logits and selections on inputs with left and right padding; return the sizes of the selections."""
    model, before = program(form, batch, length)
    after = routed(before, parts)
    inputs = examples(form, batch=batch, length=length)
    valid = valid_of(inputs)
    (got,) = run(after, *inputs.values())
    want, chosen = Reference(model, parts)(*inputs.values())
    assert selections(after, *inputs.values()) == list(chosen.values())
    assert error([got[valid]], [want[valid]]) <= FP64
    return [[len(row) for row in rows] for rows in chosen.values()]


def test_golden_text() -> None:
    form = Form(layers=1, masked=True, kv_heads=2)
    before = canonical(build(form), examples(form, batch=1, length=8))
    options = {"score": "mod", "gate": "sigmoid", "fallback": "linear"}
    after = routed(before, parts_of(spec_of(HALF, (0,), **options)))
    check_golden("route_tokens", before, after)


WAYS: list[tuple[Any, Any, Any, Fraction]] = [
    ("block", "selected", "budget", HALF),
    ("block", "all", "top-k", QUARTER),
    ("attention", "selected", "top-k", QUARTER),
    ("attention", "all", "budget", HALF),
    ("mlp", "selected", "budget", HALF),
]


def _ways() -> list[Any]:
    """Every form in every way; attention and MLP side by side are one sublayer."""
    return [pytest.param(form, *way) for form in FORMS for way in WAYS if way[0] == "block" or not FORMS[form].parallel]


@pytest.mark.parametrize(("form", "unit", "keys_values", "rule", "capacity"), _ways())
def test_all_tokens_are_the_dense_model_and_fewer_are_the_reference(
    form: str, unit: Any, keys_values: Any, rule: Any, capacity: Fraction
) -> None:
    _, before = program(FORMS[form])
    spec = spec_of(WHOLE, (0, 1), unit=unit, keys_values=keys_values, rule=rule, score="mod")
    after = routed(before, parts_of(spec, threshold=EVERYTHING))
    inputs = examples(FORMS[form])
    valid = valid_of(inputs)
    got, want = run(after, *inputs.values())[0], run(before, *inputs.values())[0]
    whole = valid.all(1)  # with padding, the slots are summed over in another order
    assert torch.equal(got[whole], want[whole])
    assert error([got[valid]], [want[valid]]) <= FP64

    score = "mod" if FORMS[form].post else "linear"
    spec = spec_of(capacity, (0, 1), unit=unit, keys_values=keys_values, rule=rule, score=score)
    sizes = check_against_reference(FORMS[form], parts_of(spec, threshold=-0.5))
    assert 0 < max(max(row) for row in sizes) < 12


ROUTINGS: list[dict[str, Any]] = [
    *({"score": score} for score in ("linear", "mod", "timescale", "surprise")),
    *({"score": "mod", "gate": gate} for gate in ("score", "sigmoid")),
    {"score": "surprise", "gate": "surprise", "surprise_window": 3},
    *({"unit": unit, "fallback": "linear"} for unit in ("block", "attention", "mlp")),
    {"unit": "attention", "fallback": "swiglu", "gate": "sigmoid"},
    {"rule": "top-k", "window": 4},
    {"margin": 0},
    {"margin": 3, "keys_values": "all"},
    {"rule": "top-k", "score": "surprise", "gate": "sigmoid", "fallback": "linear", "unit": "mlp"},
]


@pytest.mark.parametrize("options", ROUTINGS, ids=lambda options: "-".join(map(str, options.values())))
def test_scores_gates_fallbacks_and_rules_are_the_reference(options: dict[str, Any]) -> None:
    middle = 1.38 if options.get("score") == "surprise" else 0.0
    parts = parts_of(spec_of(HALF, (1,), **options), threshold=middle)
    for form in (FORMS["llama-padded"], FORMS["eager"]):
        sizes = check_against_reference(form, parts)
        assert max(max(row) for row in sizes) > 0


def test_a_capacity_for_each_layer() -> None:
    spec = RouteSpec((0, 1), (HALF, QUARTER), rule="top-k")
    assert check_against_reference(FORMS["llama"], parts_of(spec)) == [[6] * 3, [3] * 3]


def test_one_sequence() -> None:
    for form in ("llama-padded", "eager", "bert"):
        score = "mod" if FORMS[form].post else "linear"
        spec = spec_of(HALF, (0, 1), rule="top-k", score=score)
        check_against_reference(FORMS[form], parts_of(spec), batch=1)


def test_the_batch_need_not_come_first() -> None:
    """Queries and keys are rotated in one stack; with two sequences its axis is as long as the batch."""
    form = Form(joint_rotary=True)
    with pytest.raises(PassError, match="first axis is not the batch") as caught:
        check_against_reference(form, parts_of(spec_of()), batch=2)
    assert caught.value.code == "route.operation"
    check_against_reference(form, parts_of(spec_of()), batch=1)


def test_narrow_models_score_in_fp32() -> None:
    form = FORMS["llama-padded"]
    before = canonical(build(form, dtype=torch.bfloat16), examples(form))
    for options in ({"score": "linear", "fallback": "linear"}, {"score": "surprise", "gate": "surprise"}):
        after = routed(before, parts_of(spec_of(HALF, (1,), **options), threshold=0.0))
        (select,) = (node for node in after.exported.graph.nodes if node.target is SELECT_BUDGET)
        assert select.args[0].meta["val"].dtype is torch.float32
        assert select.args[2].meta["val"].dtype is torch.float32
        (logits,) = run(after, *examples(form).values())
        assert logits.dtype is torch.bfloat16
        assert logits[valid_of(examples(form))].isfinite().all()


def test_equal_scores_select_exactly_k_and_the_first() -> None:
    _, before = program(FORMS["vit"])
    drawn = parts_of(spec_of(HALF, (1,), rule="top-k", score="mod"))
    drawn.tensors["layers.1.router.weight"].zero_()
    assert selections(routed(before, drawn), *examples(FORMS["vit"]).values()) == [[list(range(6))] * 3]


def test_sequences_do_not_see_one_another_nor_the_future() -> None:
    form = FORMS["llama-padded"]
    _, before = program(form)
    after = runner(routed(before, parts_of(spec_of(HALF, (0, 1), score="timescale"), threshold=-0.3)))
    ids, mask = examples(form).values()
    mask[0] = mask[1] = 1
    (want,) = after(ids, mask)
    order = torch.tensor([2, 0, 1])
    assert error(after(ids[order], mask[order]), [want[order]]) <= FP64
    for token in (3, 8):
        changed = ids.clone()
        changed[:, token:] = (changed[:, token:] + 1) % 23
        assert error([after(changed, mask)[0][:, :token]], [want[:, :token]]) <= FP64


def test_other_sequences_do_not_change_a_padded_one() -> None:
    form = FORMS["encoder"]
    _, before = program(form)
    after = runner(routed(before, parts_of(spec_of(QUARTER, (0, 1), rule="top-k"))))
    ids, mask = examples(form).values()
    (want,) = after(ids, mask)
    junk = torch.where(mask.bool(), ids, (ids + 5) % 23)  # what stands in padding has no effect
    assert error([after(junk, mask)[0][mask.bool()]], [want[mask.bool()]]) <= FP64
