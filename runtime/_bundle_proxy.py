"""Parses a bundle's graph with TensorRT-RTX, where it is installed, as a stand-in for the target's TensorRT."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import depthwire
from depthwire.runtime.deploy.manifest import Proxy

LABEL = "proxy: parsed by TensorRT-RTX, not by the target's TensorRT"
_MODULE = "tensorrt_rtx"
_SECONDS = 600.0
# A parser that meets a graph it does not expect can end its process, so it has one of its own.
_PROGRAM = """
import json, os, sys
import tensorrt_rtx as trt
said = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
log = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(log)
network = builder.create_network(0)
parser = trt.OnnxParser(network, log)
passed = bool(parser.parse_from_file(sys.argv[1]))
errors = [parser.get_error(i) for i in range(parser.num_errors)]
detail = "; ".join(f"{e.node_name()} [{e.node_operator()}]: {e.desc()}" for e in errors[:4])
said.write(json.dumps([trt.__version__, passed, detail or f"{network.num_layers} layers"]))
said.flush()
os._exit(0)
"""


def parse_as_proxy(model: Path, name: str) -> Proxy:
    """Parse a graph.

    Args:
        model: The ONNX file, its weights beside it.
        name: Its name in the bundle.

    Returns:
        What was found; that nothing was tried, where TensorRT-RTX is not installed.
    """
    if importlib.util.find_spec(_MODULE) is None:
        return Proxy(name, LABEL, None, None, "not run: TensorRT-RTX is not installed")
    done = subprocess.run(  # noqa: S603 - our own text, run by the running interpreter
        [sys.executable, "-c", _PROGRAM, str(model.resolve())],
        capture_output=True,
        timeout=_SECONDS,
        check=False,
        cwd=Path(depthwire.__file__).resolve().parent.parent,
    )
    try:
        version, passed, detail = json.loads(done.stdout)
    except ValueError:
        tail = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return Proxy(name, LABEL, None, passed=False, detail=f"exit status {done.returncode}; {' '.join(tail)}")
    return Proxy(name, LABEL, version, passed, detail)
