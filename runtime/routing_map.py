"""Which layer computes which token: the selections of a routed program over real inputs.

The program is run with torch, node by node; at each ``select_tokens`` and ``select_tokens_budget`` the index, the
taken slots and the scores are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from depthwire.errors import UsageError
from depthwire.runtime._fx import is_selection, module_of
from depthwire.runtime._plot import require_figure
from depthwire.runtime.torch_exported import placeholder_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor
    from torch.fx import Node

    from depthwire.program import Program

_MOST_NAMED = 128
"""Tokens up to which a picture names each; a longer one keeps the axis numeric."""


@dataclass(frozen=True)
class Selection:
    """One routed unit over all sequences.

    Attributes:
        name: Its node in the graph.
        module: Path of the routed module.
        slots: K, the most tokens that it computes of a sequence.
        computed: For each sequence, whether each of its tokens was computed.
        scores: For each sequence, the score of each token.
    """

    name: str
    module: str
    slots: int
    computed: tuple[tuple[bool, ...], ...]
    scores: tuple[tuple[float, ...], ...]

    @property
    def share(self) -> float:
        """Share of all tokens that were computed."""
        rows = [bit for row in self.computed for bit in row]
        return sum(rows) / len(rows)


@dataclass(frozen=True)
class RoutingMap:
    """The selections of a program, in order of execution.

    Attributes:
        selections: At least one.
        tokens: For each sequence, its tokens as text (or as numbers, where there is no tokenizer).
    """

    selections: tuple[Selection, ...]
    tokens: tuple[tuple[str, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the map as JSON-ready values."""
        selections = [
            {
                "name": each.name,
                "module": each.module,
                "slots": each.slots,
                "share": each.share,
                "computed": [[int(bit) for bit in row] for row in each.computed],
                "scores": [list(row) for row in each.scores],
            }
            for each in self.selections
        ]
        return {"tokens": [list(row) for row in self.tokens], "selections": selections}


def routing_map(
    program: Program, windows: Sequence[Mapping[str, NDArray[Any]]], tokens: Sequence[Sequence[str]]
) -> RoutingMap:
    """Run a program and record what it selects.

    Args:
        program: A routed program; its selections are operators.
        windows: Inputs by name, in the captured shapes; at least one.
        tokens: The text of every token, one row for each sequence of the windows.

    Raises:
        UsageError: ``runtime.not-routed``: nothing in the program is routed.
    """
    recorder = _Recorder(program)
    if not recorder.selections:
        raise UsageError(
            "runtime.not-routed",
            "Nothing in the program is routed, so there is no routing map",
            at=program.source.reference,
            want="a model with token routing, or routing options (--route FILE, or --route-layers and --capacity)",
            got="no selection of tokens",
            todo="See 'depthwire explain' for what the compiler finds in the model.",
        )
    for window in windows:
        recorder.record(placeholder_values(program, window))
    selections = tuple(recorder.described(node) for node in recorder.selections)
    return RoutingMap(selections, tuple(tuple(row) for row in tokens))


class _Recorder(torch.fx.Interpreter):
    """Runs the graph and keeps, for each selection, which tokens were taken and their scores."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.exported.graph_module)
        self._graph = program.exported.graph
        self.selections = [node for node in self._graph.nodes if is_selection(node)]
        self._computed: dict[str, list[tuple[bool, ...]]] = {node.name: [] for node in self.selections}
        self._scores: dict[str, list[tuple[float, ...]]] = {node.name: [] for node in self.selections}

    def record(self, values: Mapping[str, Any]) -> None:
        """Run once, with one value for each placeholder by name."""
        order = [values[node.name] for node in self._graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            self.run(*order)

    def run_node(self, n: Node) -> Any:
        """Run a node; look at what it selected if it is a selection."""
        result = super().run_node(n)
        if is_selection(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._keep(n.name, args[0], result[0], result[1])
        return result

    def _keep(self, name: str, score: Tensor, index: Tensor, taken: Tensor) -> None:
        bits = torch.zeros(score.shape, dtype=torch.bool).scatter(1, index, taken)
        self._computed[name] += [tuple(row) for row in bits.tolist()]
        self._scores[name] += [tuple(row) for row in score.double().tolist()]

    def described(self, node: Node) -> Selection:
        """Return what a selection took of all sequences so far."""
        slots = int(node.meta["val"][0].shape[1])
        return Selection(
            node.name,
            module_of(node) or node.name,
            slots,
            tuple(self._computed[node.name]),
            tuple(self._scores[node.name]),
        )


def save_routing_picture(found: RoutingMap, file: Path, *, sequence: int = 0) -> None:
    """Draw one sequence: a row for each routed unit, a column for each token, dark where it was computed.

    Args:
        found: What ``routing_map`` found.
        file: A ``.png`` to write.
        sequence: Which of the sequences.

    Raises:
        BuildError: ``runtime.no-matplotlib``.
    """
    figure_type = require_figure(file, "the routing map", "; routing_map.html and the table need none.")
    rows = [[float(bit) for bit in each.computed[sequence]] for each in found.selections]
    tokens = found.tokens[sequence]
    figure = figure_type(
        figsize=(3 + 0.14 * min(len(tokens), _MOST_NAMED), 1.8 + 0.24 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(rows, cmap="Greys", vmin=0.0, vmax=1.3, aspect="auto", interpolation="nearest")
    labels = [f"{each.module}  {100 * each.share:.0f} %" for each in found.selections]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    if len(tokens) <= _MOST_NAMED:
        # A dollar sign would start a formula.
        names = [token.replace("\n", "\\n").replace("$", r"\$") for token in tokens]
        axes.set_xticks(range(len(tokens)), names, fontsize=6, rotation=90)
    else:
        axes.set_xlabel("token")
    axes.set_title("computed (dark) and skipped tokens of each routed unit; share of all tokens", fontsize=8)
    figure.savefig(file, dpi=130, metadata={"Software": None})


def routing_html(found: RoutingMap) -> str:
    """Return the map as one self-contained page: the text once per routed unit, computed tokens marked."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("depthwire", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("routing_map.html.j2").render(map=found)
