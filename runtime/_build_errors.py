"""The ways a child process's build can fail, as errors: one function for each way it can end.

Error codes: ``build.crashed``, ``build.backend-missing``, ``build.parse-failed``, ``build.dtype-mismatch``,
``build.refused``, ``build.turing-float32``, ``build.strip-needs-gpu``, ``build.write-failed``.
"""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Any

from depthwire.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from depthwire.runtime._build_process import BuildRequest

PIP_LINE = "pip install 'depthwire[rtx]'"
_TAIL_LINES = 6
_SHOWN_TENSORS = 4
# What it says of float32 and of bfloat16 products for SM75.
_TURING = ("FP32 GEMM is not supported", "Cannot compile for target(s) sm75")
# What the builder's compiler of refittable kernels says where it finds no driver.
_NO_DRIVER = "CHECK(status == CUDA_SUCCESS) failed"
# What the log says on every build or in every crash, of no use in an error message.
_LOG_NOISE = ("[INFO]", "Extension modules:", "Thread 0x", "Current thread 0x", "  File ", "  <no Python frame>")


def crashed(status: int, *, at: str, log: Path, kept_log: Path) -> BuildError:
    """Return the error for a child that ended without a last message.

    Args:
        status: Its exit status; minus the signal's number where a signal ended it.
        at: What it was doing.
        log: Its log, of which the end is quoted.
        kept_log: Where that log will lie afterwards.
    """
    how = f"exit status {status}"
    if status < 0:
        with contextlib.suppress(ValueError):
            how = f"signal {signal.Signals(-status).name} ({-status})"
    todo = (
        "On Linux a SIGKILL is most often the out-of-memory killer: free memory, or build on a larger machine."
        if how.startswith("signal SIGKILL")
        else f"Read {kept_log}; if the model builds elsewhere, report it with that file."
    )
    return BuildError(
        "build.crashed",
        f"The engine builder's process ended with {how}",
        at=at,
        want="an engine, or an error message",
        got=f"{how}; the log ends: {_tail(log)}",
        todo=todo,
    )


def refused(final: Mapping[str, Any], request: BuildRequest, *, log: Path) -> BuildError:
    """Return the error for the child's last message of event ``error``.

    Args:
        final: That message.
        request: What it was asked to build.
        log: Where the child's log will lie afterwards.
    """
    model, kind = request.source or request.model, final["kind"]
    if kind in {"missing", "write"}:
        return _not_ours(final, request.engine)
    if kind == "dtypes":
        return _dtype_mismatch(final, model)
    if kind == "parse":
        return BuildError(
            "build.parse-failed",
            f"TensorRT-RTX {final['version']} cannot read the ONNX graph",
            at="; ".join(error["node"] or "(the parser names no node)" for error in final["errors"]),
            want="operators and attributes that its parser supports",
            got="; ".join(dict.fromkeys(error["message"] for error in final["errors"])),
            todo=f"Convert again for this target (--target rtx); the parser's full log is {log}.",
        )
    errors = "; ".join(final["errors"]) or "no message"
    if request.strip_weights and _NO_DRIVER in errors:
        return BuildError(
            "build.strip-needs-gpu",
            "An engine without its weights can be built only where a GPU is",
            at=model,
            want="an NVIDIA GPU and its driver, which the builder compiles refittable kernels with",
            got=errors,
            todo="Build on the machine with the GPU, or leave --strip-weights out.",
        )
    if any(text in errors for text in _TURING):
        return turing_float32(model, errors)
    return BuildError(
        "build.refused",
        f"TensorRT-RTX {final['version']} cannot build an engine from this graph",
        at=model,
        want="an engine for the compute capabilities asked for",
        got=errors,
        todo=f"The builder's full log is {log}; 'depthwire targets' lists the limits of this target.",
    )


def _not_ours(final: Mapping[str, Any], engine: str) -> BuildError:
    if final["kind"] == "missing":
        return BuildError(
            "build.backend-missing",
            "TensorRT-RTX is not installed, or cannot be loaded",
            at="target rtx",
            want="an importable tensorrt_rtx",
            got=final["message"],
            todo=f"Install it: {PIP_LINE}",
        )
    return BuildError(
        "build.write-failed",
        "The engine was built but could not be written",
        at=engine,
        want="room and permission for the file",
        got=final["message"],
        todo="Free disk space or change the permissions, and build again.",
    )


def _dtype_mismatch(final: Mapping[str, Any], model: str) -> BuildError:
    wrong = [f"{each['name']} ({each['graph']} in the graph, {each['network']})" for each in final["wrong"]]
    more = f" and {len(wrong) - _SHOWN_TENSORS} more" if len(wrong) > _SHOWN_TENSORS else ""
    return BuildError(
        "build.dtype-mismatch",
        f"TensorRT-RTX {final['version']} would compute in other dtypes than the graph's",
        at=model,
        want=f"the dtypes of the graph in all of {final['checked']} tensors",
        got="; ".join(wrong[:_SHOWN_TENSORS]) + more,
        todo="Convert again with a --precision that the target takes; if it does, report this with the file.",
    )


def turing_float32(model: str, got: str) -> BuildError:
    """Return the error for a float32 matrix product on a Turing GPU, found by us or by the builder."""
    return BuildError(
        "build.turing-float32",
        "TensorRT-RTX multiplies matrices on Turing (SM75) in float16 alone",
        at=model,
        want="a float16 graph, or compute capabilities without SM75",
        got=got,
        todo="Leave SM75 out, or convert with --dtype fp16 into an artefact of its own for Turing.",
    )


def _tail(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(_LOG_NOISE)]
    return " | ".join(lines[-_TAIL_LINES:]) or "(nothing)"
