"""ONNX side of the custom operators: one file an operator with its schema, translation and function body.

``OPERATORS`` is the table that ``to_onnx`` walks; adding an operator means adding a file and a row.
"""

from __future__ import annotations

from depthwire.export.ops._base import DOMAIN, OnnxOperator
from depthwire.export.ops.attn_res_read import AttnResReadOnnx

OPERATORS: tuple[OnnxOperator, ...] = (AttnResReadOnnx(),)

__all__ = ["DOMAIN", "OPERATORS", "OnnxOperator"]
