"""``aten::to.dtype`` -> ONNX ``Cast``: passes cast by the operator that models are captured with.

``torch.export`` would decompose it to ``_to_copy``, which the exporter's table knows; a second decomposition of the
whole program for the sake of one operator is what the direct translation avoids.
"""

from __future__ import annotations

from typing import Any


def to_dtype(
    self: Any,
    dtype: int,
    non_blocking: bool = False,  # noqa: ARG001, FBT001, FBT002 - the operator's own signature
    copy: bool = False,  # noqa: ARG001, FBT001, FBT002
    memory_format: Any = None,  # noqa: ARG001
) -> Any:
    """Emit the cast.

    Args:
        self: Any tensor.
        dtype: The exporter hands a dtype over as its ONNX number.
        non_blocking: Has no meaning in a graph.
        copy: Has no meaning in a graph.
        memory_format: Has no meaning in a graph.
    """
    from onnxscript import opset18 as op

    return op.Cast(self, to=int(dtype))
