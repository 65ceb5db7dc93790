"""ONNX files with every kind of custom operator, for the plugin path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from pathlib import Path

ELEMENTS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
READS = {"eps": 1e-5, "scale": 0.5, "last_bias": 0.25}
_STREAM = ("a", "b", "delta", "r", "rn", "ar", "ar_sum", "aun", "aun_sum", "m0", "m1", "m2", "m3", "m3_sum", "y")
TOKENS, SLOTS, WIDTH, BATCH = 40, 12, 64, 2


def node(op_type: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """Return an operator of ours."""
    return helper.make_node(op_type, inputs.split(), outputs.split(), name=op_type, domain="depthwire", **attributes)


def every_operator(path: Path, dtype: str = "float16", width: int = WIDTH) -> Path:
    """Write a file with every operator: reads of all forms, both phases, selection, moves and the surprise score.

    It has no bodies: it is read, not run.
    """
    norm = {"norm_eps": 1e-6}
    merge = {"eps": 1e-5, "scale": 0.5}
    nodes = [
        node("AttnResRead_2", "u a b", "r", **READS),
        node("AttnResReadNorm_3", "u g a b r", "rn", **READS, **norm),
        node("AttnResAddRead_2", "u a b delta", "ar ar_sum", **READS),
        node("AttnResAddUnitReadNorm_9", "u g a b r a b r a b r delta", "aun aun_sum", **READS, **norm),
        node("AttnResInter_2", "U a b", "o l", **merge),
        node("AttnResMerge_0", "u o l", "m0", **merge, index=1),
        node("AttnResMergeNorm_1", "u g o l a", "m1", **merge, **norm, index=0),
        node("AttnResMergeNorm_1", "u g o l b", "m2", **merge, **norm, index=2),
        node("AttnResAddMergeNorm_1", "u g o l a delta", "m3 m3_sum", **merge, **norm, index=2),
        node("SurpriseScore", "a b criteria valid", "score", window=7),
        node("SelectTokens_6", "score valid slots", "index taken", window=0),
        node("SelectTokensBudget_6", "score valid threshold budget state slots", "index_b taken_b state_out"),
        node("GatherTokens", "a index", "x"),
        node("GatherTokens", "positions index", "p"),
        node("GatherTokens", "valid index", "v"),
        node("ScatterTokens", "a index taken x", "y"),
    ]
    element = ELEMENTS[dtype]
    stream = [BATCH, TOKENS, width]
    shapes = {
        **dict.fromkeys(_STREAM, (element, stream)),
        "x": (element, [BATCH, SLOTS, width]),
        "u": (TensorProto.FLOAT, [width]),
        "g": (TensorProto.FLOAT, [width]),
        "U": (TensorProto.FLOAT, [3, width]),
        "o": (element, [3, *stream]),
        "l": (TensorProto.FLOAT, [3, *stream[:2]]),
        "score": (TensorProto.FLOAT, stream[:2]),
        "valid": (TensorProto.BOOL, stream[:2]),
        "slots": (TensorProto.INT64, [SLOTS]),
        "criteria": (TensorProto.FLOAT, [4]),
        "threshold": (TensorProto.FLOAT, [1]),
        "budget": (TensorProto.INT64, [3]),
        "state": (TensorProto.INT64, [BATCH, 2]),
        "state_out": (TensorProto.INT64, [BATCH, 2]),
        "positions": (TensorProto.INT64, stream[:2]),
        "p": (TensorProto.INT64, [BATCH, SLOTS]),
        **dict.fromkeys(("index", "index_b"), (TensorProto.INT64, [BATCH, SLOTS])),
        **dict.fromkeys(("taken", "taken_b", "v"), (TensorProto.BOOL, [BATCH, SLOTS])),
    }
    info = {name: helper.make_tensor_value_info(name, *described) for name, described in shapes.items()}
    made = {name for item in nodes for name in item.output}
    inputs = [info[name] for name in dict.fromkeys(name for item in nodes for name in item.input) if name not in made]
    outputs = [info[name] for name in ("y", "state_out", "p", "v", "m3_sum")]
    listed = {item.name for item in (*inputs, *outputs)}
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    graph.value_info.extend(value for name, value in info.items() if name not in listed)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("depthwire", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path
