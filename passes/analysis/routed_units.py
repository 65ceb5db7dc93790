"""Which part of a graph a routed unit is: where its tokens are gathered, and which values they are scattered into.

::

    plain stream      x ─► layer ─► y                      gathered: x;                  result: y, which contains x
    AttnRes           h = read(v_0 … v_n) ─► f ─► source    gathered: the sources v_i;    result: f, a source of its own
    post-norm         x = norm(s) ─► layer ─► y = norm(s')  gathered: x;                  result: y
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthwire.errors import PassError
from depthwire.passes._base import module_path, where
from depthwire.passes._match import aten, is_call, value
from depthwire.passes.analysis.norm import find_norms
from depthwire.passes.analysis.reach import ancestors, descendants
from depthwire.passes.analysis.reads import READ
from depthwire.passes.analysis.residual_stream import ResidualStream, Sublayer, find_residual_stream, split_readers
from depthwire.passes.analysis.sublayer import Branches, kind_of
from depthwire.passes.partition import layer_starts
from depthwire.route import RouteSpec, check_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from depthwire.program import Program


@dataclass(frozen=True)
class Unit:
    """One routed unit, in nodes of the graph before the rewrite.

    Attributes:
        layer: Number of the layer.
        module: Its module path.
        state: The stream before it, ``[B, T, d]``; in AttnRes its newest source. Routers score it.
        normed: The norm's output that the unit starts with, if the state is read through one.
        boundary: Where tokens are gathered.
        heads: Nothing between these and the results may be read from outside.
        results: What is scattered, in graph order.
        residual: Whether the result contains the state (then it is the base that rows are scattered into).
        anchor: A node of the unit, whose provenance the nodes around it take.
        updated: The stream before and behind the layer before, for the surprise of that layer; ``None`` for the first.
    """

    layer: int
    module: str
    state: torch.fx.Node
    normed: torch.fx.Node | None
    boundary: tuple[torch.fx.Node, ...]
    heads: tuple[torch.fx.Node, ...]
    results: tuple[torch.fx.Node, ...]
    residual: bool
    anchor: torch.fx.Node
    updated: tuple[torch.fx.Node, torch.fx.Node] | None


@dataclass(frozen=True)
class _Step:
    """One sublayer, whichever way its model combines them."""

    kind: str
    module: str
    state: torch.fx.Node
    normed: torch.fx.Node | None
    head: torch.fx.Node
    sources: tuple[torch.fx.Node, ...]
    result: torch.fx.Node


def find_units(program: Program, spec: RouteSpec) -> list[Unit]:
    """Return the units that a specification names, in order.

    Args:
        program: A canonical program: plain, lifted, or native AttnRes after recognition.
        spec: What is routed.

    Raises:
        PassError: ``route.structure``, ``route.interior-read``, ``structure.no-residual-stream``: the model's structure
            cannot be routed; says which module and why.
        UsageError: ``route.layers``: a layer that does not exist.
    """
    layers = _layers(_steps(program))
    reads = any(is_call(node, READ) for node in program.exported.graph.nodes)
    check_layers(spec.layers, len(layers))
    units = []
    for layer in spec.layers:
        members = [step for step in layers[layer] if spec.unit in ("block", step.kind)]
        if not members:
            kinds = ", ".join(step.kind for step in layers[layer])
            raise _structure(layers[layer][0].result, f"layer {layer} with a sublayer of kind {spec.unit}", kinds)
        updated = (layers[layer - 1][0].state, layers[layer][0].state) if layer else None
        units.append(_unit(layer, members, updated, residual=not reads))
        _check_interior(units[-1])
    return units


def count_layers(program: Program) -> int:
    """Return how many layers a canonical program has."""
    return len(_layers(_steps(program)))


def width_of(program: Program) -> int:
    """Return d, the width of the states that are routed."""
    return int(value(_steps(program)[0].state).shape[-1])


def _steps(program: Program) -> list[_Step]:
    reads = [node for node in program.exported.graph.nodes if is_call(node, READ)]
    return _attn_res_steps(program, reads) if reads else _stream_steps(program)


def _layers(steps: Sequence[_Step]) -> list[list[_Step]]:
    starts = layer_starts([step.kind for step in steps])
    layers: list[list[_Step]] = []
    for step, begins in zip(steps, starts, strict=True):
        if begins or not layers:
            layers.append([])
        layers[-1].append(step)
    return layers


def _unit(
    layer: int, steps: Sequence[_Step], updated: tuple[torch.fx.Node, torch.fx.Node] | None, *, residual: bool
) -> Unit:
    first = steps[0]
    boundary: tuple[torch.fx.Node, ...] = (first.state,)
    heads, results = boundary, tuple(step.result for step in steps[-1:])
    if not residual:
        own = {step.result for step in steps}
        boundary = tuple(dict.fromkeys(source for source in first.sources if source not in own))
        heads, results = tuple(step.head for step in steps), tuple(step.result for step in steps)
    if value(first.state).dim() != 3:
        raise _structure(first.state, "a state [batch, tokens, width]", str(list(value(first.state).shape)))
    for result in results:
        if value(result).shape != value(first.state).shape or value(result).dtype != value(first.state).dtype:
            wanted = f"a result like the state {first.state.name}: {value(first.state).dtype}"
            raise _structure(result, f"{wanted}{list(value(first.state).shape)}", str(list(value(result).shape)))
    module = _common_path([step.module for step in steps])
    anchor = _anchor(heads, results, module)
    return Unit(layer, module, first.state, first.normed, boundary, heads, results, residual, anchor, updated)


def _common_path(paths: Sequence[str]) -> str:
    """Return the longest module path that holds all of some."""
    parts = [path.split(".") for path in paths]
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return ".".join(names[0] for names in same)


def _anchor(heads: Sequence[torch.fx.Node], results: Sequence[torch.fx.Node], module: str) -> torch.fx.Node:
    """Return the least deep node of a unit that lies in its module; a sum may lie outside of every module."""
    between = descendants(heads) & ancestors(results)
    named = [node for node in between if module_path(node).startswith(module) and module_path(node)]
    return min(named, key=lambda node: (len(module_path(node)), node.name), default=results[0])


def _stream_steps(program: Program) -> list[_Step]:
    stream = find_residual_stream(program)
    if stream.streams > 1:
        raise _structure(stream.origin, "one residual stream", f"{stream.streams}")
    post_norm = any(found.code == "post-norm" for found in stream.breaks)
    following = [*stream.sublayers[1:], None]
    return [
        _stream_step(stream, one, two, post_norm=post_norm)
        for one, two in zip(stream.sublayers, following, strict=True)
    ]


def _stream_step(stream: ResidualStream, sublayer: Sublayer, following: Sublayer | None, *, post_norm: bool) -> _Step:
    norms = sublayer.reads.norms
    state, result = sublayer.reads.node, sublayer.writes[-1].add
    normed = norms[0].output if norms else None
    if post_norm:
        after = stream.final if following is None else following.reads
        if len(after.norms) != 1:
            raise _structure(result, "one norm behind the sum (post-norm)", f"{len(after.norms)} norms")
        state, result = normed if normed is not None else state, after.norms[0].output
        normed = state
    scaled = [write for write in sublayer.writes if write.skip_scale != 1.0]
    if scaled:
        raise _structure(scaled[0].add, "a skip path with factor 1", f"factor {scaled[0].skip_scale}")
    return _Step(sublayer.kind, sublayer.module, state, normed, state, (state,), result)


def _attn_res_steps(program: Program, reads: Sequence[torch.fx.Node]) -> list[_Step]:
    order = {node: position for position, node in enumerate(program.exported.graph.nodes)}
    norms = find_norms(program.exported)
    branches = Branches(program.exported)
    origin = min(_sources(reads[0]), key=order.__getitem__)
    heads = [(origin, (origin,)), *((read, _sources(read)) for read in reads)]
    steps = []
    for (head, sources), (_, after) in itertools.pairwise(heads):
        fresh = [source for source in after if source not in sources]
        result = _result(head, sources, fresh)
        found, others = split_readers(head, norms)
        normed = found[0].output if found else None
        # The origin is read as a source by every later read as well.
        starts = [norm.output for norm in found] if found and (not others or head is origin) else [head]
        kind = kind_of(branches.kinds(result, starts))
        state = max(sources, key=order.__getitem__)
        steps.append(_Step(kind, branches.module([result], starts), state, normed, head, sources, result))
    return steps


def _sources(read: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    sources: Any = read.args[1]
    return tuple(sources)


def _result(head: torch.fx.Node, sources: Sequence[torch.fx.Node], fresh: Sequence[torch.fx.Node]) -> torch.fx.Node:
    """Return what a sublayer wrote: the new source, or what was added to the open block's sum."""
    below = descendants([head])
    made = [source for source in fresh if source in below]
    if len(made) != 1:
        raise _structure(head, "one source made of every read", f"{len(made)}")
    if is_call(made[0], aten.add.Tensor) and len(made[0].all_input_nodes) == 2:
        for old, branch in (made[0].args[:2], made[0].args[1::-1]):
            if old in sources and branch in below:
                return branch  # type: ignore[return-value]
    return made[0]


def _check_interior(unit: Unit) -> None:
    """A value between gather and scatter that something else reads would still be computed for every token."""
    below = descendants(unit.heads) - set(unit.heads)
    above = ancestors(unit.results) & below
    # In AttnRes a block's sums and reads are made of results; they go on being dense.
    later = set() if unit.residual else descendants(unit.results)
    for node in above - set(unit.results):
        for user in node.users:
            if user not in above and user not in later:
                raise PassError(
                    "route.interior-read",
                    "A value inside a routed unit is read from outside",
                    at=where(node),
                    want="a unit whose result alone is read by the rest of the model",
                    got=f"{node.name} is read by {user.name}",
                    todo="Route another unit or layer, or capture the model without this output (such as a cache).",
                )


def _structure(node: torch.fx.Node, want: str, got: str) -> PassError:
    return PassError(
        "route.structure",
        "The model's structure cannot be routed",
        at=where(node),
        want=want,
        got=got,
        todo="See 'depthwire inspect' for the sublayers; choose other layers or another unit.",
    )
