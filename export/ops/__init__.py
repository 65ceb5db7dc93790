"""ONNX side of the custom operators: schema, translation and function body.

``OPERATORS`` is the table that ``to_onnx`` walks; adding an operator means adding a file and a row.
"""

from __future__ import annotations

import itertools

from depthwire.export.ops._base import DOMAIN, OnnxOperator
from depthwire.export.ops._depth_body import ReadForm
from depthwire.export.ops.attn_res_read import InterOnnx, ReadOnnx
from depthwire.export.ops.move_tokens import GatherOnnx, ScatterOnnx
from depthwire.export.ops.select_tokens import SelectOnnx
from depthwire.export.ops.surprise_score import SurpriseOnnx

OPERATORS: tuple[OnnxOperator, ...] = (
    *(
        ReadOnnx(ReadForm(0, add=add, merge=merge, norm=norm))
        for merge, add, norm in itertools.product((False, True), repeat=3)
    ),
    InterOnnx(),
    SelectOnnx(budget=False),
    SelectOnnx(budget=True),
    GatherOnnx(),
    ScatterOnnx(),
    SurpriseOnnx(),
)

__all__ = ["DOMAIN", "OPERATORS", "OnnxOperator"]
