"""An ONNX IR pass: store a linear layer's weight the way ``MatMul`` reads it.

Before::  t = Transpose<perm = [1, 0]>(weight);  y = MatMul(x, t)      After::  y = MatMul(x, weight.T)

``Linear`` keeps ``[out, in]``, ``MatMul`` reads ``[in, out]``; experts' weights have an axis of experts before these.
Left in the graph, every session would transpose every weight when it loads. The transposed tensor is a lazy view:
nothing is copied until the file is written. A weight that something else reads too (a tied embedding) keeps its one
copy and its ``Transpose``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

if TYPE_CHECKING:
    import torch


class TransposeWeights(InPlacePass):
    """Fold ``Transpose`` of an initializer that nothing else reads."""

    def call(self, model: ir.Model) -> PassResult:
        """Fold them all; reports whether anything changed."""
        graph = model.graph
        changed = False
        for node in list(graph):
            weight = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
            if weight is None or not _foldable(node, weight, graph):
                continue
            tensor = transposed(weight.const_value)
            name = f"{weight.name}.T"
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            graph.register_initializer(value)
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)
            graph.initializers.pop(str(weight.name))
            changed = True
        return PassResult(model, modified=changed)


def _foldable(node: ir.Node, weight: ir.Value, graph: ir.Graph) -> bool:
    perm = node.attributes.get("perm")
    if perm is None or weight.const_value is None:
        return False
    order = list(perm.as_ints())
    if len(order) < 2 or order != [*range(len(order) - 2), len(order) - 1, len(order) - 2]:
        return False
    alone = len(weight.uses()) == 1 and weight.name in graph.initializers
    return alone and not weight.is_graph_output() and not node.outputs[0].is_graph_output()


def transposed(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol:
    """Return a tensor with its two last axes exchanged: of a torch tensor a view, which shares its memory."""
    raw: torch.Tensor | None = getattr(tensor, "raw", None)
    if raw is not None and hasattr(raw, "untyped_storage"):
        from torch.onnx._internal.exporter._core import TorchTensor

        return TorchTensor(raw.transpose(-1, -2))
    if tensor is None:
        raise ValueError("an initializer without a value")
    return ir.Tensor(tensor.numpy().swapaxes(-1, -2))
