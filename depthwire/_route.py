"""From the recipe's ``route`` section to what the routing pass takes: a specification with its learned parts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from depthwire.errors import UsageError
from depthwire.route import RouteSpec, check_layers, parse_capacity, parse_layers

if TYPE_CHECKING:
    from depthwire._recipe_model import RouteOptions
    from depthwire.program import Program
    from depthwire.route_parts import RouteParts

_WITH_PARTS = ("parts", "capacity", "capacities", "carry")
_NOT_SPECIFIED = {"parts", "seed", "layers", "capacity", "capacities", "carry"}


def route_of(options: RouteOptions, original: Program, canonical: Program) -> RouteParts | None:
    """Return what is to be routed, ``None`` if nothing is.

    Args:
        options: The recipe's section.
        original: The captured program: its task decides the rule, fitted parts are checked against its weights.
        canonical: The program whose layers are counted.

    Raises:
        UsageError: ``route.…``: options that contradict each other, parts that do not fit.
        PassError: The model has no structure that could be routed.
    """
    if not options.enabled:
        return None
    from depthwire.passes.analysis.routed_units import count_layers, width_of
    from depthwire.passes.recognize_attn_res import RecognizeAttnRes
    from depthwire.passes.remove_trivial_reads import RemoveTrivialReads

    # A native AttnRes model has no residual stream: its layers are counted by its reads.
    counted = RemoveTrivialReads().run(RecognizeAttnRes().run(canonical).program).program
    layers, width = count_layers(counted), width_of(counted)
    if options.parts is not None:
        return _fitted(options, original, layers, width)
    if options.seed is None:
        raise UsageError(
            "route.no-parts",
            "There are no routers",
            at="route",
            want="--route FILE with fitted parts, or --route-seed N to draw untrained ones (for measuring speed)",
            got="neither",
            todo="Train or fit routers for this model, or draw them knowing that they choose at random.",
        )
    return _drawn(options, original, layers, width)


def variants_of(options: RouteOptions, route: RouteParts | None) -> tuple[RouteParts, ...]:
    """Return the same routing at every further capacity that the recipe lists, in the order of the list."""
    if route is None or options.capacities is None:
        return ()
    own = set(route.spec.capacity)
    listed = dict.fromkeys(_capacities(options.capacities))
    further = [capacity for capacity in listed if own != {capacity}]
    return tuple(dataclasses.replace(route, spec=route.spec.with_capacity(capacity)) for capacity in further)


def _fitted(options: RouteOptions, original: Program, layers: int, width: int) -> RouteParts:
    from depthwire.route_parts import RouteParts

    given = options.model_dump(exclude_none=True)
    beside = [name for name in given if name not in _WITH_PARTS]
    if beside:
        raise UsageError(
            "route.options",
            "The routing file decides what its parts were fitted for",
            at=", ".join(f"--route-{name.replace('_', '-')}" for name in beside),
            want="--route with no other option than --capacity",
            got=", ".join(f"{name} {given[name]}" for name in beside),
            todo="Leave the options away, or fit parts for them.",
        )
    assert options.parts is not None  # noqa: S101 - the caller has looked
    parts = RouteParts.load(options.parts)
    check_layers(parts.spec.layers, layers)
    parts.check(width)
    parts.check_model(original.exported.state_dict)
    if options.capacity is None:
        return parts
    return dataclasses.replace(parts, spec=dataclasses.replace(parts.spec, capacity=_capacities(options.capacity)))


def _drawn(options: RouteOptions, original: Program, layers: int, width: int) -> RouteParts:
    from depthwire.route_parts import draw_parts

    capacity = options.capacity
    if capacity is None and options.capacities is not None:
        capacity = options.capacities.split(",", maxsplit=1)[0]
    missing = [name for name, value in (("layers", options.layers), ("capacity", capacity)) if value is None]
    if options.layers is None or capacity is None or options.seed is None:
        raise UsageError(
            "route.options",
            "It is not said what to route",
            at="route",
            want="--route-layers and --capacity",
            got="no " + " and no ".join(missing),
            todo="For example: --route-layers every:2 --capacity 0.5",
        )
    rest: dict[str, Any] = options.model_dump(exclude_none=True, exclude=_NOT_SPECIFIED)
    rest.setdefault("rule", "budget" if original.source.task == "causal-lm" else "top-k")
    spec = RouteSpec(parse_layers(options.layers, layers), _capacities(capacity), **rest)
    return draw_parts(spec, width, options.seed)


def _capacities(text: str) -> tuple[Any, ...]:
    return tuple(parse_capacity(part) for part in text.split(","))
