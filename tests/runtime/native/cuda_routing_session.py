"""Runs a routing node with the CUDA provider's kernels on the CPU (cuda_probe.cpp); prints the result as JSON.

A process of its own, as ``cuda_session`` is::

    python -m tests.runtime.native.cuda_routing_session LIBRARY FOLDER_OF_CUBINS OP_TYPE
"""

from __future__ import annotations

import json
import sys

import onnxruntime
import torch

from tests.runtime.native.routing_node import RoutingNode, routing_model

BATCH, TOKENS, SLOTS = 2, 40, 20


def node_of(op_type: str) -> RoutingNode:
    """Return a node whose inputs are told apart by their first four bytes."""
    valid = torch.tensor([True, False, True, True] * 10).expand(BATCH, TOKENS).contiguous()
    index = torch.arange(7, 7 + SLOTS).expand(BATCH, SLOTS).contiguous()
    taken = torch.tensor([True, True, True, False] * 5).expand(BATCH, SLOTS).contiguous()
    slots = torch.arange(SLOTS)
    match op_type.partition("_")[0]:
        case "SelectTokens":
            score = torch.full((BATCH, TOKENS), 1.5)
            return RoutingNode(op_type, {"score": score, "valid": valid, "slots": slots}, {"window": 0})
        case "SelectTokensBudget":
            score = torch.full((BATCH, TOKENS), 1.5)
            given = {"score": score, "valid": valid, "threshold": torch.tensor(0.25)}
            counts = {"budget": torch.tensor([3, 5, 1]), "state": torch.full((BATCH, 2), 9)}
            return RoutingNode(op_type, {**given, **counts, "slots": slots})
        case "GatherTokens":
            x = torch.full((BATCH, TOKENS, 3, 4), 2.0, dtype=torch.float16)
            return RoutingNode(op_type, {"x": x, "index": index})
        case "ScatterTokens":
            base, rows = torch.full((BATCH, TOKENS, 6), 2.0), torch.full((BATCH, SLOTS, 6), 4.0)
            return RoutingNode(op_type, {"base": base, "index": index, "taken": taken, "rows": rows})
    delta, prior = (torch.full((BATCH, TOKENS, 24), value, dtype=torch.float16) for value in (2.0, 4.0))
    criteria = torch.tensor([0.5, 1.0, 2.0, 3.0])
    given = {"delta": delta, "prior": prior, "criteria": criteria, "valid": valid}
    return RoutingNode(op_type, given, {"window": 8})


def main(library: str, folder: str, op_type: str) -> dict[str, object]:
    """Run the node."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("depthwire.kernels", folder)
    node = node_of(op_type)
    try:
        options.register_custom_ops_library(library)
        model = routing_model(node).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found = session.run(None, node.feeds())
    except Exception as error:  # noqa: BLE001 - the test reads its text
        return {"error": str(error)}
    return {"shapes": [list(item.shape) for item in found]}


if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(4)
    sys.stdout.write(json.dumps(main(*sys.argv[1:4])))
