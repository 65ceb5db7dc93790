"""A routed model whose capacity and thresholds are chosen call by call.

::

    model = RoutedModel(Artifact.load("out"))
    result = model.run({"input_ids": ids}, capacity="25%", thresholds=0.4)
    result.outputs["logits"], result.work.table()

One session for each graph of the artefact, all of them over one weights file, which is mapped once. A threshold says
which tokens ask to be computed and moves without any rebuilding; the capacity, which decides the shapes, picks the
graph. What a call has computed is counted from the graph's own shapes, and what tokens have taken from its bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from depthwire.errors import UsageError
from depthwire.route import parse_capacity
from depthwire.runtime.accounting import Account, account
from depthwire.runtime.onnxruntime import CPU, run_session, session_from_artifact

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnxruntime as ort
    from numpy.typing import ArrayLike, NDArray

    from depthwire.artifact import Artifact, RouteGraph, RouteInfo

Capacity = Fraction | float | str

THRESHOLDS, BUDGETS, STATES = "route_thresholds", "route_budgets", "route_states"


@dataclass(frozen=True)
class UnitWork:
    """What one routed unit did in a call.

    Attributes:
        module: Path of the module.
        layer: Number of its layer.
        tokens: T, padding among them.
        computed: K: slots that were computed, taken or not.
        taken: Tokens selected, for every sequence of the batch.
    """

    module: str
    layer: int | None
    tokens: int
    computed: int
    taken: tuple[int, ...]


@dataclass(frozen=True)
class CallWork:
    """What one call computed, against the same model over all tokens.

    Attributes:
        capacity: Of the graph that ran; ``None`` where its layers differ.
        units: Every routed unit, in the order of the graph.
        account: Operations and bytes by layer, from the shapes of the graph.
    """

    capacity: Fraction | None
    units: tuple[UnitWork, ...]
    account: Account

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "capacity": None if self.capacity is None else str(self.capacity),
            "units": [
                {"module": u.module, "layer": u.layer, "tokens": u.tokens, "computed": u.computed, "taken": [*u.taken]}
                for u in self.units
            ],
            **self.account.as_dict(),
        }


@dataclass(frozen=True)
class RoutedResult:
    """What one call returned.

    Attributes:
        outputs: The model's own outputs by name.
        work: What was computed.
        states: Counts behind the last token, ``[n, B, 2]`` int64: what the next chunk of the same sequences is given as
            ``states``; ``None`` without running budgets.
        taken: ``[B, K]`` bool of every routed unit: which slots hold a selected token.
    """

    outputs: Mapping[str, NDArray[Any]]
    work: CallWork
    states: NDArray[Any] | None
    taken: tuple[NDArray[Any], ...]


class RoutedModel:
    """ONNX Runtime sessions over all capacities of an artefact."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        capacities: Sequence[Capacity] | None = None,
        providers: Sequence[str] = (CPU,),
        threads: int | None = None,
        map_weights: bool = True,
        kernels: bool | None = None,
    ) -> None:
        """Open the sessions.

        Args:
            artifact: A routed model.
            capacities: Which graphs to open; all of them when absent.
            providers: As in ``session_from_artifact``.
            threads: Threads within an operator.
            map_weights: Let all sessions read the weights where they lie, in one mapped file, and give the memory of
                intermediate results back after a call. Otherwise each copies the weights into its kernels' layout and
                keeps its memory, which makes a call faster and takes the weights once for each capacity.
            kernels: As in ``session_from_artifact``.

        Raises:
            UsageError: The artefact is not routed (``runtime.not-routed``), or has no such capacity
                (``runtime.no-capacity``).
            BuildError: As ``session_from_artifact``.
        """
        route = artifact.manifest.route
        if route is None:
            raise UsageError(
                "runtime.not-routed",
                "The artefact's layers are not routed",
                at=str(artifact.root),
                want="a model with selections of tokens",
                got="none",
                todo="Convert with --route FILE, or --route-seed to measure; else use a plain session.",
            )
        self._artifact, self._route = artifact, route
        self._graphs = {_share(graph): graph for graph in reversed(route.graphs)}
        self._default = _share(route.graphs[0])
        wanted = self._graphs if capacities is None else [self._choose(capacity) for capacity in capacities]
        self._sessions: dict[Fraction | None, ort.InferenceSession] = {}
        self._accounts: dict[Fraction | None, Account] = {}
        for share in wanted:
            graph = self._graphs[share]
            chosen = artifact.with_graph(graph.file)
            self._accounts[share] = account(chosen.model)
            self._sessions[share] = session_from_artifact(
                chosen,
                providers=providers,
                threads=threads,
                map_weights=map_weights,
                extra_outputs=_inner(graph),
                keep_memory=not map_weights,
                kernels=kernels,
            )

    @property
    def capacities(self) -> tuple[Fraction, ...]:
        """Capacities that can be asked for, ascending."""
        return tuple(sorted(share for share in self._sessions if share is not None))

    def account(self, capacity: Capacity | None = None) -> Account:
        """Return what a call at a capacity computes."""
        return self._accounts[self._opened(capacity)]

    def run(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        capacity: Capacity | None = None,
        thresholds: ArrayLike | None = None,
        budgets: ArrayLike | None = None,
        states: ArrayLike | None = None,
    ) -> RoutedResult:
        """Run once.

        Args:
            inputs: The model's inputs by name.
            capacity: Share of the tokens that routed layers compute; ``model.onnx``'s own when absent.
            thresholds: Least score of a candidate: one for all routed units, or one for each, ``[n]``; the fitted ones
                when absent. ``-inf`` lets every token ask.
            budgets: Numerator, denominator and margin, ``[n, 3]``, or ``[3]`` for all units. More than the capacity
                grants is cut off at K.
            states: ``states`` of the call before, for a sequence in chunks; zeros when absent.

        Raises:
            UsageError: No such capacity is open (``runtime.no-capacity``), or an array does not fit
                (``runtime.route-input``).
            BuildError: ONNX Runtime fails (``runtime.run``).
        """
        share = self._opened(capacity)
        given = {THRESHOLDS: thresholds, BUDGETS: budgets, STATES: states}
        feed = {**inputs, **{name: self._table(name, value) for name, value in given.items() if value is not None}}
        values = run_session(self._sessions[share], feed)
        graph = self._graphs[share]
        taken = tuple(values[unit.taken] for unit in graph.units)
        units = tuple(
            UnitWork(unit.module, unit.layer, unit.tokens, unit.slots, tuple(int(row.sum()) for row in bits))
            for unit, bits in zip(graph.units, taken, strict=True)
        )
        outputs = {info.name: values[info.name] for info in self._artifact.manifest.outputs}
        return RoutedResult(outputs, CallWork(share, units, self._accounts[share]), _states(graph, values), taken)

    def _choose(self, capacity: Capacity | None) -> Fraction | None:
        """Return the key of a capacity's graph."""
        share = self._default if capacity is None else parse_capacity(capacity)
        if share not in self._graphs:
            raise self._no_capacity(str(capacity), self._graphs)
        return share

    def _opened(self, capacity: Capacity | None) -> Fraction | None:
        share = self._choose(capacity)
        if share not in self._sessions:
            raise self._no_capacity("the default" if capacity is None else str(capacity), self._sessions)
        return share

    def _no_capacity(self, got: str, known: Mapping[Fraction | None, object]) -> UsageError:
        names = [str(share) for share in sorted(share for share in known if share is not None)]
        return UsageError(
            "runtime.no-capacity",
            "There is no graph of this capacity",
            at=str(self._artifact.root),
            want=", ".join(names) or "none: the layers have capacities of their own",
            got=got,
            todo="Choose one of these, or convert with it among --capacities.",
        )

    def _table(self, name: str, value: ArrayLike) -> NDArray[Any]:
        """Return a table of the routed units in the shape and dtype of the graph's input."""
        import numpy as np

        info = next((info for info in self._route.inputs if info.name == name), None)
        if info is None:
            raise UsageError(
                "runtime.route-input",
                "The graph has no such input",
                at=name,
                want="layers routed by a running budget" if not self._route.inputs else "an input of the graph",
                got=_rule(self._route),
                todo="Leave it out: a top-k selection has neither thresholds nor budgets.",
            )
        array = np.asarray(value)
        row = info.shape[1:] if name == BUDGETS else []
        fits = list(array.shape) in (info.shape, row) and (np.dtype(info.dtype).kind == "f" or array.dtype.kind in "iu")
        if not fits or (array.dtype.kind == "f" and bool(np.isnan(array).any())):
            raise UsageError(
                "runtime.route-input",
                "A table of the routing does not fit the graph",
                at=name,
                want=f"{info.dtype} {info.shape}, no NaN" + (f", or {row} for all units" if name != STATES else ""),
                got=f"{array.dtype} {list(array.shape)}" + (" with NaN" if fits else ""),
                todo="Give a value for every routed unit, in the order of the manifest's 'route' section.",
            )
        return np.ascontiguousarray(np.broadcast_to(array.astype(info.dtype), info.shape))


def _share(graph: RouteGraph) -> Fraction | None:
    return None if graph.capacity is None else Fraction(graph.capacity)


def _inner(graph: RouteGraph) -> list[str]:
    """Return the names of the values inside a graph that tell what was taken."""
    return [name for unit in graph.units for name in (unit.taken, unit.state) if name]


def _states(graph: RouteGraph, values: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    import numpy as np

    rows = [values[unit.state] for unit in graph.units if unit.state]
    return np.stack(rows) if rows and len(rows) == len(graph.units) else None


def _rule(route: RouteInfo) -> str:
    return "a routing of the model's own" if route.spec is None else f"rule {route.spec['rule']}"
