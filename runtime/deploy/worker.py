"""The child process that holds TensorRT: builds an engine, runs one on the goldens, or measures one.

Protocol: one line of JSON on stdin, the request, with its ``kind``; lines of JSON on stdout, each with an ``event``:
``phase``, and as the last one ``result`` or ``error``. The log goes to stderr. stdin stays open: when it closes, the
parent is gone and the child ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import json
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from depthwire.runtime._child import Channel, end_with_parent, make_logger
from depthwire.runtime.deploy.probe import peak_rss

_SHOWN_ERRORS = 4
_LAST_TO_GO = "1000"


class WorkerError(Exception):
    """The request cannot be served; the text is for the user."""


def main() -> None:
    """Serve one request and end the process."""
    faulthandler.enable()
    _be_a_good_victim()
    channel = Channel()
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        fields = _serve(request, channel)
        channel.send("result", **fields, peak_rss_bytes=peak_rss(os.getpid()))
    except WorkerError as error:
        channel.send("error", message=str(error))
    except OSError as error:
        channel.send("error", message=f"a file cannot be read or written: {error}")
    except Exception as error:  # noqa: BLE001 - TensorRT, CUDA and Polygraphy raise what they like; the parent shows it
        channel.send("error", message=f"{type(error).__name__}: {error}")
    sys.stderr.flush()
    # The destructors of native code have nothing left to do that matters, and could only crash.
    os._exit(0)


def _serve(request: dict[str, Any], channel: Channel) -> dict[str, Any]:
    trt = importlib.import_module(request["package"])
    if request["kind"] == "build":
        return build(trt, request, channel)
    if request["kind"] == "run":
        return run(trt, request, channel)
    from depthwire.runtime.deploy.latency import measure

    return measure(trt, load_engine(trt, Path(request["engine"])), request)


def _be_a_good_victim() -> None:
    # If memory runs out all the same, the kernel takes this process, not the user's session.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_LAST_TO_GO, encoding="ascii")
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def build(trt: Any, request: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Build an engine.

    Args:
        trt: The builder's module.
        request: ``model``, ``engine`` (paths), ``plugins`` (path or ``None``), ``cache`` (path), and the fields of
            ``manifest.BuilderOptions``.
        channel: For phases.

    Returns:
        Layers and dtypes of the network, and what became of the timing cache.
    """
    log = make_logger(trt)
    plugins = None
    if request["plugins"] is not None:
        channel.send("phase", name="registering plugins")
        plugins = _import_file("depthwire_plugins", Path(request["plugins"]))
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt) if plugins is None else plugins.network_flags())
    parser = trt.OnnxParser(network, log)
    channel.send("phase", name="parsing the graph")
    if not parser.parse_from_file(request["model"]):
        errors = [_parser_error(parser.get_error(index), log.node) for index in range(parser.num_errors)]
        raise WorkerError("the parser refuses the graph: " + "; ".join(errors[:_SHOWN_ERRORS]))
    if plugins is not None:
        plugins.check(network)
    config = builder.create_builder_config()
    _configure(trt, config, request)
    cache = _load_cache(config, Path(request["cache"]))
    layers, dtypes = _census(network)
    channel.send("phase", name="building")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise WorkerError("the builder refuses the graph: " + ("; ".join(log.errors[:_SHOWN_ERRORS]) or "no message"))
    channel.send("phase", name="writing the engine")
    _write(Path(request["engine"]), memoryview(engine))
    return {"layers": layers, "dtypes": dtypes, "timing_cache": cache | _save_cache(config, Path(request["cache"]))}


def _network_flags(trt: Any) -> int:
    # TensorRT 10 must be told that the graph's dtypes count; 11 knows nothing else, and may no longer name it.
    known = trt.NetworkDefinitionCreationFlag.__members__
    return 1 << int(known["STRONGLY_TYPED"]) if "STRONGLY_TYPED" in known else 0


def _configure(trt: Any, config: Any, request: dict[str, Any]) -> None:
    if request["workspace_bytes"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    if request["optimization_level"] is not None:
        config.builder_optimization_level = request["optimization_level"]
    if not request["tf32"] and "TF32" in trt.BuilderFlag.__members__:
        config.clear_flag(trt.BuilderFlag.TF32)
    if request["compute_capabilities"]:
        config.num_compute_capabilities = len(request["compute_capabilities"])
        for index, name in enumerate(request["compute_capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def _load_cache(config: Any, path: Path) -> dict[str, Any]:
    stored = path.read_bytes() if path.is_file() else b""
    accepted = config.set_timing_cache(config.create_timing_cache(stored), ignore_mismatch=False)
    if not accepted and stored:
        # Of another TensorRT or GPU: measured times do not carry over.
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return {"loaded_bytes": len(stored) if accepted else 0}


def _save_cache(config: Any, path: Path) -> dict[str, Any]:
    cache = config.get_timing_cache()
    if cache is None:
        return {"bytes": 0}
    data = bytes(cache.serialize())
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    _write(temporary, memoryview(data))
    temporary.replace(path)
    return {"bytes": len(data)}


def _write(path: Path, data: memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _parser_error(error: Any, last_node: str) -> str:
    # Importers that fail after the static checks name no node; the log then says which one was being parsed.
    where = f"{error.node_name()} [{error.node_operator()}]" if error.node_name() else f"at or after {last_node}"
    calls: list[str] = getattr(error, "local_function_stack", list)()
    return f"{' in '.join([where, *calls])}: {error.desc()}"


def _census(network: Any) -> tuple[dict[str, int], dict[str, int]]:
    layers: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        layers[layer.type.name] += 1
        dtypes.update(layer.get_output(output).dtype.name for output in range(layer.num_outputs))
    return dict(layers.most_common()), dict(dtypes.most_common())


def run(trt: Any, request: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Run an engine on the inputs of every window through Polygraphy and write what it returns.

    Args:
        trt: The runtime's module.
        request: ``engine``, ``goldens``, ``out`` (paths), ``inputs`` and ``outputs`` (names), ``windows``.
        channel: For phases.
    """
    import numpy as np
    from polygraphy.backend.trt import TrtRunner

    feeds = {name: np.load(Path(request["goldens"]) / f"input.{name}.npy", mmap_mode="r") for name in request["inputs"]}
    channel.send("phase", name="loading the engine")
    engine = load_engine(trt, Path(request["engine"]))
    with TrtRunner(engine) as runner:
        for window in range(request["windows"]):
            channel.send("phase", name=f"window {window + 1} of {request['windows']}")
            feed = {name: np.ascontiguousarray(array[window]) for name, array in feeds.items()}
            outputs = runner.infer(feed_dict=feed)
            missing = set(request["outputs"]) - set(outputs)
            if missing:
                raise WorkerError(f"the engine lacks outputs: {', '.join(sorted(missing))}")
            for name in request["outputs"]:
                np.save(Path(request["out"]) / f"{window}.{name}.npy", np.asarray(outputs[name]))
        device_bytes = int(getattr(engine, "device_memory_size_v2", 0))
    return {"windows": request["windows"], "activation_bytes": device_bytes}


def load_engine(trt: Any, path: Path) -> Any:
    """Deserialise an engine.

    Raises:
        WorkerError: It is of another version or GPU, or there is no memory for it.
    """
    log = make_logger(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise WorkerError("the engine cannot be loaded: " + ("; ".join(log.errors[:_SHOWN_ERRORS]) or "no message"))
    return engine


def _import_file(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise WorkerError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
