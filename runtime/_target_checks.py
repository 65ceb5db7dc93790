"""What a target refuses: a precision, a form of the custom operators, a selection, an engine that has no room."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthwire.errors import BuildError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from depthwire.runtime.target import Target

# Ahead-of-time plugins written in Python: `aot_impl` and the network flag PREFER_AOT_PYTHON_PLUGINS came with 10.9.
PLUGINS_SINCE = (10, 9)


def version_of(text: str) -> tuple[int, ...]:
    """Return a version such as ``10.13.2`` as numbers, to be compared."""
    return tuple(int(part) for part in text.split("."))


def require_precision(target: Target, precision: str, capabilities: Sequence[str] = ()) -> None:
    """Refuse a precision that an engine for a target cannot have.

    Args:
        target: The target.
        precision: A value of ``--precision``.
        capabilities: Compute capabilities that are compiled for; those that have fewer precisions are checked too.

    Raises:
        UsageError: ``target.precision-unsupported``.
    """
    limits = {"": target.precisions}
    limits |= {f" for {name}": kinds for name, kinds in target.precision_limits.items() if name in capabilities}
    for where, kinds in limits.items():
        if precision not in kinds:
            raise UsageError(
                "target.precision-unsupported",
                f"Target {target.name}{where} does not run this precision",
                at=f"--precision {precision}, target {target.name}",
                want=f"one of {', '.join(kinds)}",
                got=precision,
                todo="Choose one of these, or another target: 'depthwire targets' lists the precisions of each.",
            )


def require_form(target: Target, form: str) -> None:
    """Refuse a form of the custom operators that a target's builder does not take.

    Args:
        target: The target, under the JetPack that is meant.
        form: ``function`` or ``plugin``.

    Raises:
        BuildError: ``target.plugin-unsupported``.
    """
    if form == "function" or target.custom_ops == "plugin":
        return
    since = ".".join(map(str, PLUGINS_SINCE))
    todo = "Use the form 'function'."
    if target.builder == "tensorrt-rtx":
        got, why = f"TensorRT-RTX {target.tensorrt}", "TensorRT-RTX takes no plugins"
    elif target.builder == "tensorrt":
        got = f"TensorRT {target.tensorrt}"
        why = f"{got} takes no plugins that were compiled ahead of time"
        newer = [name for name, variant in target.variants.items() if variant.custom_ops == "plugin"]
        todo = f"Use the form 'function', or --jetpack {newer[0]}." if newer else todo
    else:
        got, why = "ONNX Runtime", "ONNX Runtime takes no TensorRT plugins"
        todo = "Run model.onnx itself."
    raise BuildError(
        "target.plugin-unsupported",
        why,
        at=f"target {target.name}" + (f", JetPack {target.jetpack}" if target.jetpack else ""),
        want=f"TensorRT {since} or newer",
        got=got,
        todo=todo,
    )
