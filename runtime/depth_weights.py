"""Which read attends to which source: the softmax weights over depth, averaged over the tokens of real inputs.

A program whose reads are operators (lifted, or recognised in a native model) is run with torch, node by node; at each
read the weights are computed again from the very values that it reads::

    s_i = scale · (u · v_i) / sqrt(mean_d(v_i²) + eps)  (+ last_bias for the last source),   p = softmax_i(s)

and averaged over every token. They show what training made of the depth: a mean of 1/n everywhere is a plain residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from depthwire.errors import UsageError
from depthwire.ops import read_weights
from depthwire.runtime._fx import module_of, operator_name
from depthwire.runtime._plot import require_figure
from depthwire.runtime.torch_exported import placeholder_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor
    from torch.fx import Node

    from depthwire.program import Program

_READS = tuple(f"depthwire::attn_res_{kind}" for kind in ("read", "read_norm", "add_read", "add_read_norm"))
_MOST_NUMBERS = 400
"""Cells up to which the numbers are written into the map."""
_BRIGHT = 0.6
"""Weight from which a cell is too bright for white letters."""


@dataclass(frozen=True)
class Read:
    """One read of the depth.

    Attributes:
        name: Its node in the graph.
        module: Path of the module whose input it is (or that does the reading, where the graph does not say).
        sources: Node of each source, in order.
        source_modules: Path of the module that each source comes from; empty for an input of the model.
        weights: Mean weight of each source over all tokens; they sum to 1.
    """

    name: str
    module: str
    sources: tuple[str, ...]
    source_modules: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class DepthWeights:
    """The reads of a program, in order of execution.

    Attributes:
        reads: At least one.
        tokens: Tokens that the means are over.
    """

    reads: tuple[Read, ...]
    tokens: int

    def matrix(self) -> list[list[float | None]]:
        """Return ``[reads, most sources]``; ``None`` where a read has no such source."""
        width = max(len(read.weights) for read in self.reads)
        return [[*read.weights, *[None] * (width - len(read.weights))] for read in self.reads]

    def as_dict(self) -> dict[str, Any]:
        """Return the weights as JSON-ready values."""
        reads = [
            {
                "name": read.name,
                "module": read.module,
                "sources": [
                    {"name": name, "module": module, "weight": weight}
                    for name, module, weight in zip(read.sources, read.source_modules, read.weights, strict=True)
                ],
            }
            for read in self.reads
        ]
        return {"tokens": self.tokens, "reads": reads, "matrix": self.matrix()}


def depth_weights(program: Program, windows: Sequence[Mapping[str, NDArray[Any]]]) -> DepthWeights:
    """Run a program and average the weights of its reads.

    Args:
        program: Its reads are single operators: the schedule of ``convert``, which splits them in two phases, has not
            been chosen yet.
        windows: Inputs by name, in the captured shapes; at least one.

    Raises:
        UsageError: ``runtime.no-reads``: the program does not read the depth.
    """
    recorder = _Recorder(program)
    if not recorder.reads:
        raise UsageError(
            "runtime.no-reads",
            "The program has no AttnRes read, so there are no depth weights",
            at=program.source.reference,
            want="a model with Attention Residuals, or a lifted one (depthwire rewrite --attn-res …)",
            got="an ordinary residual stream",
            todo="See 'depthwire inspect' for what the compiler finds in the model.",
        )
    for window in windows:
        recorder.record(placeholder_values(program, window))
    reads = tuple(_describe(node, recorder.mean(node)) for node in recorder.reads)
    return DepthWeights(reads, recorder.tokens)


class _Recorder(torch.fx.Interpreter):
    """Runs the graph and keeps, for each read, the sum of its weights over the tokens seen so far."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.exported.graph_module)
        self._graph = program.exported.graph
        self.reads = [node for node in self._graph.nodes if _is_read(node)]
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    @property
    def tokens(self) -> int:
        """Tokens seen, by the read that saw most (a model may read fewer in some layers)."""
        return max(self._tokens.values())

    def mean(self, node: Node) -> tuple[float, ...]:
        """Return the mean weight of each source of a read."""
        return tuple((self._sums[node.name] / self._tokens[node.name]).tolist())

    def record(self, values: Mapping[str, Any]) -> None:
        """Run once.

        Args:
            values: One value for each placeholder, by name.
        """
        order = [values[node.name] for node in self._graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            self.run(*order)

    def run_node(self, n: Node) -> Any:
        """Run a node; look at the operands first if it is a read."""
        if _is_read(n):
            weights = _weights(self._operands(n))
            flat = weights.reshape(weights.shape[0], -1)
            self._sums[n.name] = self._sums.get(n.name, torch.zeros(len(flat), dtype=torch.float64)) + flat.sum(1)
            self._tokens[n.name] = self._tokens.get(n.name, 0) + flat.shape[1]
        return super().run_node(n)

    def _operands(self, node: Node) -> dict[str, Any]:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return _bound(node, args, kwargs)


def _is_read(node: Node) -> bool:
    return node.op == "call_function" and operator_name(node) in _READS


def _bound(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the operands of a read by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)  # noqa: S101 - what _is_read found out
    declared = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    given = {argument.name: value for argument, value in zip(declared, args, strict=False)}
    return {**defaults, **given, **kwargs}


def _weights(operands: Mapping[str, Any]) -> Tensor:
    """Return the weights ``[n, …]`` of one read, in fp64."""
    sources: list[Tensor] = list(operands["sources"])
    if "delta" in operands:  # the read adds it to the last source and rounds before it reads
        sources[-1] = sources[-1] + operands["delta"]
    wide = [source.double() for source in sources]
    return read_weights(operands["query"], wide, operands["eps"], operands["scale"], operands["last_bias"])


def _describe(node: Node, weights: tuple[float, ...]) -> Read:
    operands = _bound(node, node.args, node.kwargs)
    sources = list(operands["sources"])
    return Read(
        name=node.name,
        module=_reader(node),
        sources=tuple(source.name for source in sources),
        source_modules=tuple(module_of(source) for source in sources),
        weights=weights,
    )


def _reader(node: Node) -> str:
    """Return the path of the module that takes what was read: that of the first user outside the read's own module."""
    own, at = module_of(node), node
    while at.users:
        at = next(iter(at.users))
        if module_of(at) not in (own, ""):
            return module_of(at)
        if len(at.all_input_nodes) > 1:
            break  # no cast or reshape any more: the module that reads does something with it itself
    return own


def save_heat_map(weights: DepthWeights, file: Path) -> None:
    """Draw the weights as a heat map, a row for each read and a column for each source.

    Args:
        weights: What ``depth_weights`` found.
        file: A ``.png`` to write.

    Raises:
        BuildError: ``runtime.no-matplotlib``.
    """
    otherwise = ", or leave -o out: the weights are shown and in --json all the same."
    figure_type = require_figure(file, "the heat map", otherwise)
    rows = [[float("nan") if weight is None else weight for weight in row] for row in weights.matrix()]
    figure = figure_type(figsize=(2.5 + 0.35 * max(len(rows[0]), 8), 1.4 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(rows)), [read.module or read.name for read in weights.reads], fontsize=7)
    axes.set_xticks(range(len(rows[0])))
    axes.set_xlabel("source, oldest first")
    axes.set_title(f"weight of each source, mean over {weights.tokens:,} tokens", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8)
    if len(rows) * len(rows[0]) <= _MOST_NUMBERS:
        for y, row in enumerate(weights.matrix()):
            for x, weight in enumerate(row):
                if weight is not None:
                    colour = "black" if weight > _BRIGHT else "white"
                    axes.text(x, y, f"{weight:.2f}", ha="center", va="center", color=colour, fontsize=6)
    figure.savefig(file, dpi=130, metadata={"Software": None})
