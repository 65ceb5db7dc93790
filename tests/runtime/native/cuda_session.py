"""Runs a node or an artefact with the CUDA provider's kernels on the CPU (cuda_probe.cpp); prints the result as JSON.

A process of its own, because the driver is looked for once, where ``LD_LIBRARY_PATH`` of its start says::

    python -m tests.runtime.native.cuda_session LIBRARY FOLDER_OF_CUBINS OP_TYPE WIDTH
    python -m tests.runtime.native.cuda_session LIBRARY ARTEFACT
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from depthwire.runtime.triton.spec import KernelSpec

ROWS, QUERIES, INDEX = (2, 3), 5, 2
VALUES = {"query": 1.0, "queries": 2.0, "norm_weight": 3.0, "delta": 7.0}


def spec_of(op_type: str, width: int) -> KernelSpec:
    """Return the kernel that the node asks for."""
    inter = "Inter" in op_type
    return KernelSpec(
        op_type,
        width,
        "float32",
        eps=1e-5,
        scale=0.5,
        last_bias=0.0 if inter else 1.5,
        norm_eps=1e-6 if "Norm" in op_type else 0.0,
        index=INDEX if "Merge" in op_type else 0,
        queries=QUERIES if inter else 1,
    )


def operands(spec: KernelSpec) -> dict[str, np.ndarray]:
    """Return tensors that their first value tells apart; row i of an inter-block result is 10 + i, or 20 + i."""
    made = {}
    for name in spec.inputs:
        if name in ("inter_out", "inter_lse"):
            rows = np.arange(QUERIES, dtype=np.float32).reshape(-1, 1, 1) + (10 if name == "inter_out" else 20)
            made[name] = np.broadcast_to(rows, (QUERIES, *ROWS)).copy()
            if name == "inter_out":
                made[name] = np.repeat(made[name][..., None], spec.width, -1)
        elif name.startswith("source_"):
            made[name] = np.full((*ROWS, spec.width), 100 + int(name[7:]), np.float32)
        else:
            shape = {"queries": (QUERIES, spec.width), "delta": (*ROWS, spec.width)}.get(name, (spec.width,))
            made[name] = np.full(shape, VALUES[name], np.float32)
    return made


def main(library: str, folder: str, op_type: str, width: int) -> dict[str, object]:
    """Run the node."""
    spec = spec_of(op_type, width)
    values = operands(spec)
    attributes: dict[str, Any] = {"eps": spec.eps, "scale": spec.scale}
    if spec.kind != "inter":
        attributes["last_bias"] = spec.last_bias
    if spec.norm:
        attributes["norm_eps"] = spec.norm_eps
    if spec.kind == "merge":
        attributes["index"] = spec.index
    node = helper.make_node(op_type, list(values), list(spec.outputs), domain="depthwire", **attributes)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in values.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in spec.outputs]
    graph = helper.make_graph([node], "one", inputs, outputs)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("depthwire", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("depthwire.kernels", folder)
    try:
        options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run(None, values)
    except Exception as error:  # noqa: BLE001 - the test reads its text
        return {"error": str(error)}
    return {"first": [float(item.flat[0]) for item in found], "shapes": [list(item.shape) for item in found]}


def run_artifact(library: str, folder: str) -> dict[str, object]:
    """Run a whole artefact on zeros."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("depthwire.kernels", f"{folder}/kernels")
    try:
        options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
        session.run(None, {item.name: np.zeros(item.shape, np.int64) for item in session.get_inputs()})
    except Exception as error:  # noqa: BLE001 - the test reads its text
        return {"error": str(error)}
    return {}


if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(4)
    if len(sys.argv) == 3:
        sys.stdout.write(json.dumps(run_artifact(sys.argv[1], sys.argv[2])))
        sys.exit()
    sys.stdout.write(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
