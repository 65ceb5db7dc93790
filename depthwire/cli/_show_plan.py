"""A plan as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthwire.cli._show import pairs_table, rows_table
from depthwire.reporters import megabytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table

    from depthwire._plan import ArtifactPlan, GraphPlan, Plan, Row, TargetPlan

_COLUMNS = ("precision", "weights", "embeddings", "engine", "values", "running", "loading", "building", "")
_MEASURED = ("target", "graph", "engine", "predicted", "building", "predicted", "values", "predicted", "from")


def show_plan(plan: Plan) -> Iterator[RenderableType]:
    """Yield, for every artefact, a table for each graph and target, and what was measured."""
    for each in plan.artifacts:
        yield pairs_table([("artefact", each.directory), ("bucket", each.bucket)], "plan (predicted, not measured)")
        for graph in each.graphs:
            for target in graph.targets:
                yield _target_table(graph, target)
                yield from _reasons(target)
        if each.measured:
            yield _measured_table(each)


def _target_table(graph: GraphPlan, target: TargetPlan) -> Table:
    facts = target.target
    memory = "memory varies"
    if facts.memory_bytes is not None:
        memory = f"{megabytes(facts.memory_bytes)}, {megabytes(facts.reserved_bytes)} of it for the system"
    capacity = "" if graph.capacity is None else f", capacity {graph.capacity}"
    rows = [_row(row, memory_known=facts.memory_bytes is not None) for row in target.rows]
    return rows_table(rows, _COLUMNS, f"{graph.file}{capacity} on {facts.name} ({memory})")


def _row(row: Row, *, memory_known: bool) -> tuple[str, ...]:
    needs = row.needs
    verdict = "does not fit" if row.problems else "fits" if memory_known else ""
    return (
        needs.precision if needs.own else f"{needs.precision} (convert)",
        megabytes(needs.weight_bytes),
        megabytes(needs.embedding_bytes),
        _size(needs.engine_bytes),
        megabytes(needs.activation_bytes),
        megabytes(needs.run_bytes),
        megabytes(needs.loading_bytes),
        _size(needs.build_bytes),
        verdict,
    )


def _reasons(target: TargetPlan) -> Iterator[str]:
    for row in target.rows:
        for problem in row.problems:
            yield f"  {row.needs.precision}: {problem}"


def _measured_table(artifact: ArtifactPlan) -> Table:
    rows = [
        (
            each.target,
            each.graph,
            megabytes(each.engine_bytes),
            _size(each.predicted_engine_bytes),
            _size(each.build_bytes),
            _size(each.predicted_build_bytes),
            _size(each.activation_bytes),
            _size(each.predicted_activation_bytes),
            each.source,
        )
        for each in artifact.measured
    ]
    return rows_table(rows, _MEASURED, "measured")


def _size(count: int | None) -> str:
    return "" if count is None else megabytes(count)
