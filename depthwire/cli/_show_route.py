"""The work of a routed artefact as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.cli._show import rows_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.table import Table


def show_compute(graphs: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """Yield one row per graph, and the layers of the first."""
    rows = [
        (
            graph["file"],
            graph["capacity"] or "by layer",
            f"{graph['total']['flops'] / 1e9:.3f}",
            f"{graph['total']['attention_flops'] / 1e9:.3f}",
            f"{graph['total']['kv_bytes'] / 1e6:.3f}",
            f"{graph['layers_ratio']:.3f}",
            f"{graph['total']['ratio']:.3f}",
        )
        for graph in graphs
    ]
    columns = ("graph", "capacity", "GFLOP", "attention GFLOP", "K/V MB", "layers / dense", "all / dense")
    yield rows_table(rows, columns, "compute per call")
    yield _layers(graphs[0])


def _layers(graph: Mapping[str, Any]) -> Table:
    named = [(str(layer["layer"]), layer) for layer in graph["layers"]]
    rows = []
    for name, layer in [*named, ("rest", graph["rest"]), ("all", graph["total"])]:
        tokens = f"{layer['computed']} of {layer['tokens']}" if layer["tokens"] else "all"
        rows.append(
            (
                name,
                tokens if layer["layer"] is not None else "",
                f"{layer['flops'] / 1e6:.3f}",
                f"{layer['attention_flops'] / 1e6:.3f}",
                f"{layer['routing_flops'] / 1e6:.3f}",
                f"{layer['kv_bytes'] / 1e6:.4f}",
                f"{layer['ratio']:.3f}",
            )
        )
    columns = ("layer", "tokens", "MFLOP", "attention", "routing", "K/V MB", "of dense")
    return rows_table(rows, columns, f"{graph['file']}, by layer")


def show_routing(routing: Mapping[str, Any]) -> Table:
    """Return one row per routed unit: the tokens that it computed."""
    rows = []
    for unit in routing["selections"]:
        computed = sum(sum(row) for row in unit["computed"])
        count = sum(len(row) for row in unit["computed"])
        rows.append((unit["module"], unit["slots"], computed, count, f"{100 * unit['share']:.1f} %"))
    return rows_table(rows, ("routed unit", "slots a sequence", "computed", "tokens", "share"), "routing")
