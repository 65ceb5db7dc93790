"""Bytes that a routing kernel moves, against the bound of touching each of its operands once.

Derived from the kernels' structure, as in ``traffic``; ``tests/runtime/triton`` counts the addresses that the kernels
really load and store in the interpreter and compares.
"""

from __future__ import annotations

from depthwire.runtime.triton.routing_spec import RoutingSpec, item_bytes
from depthwire.runtime.triton.traffic import Traffic


def routing_traffic(spec: RoutingSpec, tokens: int, slots: int, *, taken: int | None = None) -> Traffic:
    """Return the bytes of one row of the batch.

    ``sources`` are scores, hidden states, ``delta`` and ``prior``, and the attention's operands; ``parameters`` are
    bits, indices, and the repeated reads of sums: small, and in a cache after the first.

    Args:
        spec: The kernel.
        tokens: T, all of them valid.
        slots: K. Attention's indices are spread evenly over the tokens.
        taken: Of a scatter whose output is its base: slots that are taken. ``None`` for an output of its own.
    """
    match spec.kind:
        case "select" | "budget":
            passes = 1 if spec.block else 2
            bits = tokens * (2 if spec.kind == "select" else passes)
            return _once(4 * tokens * passes, bits, 9 * slots + 16 * (spec.kind == "budget"), 4 * tokens)
        case "gather":
            return _once(slots * spec.row_bytes, 8 * slots, slots * spec.row_bytes)
        case "scatter":
            scans = -(-tokens // spec.launch.tile) * 9 * slots
            moved = (tokens if taken is None else taken) * spec.row_bytes
            return _once(moved, scans, moved)
        case "sums":
            return _once(2 * tokens * spec.width * item_bytes(spec.dtype), tokens, 8 * tokens)
        case "rank":
            averaged = 4 * sum(min(token + 1, spec.window) for token in range(tokens))
            return _once(8 * tokens, averaged, 4 * tokens)
    keys = slots if spec.kind == "slot_attention" else tokens
    return _attention(spec, keys, slots) if spec.attends else _surprise(spec, tokens)


def _once(sources: int, parameters: int, stores: int, least: int | None = None) -> Traffic:
    return Traffic(sources, parameters, stores, (sources if least is None else least) + stores)


def _surprise(spec: RoutingSpec, tokens: int) -> Traffic:
    row, tile = spec.width * item_bytes(spec.dtype), spec.launch.tile
    begins = range(0, tokens, tile)
    # The tile and the window before its first token; where that reaches beyond the row, the first token once more.
    read = sum(min(tokens, begin + tile) - max(0, begin - spec.window + 1) for begin in begins)
    again = sum(begin < spec.window for begin in begins)
    criteria = 4 * item_bytes(spec.criteria)
    bits = len(begins) * (tokens + criteria) + tokens + read
    return _once((read + again + tokens) * row, bits, 4 * tokens, 2 * tokens * row)


def _attention(spec: RoutingSpec, tokens: int, slots: int) -> Traffic:
    plan = spec.launch
    item = item_bytes(spec.dtype)
    queries = slots * spec.group * spec.kv_heads * spec.width * item
    key = 2 * spec.kv_heads * spec.width * item  # of one token, and its value
    tiles = -(-slots * spec.group // plan.tile)
    keys = 0
    for tile in range(tiles):
        last = min(slots, ((tile + 1) * plan.tile - 1) // spec.group + 1) - 1
        behind = (last * tokens // slots if spec.kind == "attention" else last) + 1
        keys += min(tokens, -(-behind // plan.columns) * plan.columns)
    parameters = spec.kv_heads * (keys + 8 * slots * spec.group)
    return Traffic(queries + keys * key, parameters, queries, 2 * queries + tokens * key)
