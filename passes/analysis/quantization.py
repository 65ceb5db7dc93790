"""How the linear layers of a program are quantised: integers and scales of weights, scales of activations.

``calibrate`` runs the program on text and returns a ``QuantizationPlan``, which ``QuantizeLinear`` puts into a graph.
The plan knows weights by their names in the model, so it applies to every graph over the same weights.

``int8``: weights per output channel, activations per tensor with a fixed scale, both symmetric. A layer whose output
moves too much by rounding its input (a few channels of some activations are a thousand times larger than the others)
keeps its activation as it is; its weight alone is int8. ``int4-weights``: weights in blocks along the summed axis; the
few that lose most by it for their size get 8 bits, one scale a channel.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthwire._mapped import release
from depthwire.errors import UsageError
from depthwire.ops.quantize import dequantize_reference, quantize_reference
from depthwire.passes.analysis.observe import observe
from depthwire.passes.analysis.quantization_linears import Linear, find_linears, refuse_block
from depthwire.passes.analysis.quantization_plan import Kind, QuantizationPlan, QuantizedWeight, most_sensitive
from depthwire.passes.analysis.quantization_ranges import Histogram, output_energy
from depthwire.passes.analysis.quantization_rounding import Grid, output_error, round_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from depthwire.program import Program

__all__ = ["Kind", "QuantizationPlan", "QuantizedWeight", "calibrate"]

BLOCK = 64
"""Weights along the summed axis that share a scale in ``int4-weights``; TensorRT takes 64 and 128."""
EIGHT_BIT_SHARE = 0.5
"""The largest share of the weights of an ``int4-weights`` plan that are given 8 bits."""
ACTIVATION_ERROR = 2e-3
"""How much of the energy of a token's output may be lost by rounding a layer's input, on average over tokens."""
WORST_TOKEN_ERROR = 0.05
"""The same for a single token: a fixed scale may not cut off the one that all others attend to."""
_MEASURED = 4  # windows on which the cost of rounding activations is measured
_MOMENT_BYTES = 2 << 30  # second moments held at once; more layers take more runs of the program


def calibrate(
    program: Program,
    feeds: Sequence[Mapping[str, Tensor]],
    kind: Kind,
    *,
    block_size: int = BLOCK,
    eight_bit_share: float = EIGHT_BIT_SHARE,
    progress: Callable[[str], None] | None = None,
) -> QuantizationPlan:
    """Run a program on calibration inputs and decide how each of its linear weights is quantised.

    Args:
        program: A program behind the standard passes, in the dtype that it was trained in.
        feeds: Inputs by name; text that nothing is measured on afterwards. 16 windows of 512 tokens are plenty.
        kind: Weights and activations in 8 bits, or weights in 4.
        block_size: Weights that share a scale in ``int4-weights``.
        eight_bit_share: Share of the weights that ``int4-weights`` may give 8 bits, 0 to 1.
        progress: Called with a line a stage.

    Raises:
        UsageError: There are no inputs (``quantize.no-inputs``).
    """
    if not feeds:
        raise UsageError(
            "quantize.no-inputs",
            "Quantisation needs inputs to calibrate on",
            at="calibrate",
            want="at least one set of inputs, such as a window of text",
            got="none",
            todo="Give a text with --text that is longer than the windows that are compared.",
        )
    blocks = block_size if kind == "int4-weights" else 0
    run = _Calibration(program, feeds, kind=kind, block=blocks, share=eight_bit_share, progress=progress or _silent)
    return run.plan()


def _silent(_line: str) -> None:
    pass


class _Calibration:
    def __init__(
        self,
        program: Program,
        feeds: Sequence[Mapping[str, Tensor]],
        *,
        kind: Kind,
        block: int,
        share: float,
        progress: Callable[[str], None],
    ) -> None:
        self._program, self._feeds, self._kind, self._progress = program, feeds, kind, progress
        self._block, self._share = block, share
        linears = find_linears(program)
        self._linears, self._kept = dict(linears.found), dict(linears.kept)
        self._held = {**program.exported.constants, **program.exported.state_dict}
        self._tokens = 0
        for name, each in linears.found.items():
            decline = refuse_block(each[0], self._block)
            if decline is not None:
                self._kept[name] = decline
                del self._linears[name]

    def plan(self) -> QuantizationPlan:
        weights: dict[str, QuantizedWeight] = {}
        with torch.no_grad():
            for names in self._rounds():
                weights.update(self._quantize(names))
        ordered = {name: weights[name] for name in self._linears}
        return QuantizationPlan(self._kind, ordered, self._kept, self._tokens)

    def _rounds(self) -> Iterator[list[str]]:
        """Yield the weights whose second moments fit into memory together."""
        names: list[str] = []
        inputs: set[torch.fx.Node] = set()
        for name, linears in self._linears.items():
            more = {linear.input for linear in linears}
            if names and sum(_moment_bytes(node) for node in inputs | more) > _MOMENT_BYTES:
                yield names
                names, inputs = [], set()
            names.append(name)
            inputs |= more
        if names:
            yield names

    def _quantize(self, names: list[str]) -> dict[str, QuantizedWeight]:
        observed = _Observed(self._importance(names), histograms=self._kind == "int8")
        for index, feed in enumerate(self._feeds):
            observe(self._program, feed, observed.visit)
            self._progress(f"inputs of {len(names)} layers: {index + 1} of {len(self._feeds)} windows")
        self._tokens = max(self._tokens, *observed.rows.values())
        grid = Grid(8, 0) if self._kind == "int8" else Grid(4, self._block)
        weights = {}
        for index, name in enumerate(names):
            weights[name] = self._weight(name, observed, grid)
            self._progress(f"weights: {index + 1} of {len(names)}")
        if self._kind == "int8":
            return self._activations(weights, observed)
        for name in most_sensitive(weights, self._share):
            reason = f"four bits would cost {weights[name].weight_error:.1e} of the output's energy"
            weights[name] = replace(self._weight(name, observed, Grid(8, 0)), reason=reason)
        return weights

    def _matrix(self, name: str) -> Tensor:
        """Return a weight as fp32 ``[N, K]``."""
        stored: Tensor = self._held[name].detach()
        return (stored if self._linears[name][0].axis else stored.T).to(torch.float32)

    def _importance(self, names: Iterable[str]) -> dict[torch.fx.Node, Tensor]:
        """Return, for every input, what an error of 1 in each of its channels costs its layers."""
        costs: dict[torch.fx.Node, Tensor] = {}
        for name in names:
            energy = self._matrix(name).square().sum(0)
            release(self._held[name])
            for node in {linear.input for linear in self._linears[name]}:
                costs[node] = costs[node] + energy if node in costs else energy
        return costs

    def _weight(self, name: str, observed: _Observed, grid: Grid) -> QuantizedWeight:
        axis = self._linears[name][0].axis
        matrix = self._matrix(name)
        moment = torch.stack([observed.moments[node] for node in self._inputs(name)]).sum(0)
        values, scale = round_weight(matrix, moment, grid)
        found = dequantize_reference(values, scale, 1, matrix.shape[1] // scale.shape[1])
        lost = output_error(matrix, found, moment)
        release(self._held[name])
        if not axis:
            values, scale = values.T.contiguous(), scale.T.contiguous()
        if not grid.block:
            scale = scale.flatten()
        return QuantizedWeight(
            values, scale, axis if grid.block else 1 - axis, grid.block, grid.bits, weight_error=lost
        )

    def _inputs(self, name: str) -> list[torch.fx.Node]:
        return list(dict.fromkeys(linear.input for linear in self._linears[name]))

    def _activations(self, weights: dict[str, QuantizedWeight], observed: _Observed) -> dict[str, QuantizedWeight]:
        """Give the layers scales for their inputs, those apart that lose too much by it."""
        groups: dict[tuple[torch.fx.Node, ...], list[str]] = defaultdict(list)
        for name in weights:
            groups[tuple(self._inputs(name))].append(name)
        scales = {key: _merged([observed.histograms[node] for node in key]).scale() for key in groups}
        lost = self._losses(weights, groups, scales)
        result = {}
        for key, names in groups.items():
            mean, worst = (max(lost[name][index] for name in names) for index in range(2))
            for name in names:
                reason = _reason(self._linears[name], mean, worst)
                activation = None if reason else scales[key]
                result[name] = replace(
                    weights[name], activation=activation, activation_error=lost[name][0], reason=reason
                )
        return result

    def _losses(
        self,
        weights: Mapping[str, QuantizedWeight],
        groups: Mapping[tuple[torch.fx.Node, ...], list[str]],
        scales: Mapping[tuple[torch.fx.Node, ...], float],
    ) -> dict[str, tuple[float, float]]:
        """Return the share of a token's output energy that is lost by rounding the input: the mean, and the worst."""
        wanted: dict[torch.fx.Node, list[tuple[float, list[str]]]] = defaultdict(list)
        for key, names in groups.items():
            for node in key:
                wanted[node].append((scales[key], names))
        found: dict[str, list[Tensor]] = {name: [] for name in weights}

        def visit(node: torch.fx.Node, x: Any) -> None:
            for number, names in wanted.get(node, ()):
                rows, scale = _rows(x), torch.tensor(number)
                moved = dequantize_reference(quantize_reference(rows, scale), scale) - rows
                for name in names:
                    matrix = self._matrix(name)
                    whole = (rows @ matrix.T).square().sum(1)
                    lost = (moved @ matrix.T).square().sum(1)
                    found[name].append(lost / whole.clamp_(min=torch.finfo(torch.float32).tiny))

        for index, feed in enumerate(self._feeds[:_MEASURED]):
            observe(self._program, feed, visit)
            self._progress(f"rounded inputs: {index + 1} of {min(len(self._feeds), _MEASURED)} windows")
        shares = {name: torch.cat(parts) for name, parts in found.items()}
        return {name: (float(share.mean()), float(share.max())) for name, share in shares.items()}


class _Observed:
    """What a run of the program shows of the inputs of some layers."""

    def __init__(self, importance: Mapping[torch.fx.Node, Tensor], *, histograms: bool) -> None:
        self._importance = importance
        self.moments: dict[torch.fx.Node, Tensor] = {
            node: torch.zeros(len(costs), len(costs)) for node, costs in importance.items()
        }
        self.histograms = {node: Histogram() for node in importance} if histograms else {}
        self.rows = dict.fromkeys(importance, 0)

    def visit(self, node: torch.fx.Node, x: Any) -> None:
        moment = self.moments.get(node)
        if moment is None:
            return
        rows, importance = _rows(x), self._importance[node]
        self.rows[node] += len(rows)
        if node in self.histograms:
            self.histograms[node].add(rows, importance)
        # A few tokens of a trained transformer (the first of a text, often) carry activations a thousand times larger
        # than the others; unless all are brought to outputs of one size, those are all that the moment says.
        level = rows * output_energy(rows, importance).rsqrt_().unsqueeze(1)
        moment.addmm_(level.T, level)


def _rows(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).reshape(-1, x.shape[-1])


def _merged(histograms: Sequence[Histogram]) -> Histogram:
    counts = torch.stack([histogram.counts for histogram in histograms]).sum(0)
    return Histogram(counts, max(histogram.largest for histogram in histograms))


def _reason(linears: Sequence[Linear], mean: float, worst: float) -> str:
    """Return why an input is left alone; nothing if it is rounded."""
    if any(linear.source for linear in linears):
        return "its input is a source of an AttnRes read"
    if mean > ACTIVATION_ERROR:
        return f"rounding the input would cost {mean:.1e} of the output's energy, more than {ACTIVATION_ERROR:.0e}"
    if worst > WORST_TOKEN_ERROR:
        return f"rounding the input would cost one token {worst:.0%} of its output, more than {WORST_TOKEN_ERROR:.0%}"
    return ""


def _moment_bytes(node: torch.fx.Node) -> int:
    width: int = node.meta["val"].shape[-1]
    return 4 * width * width
