"""Where the batch is in the operands and results of Depthwire's own operators (see ``_batch_axes``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthwire.runtime._batch_call import Call, Mark

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from depthwire.runtime._batch_call import Rule


def own_rule(kind: str) -> Rule | None:
    """Return the rule of one of our operators, by its name with or without a number."""
    return _OWN_RULES.get(_own_stem(kind))


def _read(call: Call) -> Mark:
    """``AttnResRead`` and its kin: queries and norm weights are vectors, sources have any leading axes alike."""
    vectors = 2 if "Norm" in call.node.op_type else 1
    return _sources(call, range(vectors, len(call.shapes)))


def _sources(call: Call, positions: range) -> Mark:
    axis = call.own_axis(next(position for position in positions if call.marks[position] is not None))
    if axis == len(call.shapes[positions[0]]) - 1:
        raise call.refuse("the batch is the axis that it mixes")
    for position in positions:
        call.need(position, axis)
    return Mark(axis)


def _inter(call: Call) -> Mark:
    """``AttnResInter``: results have an axis of the queries before those of the sources."""
    return Mark(_sources(call, range(1, len(call.shapes))).axis + 1)


def _merge(call: Call) -> Mark:
    """``AttnResMerge``: the results of ``AttnResInter`` lie one axis further than the sources."""
    vectors = 2 if "Norm" in call.node.op_type else 1
    first = next(at for at, each in enumerate(call.marks) if each is not None)
    axis = call.own_axis(first) - int(first < vectors + 2)
    for position in range(vectors, len(call.shapes)):
        call.need(position, axis + int(position < vectors + 2))
    return Mark(axis)


def _rows(*shared: int) -> Callable[[Call], Mark]:
    """The batch is axis 0 of every operand but those that all rows share."""

    def rule(call: Call) -> Mark:
        for position in range(len(call.shapes)):
            if position not in shared:
                call.need(position, 0)
            elif call.marks[position] is not None:
                raise call.refuse(f"operand {position} depends on the batch")
        return Mark(0)

    return rule


def _own_stem(kind: str) -> str:
    """Return the operator without its number, and of a depth-attention one without what is fused to it."""
    stem = kind.split("_", maxsplit=1)[0]
    if not stem.startswith("AttnRes"):
        return stem
    return next((part for part in ("Inter", "Merge", "Read") if part in stem), stem)


_OWN_RULES: Mapping[str, Rule] = {
    "Inter": _inter,
    "Merge": _merge,
    "Read": _read,
    "GatherTokens": _rows(),
    "ScatterTokens": _rows(),
    "SelectTokens": _rows(2),
    "SelectTokensBudget": _rows(2, 3, 5),
    "SurpriseScore": _rows(2),
}
