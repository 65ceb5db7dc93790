"""Reads by the operators of other packages, recognised by name and schema; none of them has to be installed.

* ``flash_attn_res::_phase_1_batched_attention_forward_with_aux``: (out ``[S, …, d]``, lse ``[S, …]``, …) of a bank
* ``flash_attn_res::_phase_2_online_softmax_merge_forward_with_aux``: (out, …), one more source joins a row of these
* ``attnres::_fixed_tail_forward_with_aux``: (out, …) of packed values ``[n, rows, d]``
* ``attnres::_fixed_tail_sources_forward_with_aux``: (out, …) of a list
* ``attnres::_multiquery_forward_with_aux``: (out ``[M, …, d]`` or ``[…, M, d]``, …)
* ``trtllm::attn_res_fwd``: (out, …) of a layer and a bank ``[K, …]``
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from depthwire.passes._match import argument, value
from depthwire.passes.analysis.depth_axes import DEPTH, Dims, whole
from depthwire.passes.analysis.depth_layout import join, root
from depthwire.passes.analysis.depth_values import Const, Logits, LogSum, Mix, Term, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from depthwire.passes.analysis.depth_product import Context

    Results = list[list[Value]]
    Lookup = Callable[[object], list[Value]]


def package_results(context: Context, alternatives: Lookup) -> Results | None:
    """Return the alternatives of every result of a package's operator, ``None`` if the node is no such call."""
    schema = getattr(context.node.target, "_schema", None)
    found = _OPERATORS.get(str(schema.name)) if schema is not None else None
    if found is None:
        return None
    names, reader = found
    given = {name: argument(context.node, index, name) for index, name in enumerate(names)}
    if [each.name for each in schema.arguments] != list(names):  # type: ignore[union-attr]
        return None  # another version's operator of the same name
    results: Results = [[] for _ in value(context.node)]
    for index, value_ in enumerate(reader(context, given, alternatives)):
        results[index] += value_
    return results


def _packed(bank: object, alternatives: Lookup) -> list[Term]:
    """Return what a tensor is as sources stacked along its first dimension."""
    found = [term for term in alternatives(bank) if isinstance(term, Term) and term.pure and term.bank is not None]
    stacked = [term for term in found if term.dims[0] == whole(DEPTH, len(term.bank)) and _written(term)]  # type: ignore[arg-type]
    return [term for term in stacked if term.deep or not term.dims[0]]


def _written(term: Term) -> bool:
    return term.bank is not None and not any(source.blank for source in term.bank.sources)


def _listed(context: Context, sources: Sequence[Any], alternatives: Lookup) -> list[Term]:
    stacked = join(context, [alternatives(each) or [root(context, each)] for each in sources], 0, new=True)
    return [term for term in stacked if isinstance(term, Term) and term.pure]


def _logits(context: Context, term: Term, queries: Sequence[Any], eps: float, scale: float) -> Logits | None:
    """Return the logits of one query ``[d]`` (or a product of several such, or queries ``[M, d]``)."""
    bank = term.bank
    if bank is None or not bank.shape:
        return None
    axis, width = len(bank.shape) - 1, bank.shape[-1]
    if term.dims[-1] != whole(axis, width):
        return None
    consts = set()
    for query in queries:
        if query not in context.constants:
            return None
        shape = [int(size) for size in value(query).shape]
        if shape[-1] != width or len(shape) > 2:
            return None
        count = shape[0] if len(shape) == 2 else 1
        rows = (whole(("query", query.name, 0), count),) if len(shape) == 2 else ()
        consts.add((Const(context.constants.first(query), (*rows, whole(axis, width))), 1.0))
    return Logits(bank, axis, frozenset(consts), eps, scale)


def _read(logits: Logits, dims: Dims) -> Term:
    mask = (1 << len(logits.bank)) - 1
    return Term(dims, None, factors=frozenset({(Mix(logits, unit=False, mask=mask, raw=False), 1.0)}))


def _one_query(logits: Logits | None, term: Term) -> list[list[Value]]:
    return [] if logits is None else [[_read(logits, term.dims[1:])]]


def _fixed_tail(context: Context, given: dict[str, Any], alternatives: Lookup) -> Results:
    for term in _packed(given["values"], alternatives):
        return _one_query(_logits(context, term, [given["query"]], given["eps"], given["scale"]), term)
    return []


def _fixed_tail_sources(context: Context, given: dict[str, Any], alternatives: Lookup) -> Results:
    for term in _listed(context, given["sources"], alternatives):
        return _one_query(_logits(context, term, [given["query"]], given["eps"], given["scale"]), term)
    return []


def _multiquery(context: Context, given: dict[str, Any], alternatives: Lookup) -> Results:
    if given["selected_ids"] is not None:
        return []
    packed = bool(given["packed"])
    found = _packed(given["sources"][0], alternatives) if packed else _listed(context, given["sources"], alternatives)
    for term in found:
        logits = _logits(context, term, [given["queries"]], given["eps"], given["scale"])
        if logits is None:
            return []
        ((queries, _),) = logits.query
        rest = term.dims[1:]
        major = given["output_layout"] == "query_major"
        dims = (queries.dims[0], *rest) if major else (*rest[:-1], queries.dims[0], rest[-1])
        return [[_read(logits, dims)]]
    return []


def _trtllm(context: Context, given: dict[str, Any], alternatives: Lookup) -> Results:
    """The layer ``[M, 1, d]`` comes after the bank ``[K, M, 1, d]``."""
    last = [
        t
        for t in [*alternatives(given["layer_residual"]), root(context, given["layer_residual"])]
        if isinstance(t, Term)
    ]
    rows = [replace(term, dims=((), *term.dims)) for term in last]
    bank = given["block_residual"]
    before = [] if value(bank).numel() == 0 else [alternatives(bank)]
    for term in join(context, [*before, rows], 0, new=False):
        if isinstance(term, Term) and term.pure:
            queries = [given["res_weight"], given["rms_weight"]]
            return _one_query(_logits(context, term, queries, given["rms_eps"], 1.0), term)
    return []


def _phase_1(context: Context, given: dict[str, Any], alternatives: Lookup) -> Results:
    for term in _packed(given["block_representations"], alternatives):
        logits = _logits(context, term, [given["pseudo_queries"]], given["eps"], 1.0)
        if logits is None:
            return []
        ((queries, _),) = logits.query
        dims = (queries.dims[0], *term.dims[1:])
        total = Term(dims[:-1], None, factors=frozenset({(LogSum(logits), 1.0)}))
        return [[_read(logits, dims)], [total]]
    return []


def _phase_2(context: Context, given: dict[str, Any], alternatives: Lookup) -> Results:
    """One more source joins the softmax of a row of phase 1; its query must be that row's."""
    mixes = [
        t for t in alternatives(given["interblock_normalized_output"]) if isinstance(t, Term) and t.mix is not None
    ]
    totals = [t for t in alternatives(given["interblock_lse"]) if isinstance(t, Term)]
    for mixed in mixes:
        mix = mixed.mix
        if mix is None or mix.unit or not any(_is_total(total, mix.logits, mixed) for total in totals):
            continue
        logits = mix.logits
        if logits.eps != given["eps"] or not _is_row(context, logits, mixed, given["pseudo_query"]):
            continue
        for partial in [*alternatives(given["intrablock_partial_sum"]), root(context, given["intrablock_partial_sum"])]:
            if (
                not isinstance(partial, Term)
                or partial.bank is None
                or not partial.pure
                or partial.bank.shape != logits.bank.shape
                or partial.dims != mixed.dims
            ):
                continue
            bank = context.banks.get([*logits.bank.sources, *partial.bank.sources], logits.bank.shape)
            base = replace(partial, bank=bank)
            merged = _logits(context, base, [given["pseudo_query"]], logits.eps, 1.0)
            if merged is not None:
                return [[_read(merged, mixed.dims)]]
    return []


def _is_total(total: Term, logits: Logits, mixed: Term) -> bool:
    """Tell whether a term is the logarithm of the sum of the exponentials of a mix, unscaled and unshifted."""
    found = total.only(LogSum)
    plain = logits.scale == 1.0 and logits.bias is None and len(logits.query) == 1
    fits = total.fixed == mixed.fixed and total.dims == mixed.dims[:-1]
    return found is not None and found.logits == logits and plain and fits


def _is_row(context: Context, logits: Logits, mixed: Term, query: torch.fx.Node) -> bool:
    ((queries, _),) = logits.query
    rows = dict(mixed.fixed)
    if query not in context.constants:
        return False
    table = context.constants.tensor(queries.node)
    label = queries.dims[0][0].axis if queries.dims[0] else None
    row = rows.get(label, 0 if label is None else -1)
    return row >= 0 and bool(torch.equal(table[row], context.constants.tensor(query).to(table.dtype)))


_OPERATORS: dict[str, tuple[tuple[str, ...], Callable[[Context, dict[str, Any], Lookup], Results]]] = {
    "flash_attn_res::_phase_1_batched_attention_forward_with_aux": (
        ("block_representations", "pseudo_queries", "eps"),
        _phase_1,
    ),
    "flash_attn_res::_phase_2_online_softmax_merge_forward_with_aux": (
        ("intrablock_partial_sum", "pseudo_query", "interblock_normalized_output", "interblock_lse", "eps"),
        _phase_2,
    ),
    "attnres::_fixed_tail_forward_with_aux": (("values", "query", "eps", "scale"), _fixed_tail),
    "attnres::_fixed_tail_sources_forward_with_aux": (("sources", "query", "eps", "scale"), _fixed_tail_sources),
    "attnres::_multiquery_forward_with_aux": (
        ("sources", "queries", "selected_ids", "packed", "eps", "scale", "strategy", "output_layout"),
        _multiquery,
    ),
    "trtllm::attn_res_fwd": (
        ("layer_residual", "block_residual", "res_weight", "rms_weight", "rms_eps"),
        _trtllm,
    ),
}
