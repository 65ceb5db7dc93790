"""The child process that holds the TensorRT-RTX builder: ``python -m depthwire.runtime._build_worker``.

The builder is native code that can end its process (a segmentation fault, an abort, the out-of-memory killer). Here
that costs a child, and the peak memory is the builder's own. Standard library only, so that the child stays small.

Protocol: one line of JSON on stdin (the request, see ``_build_process.BuildRequest``); lines of JSON on stdout, each
with an ``event``: ``phase``, ``step``, and as the last one ``result`` or ``error``. The log goes to stderr. stdin stays
open: when it closes, the parent is gone and the child ends.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from depthwire.runtime._child import Channel, end_with_parent, make_logger
from depthwire.runtime._peak_rss import peak_rss_bytes

_STEP_INTERVAL_SECONDS = 0.1
# ONNX's names of types, and TensorRT's; the same names as in ``_build_process.BuildRequest.dtypes``.
_NETWORK_DTYPES = {
    "FLOAT": "FLOAT",
    "FLOAT16": "HALF",
    "BFLOAT16": "BF16",
    "FLOAT8E4M3FN": "FP8",
    "FLOAT4E2M1": "FP4",
    "INT64": "INT64",
    "INT32": "INT32",
    "INT8": "INT8",
    "UINT8": "UINT8",
    "INT4": "INT4",
    "BOOL": "BOOL",
}


def main() -> None:
    """Serve one request and end the process."""
    faulthandler.enable()
    _forbid_core_dumps()
    channel = Channel()
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        import tensorrt_rtx
    except ImportError as error:
        channel.send("error", kind="missing", message=str(error))
        return
    try:
        event, fields = _build(tensorrt_rtx, request, channel)
    except OSError as error:
        event, fields = "error", {"kind": "write", "message": str(error)}
    channel.send(event, **fields)
    # The builder's destructors have nothing left to do that matters, and could only crash.
    sys.stderr.flush()
    os._exit(0)


def _forbid_core_dumps() -> None:
    # A crash with a model in memory would leave its gigabytes in the user's directory.
    try:
        import resource
    except ImportError:  # Windows has neither the module nor core files
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _build(trt: Any, request: dict[str, Any], channel: Channel) -> tuple[str, dict[str, Any]]:
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    channel.send("phase", name="Parsing ONNX", steps=0)
    if not parser.parse_from_file(request["model"]):
        return "error", {"kind": "parse", "version": trt.__version__, "errors": _parser_errors(parser, log.node)}
    wrong, checked = _wrong_dtypes(network, request["dtypes"])
    if wrong:
        return "error", {"kind": "dtypes", "version": trt.__version__, "wrong": wrong, "checked": checked}
    config = _configure(trt, builder, request)
    config.progress_monitor = _monitor(trt, channel)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return "error", {"kind": "build", "version": trt.__version__, "errors": log.errors}
    channel.send("phase", name="Writing the engine", steps=0)
    with Path(request["engine"]).open("wb") as file:
        file.write(memoryview(engine))
    layers, dtypes, weights = _census(trt, network)
    return "result", {
        "version": trt.__version__,
        "bytes": int(engine.nbytes),
        "peak_rss_bytes": peak_rss_bytes(),
        "layers": layers,
        "dtypes": dtypes,
        "weights": weights,
        "checked": checked,
    }


def _configure(trt: Any, builder: Any, request: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    capabilities = request["compute_capabilities"]
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    # On by default, and float32 products would then keep 10 bits of their operands.
    config.clear_flag(trt.BuilderFlag.TF32)
    if request["workspace_bytes"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    if request["optimization_level"] is not None:
        config.builder_optimization_level = request["optimization_level"]
    if request["strip_weights"]:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        # The weights that are put back are those of the same file: all that follows from their values may be used.
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if request["profile"]:
        profile = builder.create_optimization_profile()
        for name, shapes in request["profile"].items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    return config


def _parser_errors(parser: Any, last_node: str) -> list[dict[str, str]]:
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        # Importers that fail after the static checks name no node; the log then says which one was being parsed.
        name = f"{error.node_name()} [{error.node_operator()}]" if error.node_name() else last_node
        calls = " in ".join(error.local_function_stack())
        found.append({"node": f"{name} in {calls}" if calls else name, "message": error.desc()})
    return found


def _wrong_dtypes(network: Any, expected: dict[str, str]) -> tuple[list[dict[str, str]], int]:
    """Compare the types of tensors and weights that the graph names; also return how many there were."""
    found: dict[str, str] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "CONSTANT":
            found.setdefault(layer.name, layer.get_output(0).dtype.name)  # named like the weight
        for output in range(layer.num_outputs):
            tensor = layer.get_output(output)
            found.setdefault(tensor.name, tensor.dtype.name)
    for tensor in (*map(network.get_input, range(network.num_inputs)), *_outputs(network)):
        found[tensor.name] = tensor.dtype.name
    common = [name for name in expected if name in found]
    wrong = [
        {"name": name, "graph": expected[name], "network": found[name]}
        for name in common
        if _NETWORK_DTYPES[expected[name]] != found[name]
    ]
    return wrong, len(common)


def _outputs(network: Any) -> list[Any]:
    return [network.get_output(index) for index in range(network.num_outputs)]


def _census(trt: Any, network: Any) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Count layers by kind, tensors by dtype, and the bytes of constants by dtype."""
    layers: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        layers[layer.type.name] += 1
        dtypes.update(layer.get_output(output).dtype.name for output in range(layer.num_outputs))
        if layer.type == trt.LayerType.CONSTANT:
            tensor = layer.get_output(0)
            weights[tensor.dtype.name] += math.ceil(math.prod(tensor.shape) * tensor.dtype.itemsize)
    return dict(layers.most_common()), dict(dtypes.most_common()), dict(weights.most_common())


def _monitor(trt: Any, channel: Channel) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.reported = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:  # noqa: ARG002
            channel.send("phase", name=name, steps=steps)

        def step_complete(self, name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self.reported >= _STEP_INTERVAL_SECONDS:
                self.reported = now
                channel.send("step", name=name, step=step + 1)
            return True

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


if __name__ == "__main__":
    main()
