"""Faults put into a finished artefact, each sealed again with right hashes: only the comparison can notice them."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

from depthwire.artifact import MANIFEST, MODEL, Artifact, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QUERY = "attn_res.query."
DOMAIN = "depthwire"


def sabotaged(artifact: Path, target: Path, fault: Callable[[onnx.GraphProto], None]) -> Path:
    """Copy an artefact (large files by hard link), put a fault into its graph, and seal it again."""
    shutil.copytree(artifact, target, copy_function=os.link)
    model = onnx.load(str(target / MODEL), load_external_data=False)
    fault(model.graph)
    (target / MODEL).unlink()
    (target / MODEL).write_bytes(model.SerializeToString())
    copy = Artifact(target, Manifest.model_validate_json((target / MANIFEST).read_text(encoding="utf-8")))
    copy.add_file(MODEL)
    copy.write_manifest()
    return target


def reads(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the AttnRes reads in graph order, whatever is fused into them."""
    return [node for node in graph.node if node.domain == DOMAIN and "Read" in node.op_type]


def sources(node: onnx.NodeProto) -> slice:
    """Return where a read's sources stand among its inputs: behind query and gain, before what is added."""
    return slice(2 if "Norm" in node.op_type else 1, len(node.input) - ("Add" in node.op_type))


def drop_eps_correction(graph: onnx.GraphProto) -> None:
    """Give every norm the eps of the original model."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("epsilon", "norm_eps"):
                attribute.f = 1e-5


def perturb_query(read: int) -> Callable[[onnx.GraphProto], None]:
    """Add noise of standard deviation 0.05 to one query."""

    def fault(graph: onnx.GraphProto) -> None:
        (query,) = [tensor for tensor in graph.initializer if tensor.name == f"{QUERY}{read}"]
        noise = np.random.default_rng(0).normal(0, 0.05, list(query.dims)).astype(np.float32)
        query.CopyFrom(numpy_helper.from_array(noise, query.name))

    return fault


def drop_source(read: int) -> Callable[[onnx.GraphProto], None]:
    """Take the second source away from one read."""

    def fault(graph: onnx.GraphProto) -> None:
        node = _read(graph, read)
        del node.input[sources(node).start + 1]
        stem, _, count = node.op_type.rpartition("_")
        node.op_type = f"{stem}_{int(count) - 1}"

    return fault


def exchange_sources(early: int, late: int) -> Callable[[onnx.GraphProto], None]:
    """Exchange the last source of an early read with the first of a late one.

    Within one read an exchange changes nothing: a softmax over depth does not know an order.
    """

    def fault(graph: onnx.GraphProto) -> None:
        a, b = _read(graph, early), _read(graph, late)
        last, first = sources(a).stop - 1, sources(b).start
        a.input[last], b.input[first] = b.input[first], a.input[last]

    return fault


def reverse_sources(read: int) -> Callable[[onnx.GraphProto], None]:
    """Reverse the order of one read's sources: no fault at all (the one that a sum is made with stays the last)."""

    def fault(graph: onnx.GraphProto) -> None:
        node = _read(graph, read)
        place = sources(node)
        stop = place.stop - ("Add" in node.op_type)
        inputs = list(node.input)
        inputs[place.start : stop] = reversed(inputs[place.start : stop])
        del node.input[:]
        node.input.extend(inputs)

    return fault


def _read(graph: onnx.GraphProto, read: int) -> onnx.NodeProto:
    (node,) = [node for node in reads(graph) if node.input[0] == f"{QUERY}{read}"]
    return node
