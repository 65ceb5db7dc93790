"""What an engine builder must know of a routed graph: the slots of its selections, and its inputs with defaults."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import psutil

from depthwire.errors import BuildError, UsageError
from depthwire.runtime._batch_profile import OpenBatch, open_batch
from depthwire.runtime._route_profile import SLOTS, profiled_model
from depthwire.runtime._turing import small_products, without_small_products

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from onnx import ModelProto

    from depthwire.artifact import Artifact

TOP_K_LIMIT = 3840
"""Most values that TopK of TensorRT and TensorRT-RTX returns."""

Profile = dict[str, tuple[tuple[int, ...], ...]]

_ROUTE_INPUTS = ("route_thresholds", "route_budgets", "route_states")


def refuse_wide_selections(model: Path) -> None:
    """Refuse what the builder would refuse: more slots in one window of a top-k selection than its TopK returns.

    Raises:
        BuildError: ``build.too-many-slots``.
    """
    proto = _load(model)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    values = (*proto.graph.value_info, *proto.graph.input)
    shapes |= {v.name: tuple(dim.dim_value for dim in v.type.tensor_type.shape.dim) for v in values}
    for node in proto.graph.node:
        if node.domain != "depthwire" or not node.op_type.startswith("SelectTokens_"):
            continue
        tokens, slots = shapes.get(node.input[0], (0, 0))[1], shapes.get(node.input[2], (0,))[0]
        window = next((attribute.i for attribute in node.attribute if attribute.name == "window"), 0) or tokens
        share = slots * window // tokens if tokens else 0
        if share > TOP_K_LIMIT:
            raise BuildError(
                "build.too-many-slots",
                "A selection takes more tokens than TopK returns",
                at=f"{model}: {node.name}",
                want=f"at most {TOP_K_LIMIT} tokens selected from a window",
                got=f"{share} of {window}",
                todo="Route with --route-rule budget, or select in windows with --route-window.",
            )


@contextlib.contextmanager
def network_model(
    artifact: Artifact,
    *,
    route_inputs: bool,
    all_capacities: bool = False,
    max_batch: int | None = None,
    turing: bool = False,
) -> Iterator[tuple[Path, Profile]]:
    """Give the graph to build: the artefact's own, or a copy of which thresholds, budgets and counts are real inputs.

    A parser of TensorRT takes an input with a default for a constant. The copy, without the defaults, lies beside the
    weights for as long as the engine is built.

    Args:
        artifact: The artefact.
        route_inputs: Whether the caller of the engine gives the tables.
        all_capacities: One network for all graphs of the artefact; its caller gives the slots, and the tables too.
        max_batch: Leave the batch open, from 1 to this; ``None`` for the batch of the graph.
        turing: Write small float32 products as sums.

    Returns:
        The file, and least, usual and greatest shape of the inputs that have no static one.

    Raises:
        UsageError: ``build.no-route-inputs``: the graph has no such inputs; ``build.one-capacity``;
            ``build.batch-not-followed``.
    """
    small = frozenset(small_products(artifact.model)) if turing else None
    if all_capacities:
        opened: list[OpenBatch] = []
        model, slots = profiled_model(artifact, _load if max_batch is None else _opener(opened))
        # The widest graph, which the result is made of, is read last.
        profile = opened[-1].profile(max_batch) if max_batch is not None else {}
        with _copy(artifact, model, small) as path:
            yield path, {**profile, SLOTS: ((slots[0],), (slots[len(slots) // 2],), (slots[-1],))}
        return
    if not route_inputs and max_batch is None and not turing:
        yield artifact.model, {}
        return
    proto = _load(artifact.model)
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in _ROUTE_INPUTS]
    if route_inputs and len(kept) == len(proto.graph.initializer):
        raise UsageError(
            "build.no-route-inputs",
            "The graph has no thresholds that an engine could take as inputs",
            at=str(artifact.model),
            want="layers routed by a running budget",
            got="none",
            todo="Leave --route-inputs out, or convert with --route-rule budget.",
        )
    if max_batch is not None:
        batched = open_batch(artifact.model, tables_are_inputs=route_inputs)
        with _copy(artifact, batched.model, small) as path:
            yield path, batched.profile(max_batch)
        return
    if route_inputs:
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
    with _copy(artifact, proto, small) as path:
        yield path, {}


def _opener(opened: list[OpenBatch]) -> Callable[[Path], ModelProto]:
    def read(path: Path) -> ModelProto:
        found = open_batch(path, tables_are_inputs=True)
        if found.frozen:
            raise UsageError(
                "build.batch-not-followed",
                "Batch and capacities of this graph cannot both be left open",
                at=f"{path}: {', '.join(found.frozen[:4])}",
                want="shapes in which the batch keeps its place",
                got="the batch moves where the number of slots is open already",
                todo="Leave --max-batch or --all-capacities out.",
            )
        opened.append(found)
        return found.model

    return read


def remove_abandoned(folder: Path, *names: str) -> None:
    """Remove temporary files ``.<name>.<process>`` whose process is gone: it was killed before it could tidy up."""
    for name in names:
        for path in folder.glob(f".{name}.*"):
            pid = path.suffix[1:]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _copy(artifact: Artifact, model: ModelProto, small: frozenset[str] | None) -> Iterator[Path]:
    if small is not None:
        model = without_small_products(model, small)
    remove_abandoned(artifact.model.parent, artifact.model.name)
    copy = artifact.model.with_name(f".{artifact.model.name}.{os.getpid()}")
    try:
        copy.write_bytes(model.SerializeToString())
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _load(model: Path) -> ModelProto:
    import onnx

    return onnx.load(str(model), load_external_data=False)
