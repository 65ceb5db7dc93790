"""A cast that a pass wrote goes to ONNX as it stands."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from depthwire.export.to_onnx import to_onnx
from depthwire.passes._edit import GraphEditor
from depthwire.program import Program, Source

aten = torch.ops.aten


class Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.bool])
def test_a_cast_of_a_pass_becomes_cast(dtype: torch.dtype) -> None:
    example = torch.tensor([[-1.5, 0.0, 0.25, 3.0]])
    program = Program(torch.export.export(Tanh(), (example,)), Source("module", "Tanh"), {"x": example}, ("y",))
    edit = GraphEditor(program, "test")
    tanh = next(node for node in edit.graph.nodes if node.op == "call_function")
    output = next(iter(reversed(edit.graph.nodes)))
    cast = edit.call(aten.to.dtype, (tanh, dtype), before=output, like=tanh)
    edit.reroute(output, tanh, cast)
    model = to_onnx(edit.finish())
    assert [node.op_type for node in model.graph] == ["Tanh", "Cast"]
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    (found,) = session.run(None, {"x": example.numpy()})
    wanted = torch.tanh(example).to(dtype).numpy()
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found.astype(np.float64), wanted.astype(np.float64), rtol=1e-3, atol=0)
