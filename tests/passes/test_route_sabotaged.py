"""What a wrong routing would look like, and that the comparison with the reference notices."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
import torch

from depthwire.passes.analysis.routing_ops import GATHER, SCATTER, SELECT, SELECT_BUDGET
from depthwire.passes.route_tokens import RouteTokens
from depthwire.route import RouteSpec
from tests.passes.parity import FP64, error, named, run, sabotaged
from tests.routable import FORMS, Reference, build, canonical, examples, parts_of, routed

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.passes._edit import GraphEditor

aten = torch.ops.aten
HALF = (Fraction(1, 2),)


def _index(edit: GraphEditor) -> Any:
    select = named(edit, SELECT, SELECT_BUDGET)[0]
    return next(user for user in select.users if user.args[1] == 0)


def _first_slots(edit: GraphEditor, gather: Any) -> None:
    """Gather tokens 0 … K-1 in place of the selected ones: what is at these slots, not at their positions."""
    slots = named(edit, SELECT, SELECT_BUDGET)[0].args[-2 if named(edit, SELECT) else -1]
    batch = gather.args[1].meta["val"].shape[0]
    rows = edit.call(aten.expand.default, (slots, [batch, -1]), before=gather, like=gather)
    edit.set_arg(gather, 1, rows)


def unsorted_slots(edit: GraphEditor) -> None:
    index = _index(edit)
    flipped = edit.call(aten.flip.default, (index, [1]), before=index.next, like=index)
    index.replace_all_uses_with(flipped)
    flipped.update_arg(0, index)


def mask_not_gathered(edit: GraphEditor) -> None:
    for gather in named(edit, GATHER):
        if gather.meta["val"].dtype is torch.bool:
            _first_slots(edit, gather)


def table_not_gathered(edit: GraphEditor) -> None:
    for gather in named(edit, GATHER):
        if gather.meta["val"].dim() == 4 and gather.meta["val"].dtype.is_floating_point:
            _first_slots(edit, gather)


def gate_dropped(edit: GraphEditor) -> None:
    rows: Any = named(edit, SCATTER)[0].args[3]
    (update,) = (part for part in rows.args if part.target is aten.mul.Tensor)
    edit.replace(update, update.args[0])


def prior_dropped(edit: GraphEditor) -> None:
    scatter = named(edit, SCATTER)[0]
    base: Any = scatter.args[0]
    edit.set_arg(scatter, 0, base.args[0])


def keys_leaked(edit: GraphEditor) -> None:
    """Let the slots that no selected token has taken be keys."""
    for visible in named(edit, aten.logical_or.default):
        everything = edit.call(aten.ones_like.default, (visible,), before=visible.next, like=visible)
        visible.replace_all_uses_with(everything)
        everything.update_arg(0, visible)


def padding_selected(edit: GraphEditor) -> None:
    select = named(edit, SELECT, SELECT_BUDGET)[0]
    edit.set_arg(select, 1, edit.call(aten.ones_like.default, (select.args[1],), before=select, like=select))


def written_elsewhere(edit: GraphEditor) -> None:
    scatter = named(edit, SCATTER)[0]
    moved = edit.call(aten.rsub.Scalar, (scatter.args[1], 11), before=scatter, like=scatter)
    edit.set_arg(scatter, 1, moved)


def unselected_written(edit: GraphEditor) -> None:
    scatter = named(edit, SCATTER)[0]
    edit.set_arg(scatter, 2, edit.call(aten.ones_like.default, (scatter.args[2],), before=scatter, like=scatter))


@pytest.mark.parametrize(
    ("form", "change", "threshold"),
    [
        ("llama", unsorted_slots, -9.0),
        ("encoder", mask_not_gathered, -9.0),
        ("llama-padded", mask_not_gathered, -9.0),
        ("llama", table_not_gathered, -9.0),
        ("llama", gate_dropped, -9.0),
        ("llama", prior_dropped, -9.0),
        ("encoder", keys_leaked, 0.8),
        ("vit-eager", keys_leaked, 0.8),
        ("llama-padded", padding_selected, -9.0),
        ("llama", written_elsewhere, -9.0),
        ("encoder", unselected_written, 0.8),
    ],
)
def test_a_wrong_routing_is_noticed(form: str, change: Callable[[GraphEditor], None], threshold: float) -> None:
    model, inputs = build(FORMS[form]), examples(FORMS[form])
    parts = parts_of(RouteSpec((1,), HALF, score="mod", gate="sigmoid", fallback="linear"), threshold=threshold)
    after = routed(canonical(model, inputs), parts)
    mask = inputs.get("attention_mask")
    valid = torch.ones_like(inputs["ids"]).bool() if mask is None else mask.bool()
    want = Reference(model, parts)(*inputs.values())[0][valid]
    assert error([run(after, *inputs.values())[0][valid]], [want]) <= FP64
    wrong = run(sabotaged(after, change), *inputs.values())[0]
    assert error([wrong[valid]], [want]) > 1e3 * FP64


def test_ensures_names_what_is_wrong() -> None:
    form = FORMS["llama"]
    step = RouteTokens(parts_of(RouteSpec((0, 1), HALF)))
    after = routed(canonical(build(form), examples(form)), step.parts)
    assert step.ensures(after) == []

    def crossed(edit: GraphEditor) -> None:
        scatter = named(edit, SCATTER)[1]
        edit.set_arg(scatter, 1, edit.call(aten.clone.default, (scatter.args[1],), before=scatter, like=scatter))

    assert ["scatters what was not gathered" in wrong for wrong in step.ensures(sabotaged(after, crossed))] == [True]
    single = RouteTokens(parts_of(RouteSpec((0,), HALF)))
    assert single.ensures(after) == ["2 selections for 1 layers"]
