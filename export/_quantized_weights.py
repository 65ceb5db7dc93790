"""ONNX IR passes for quantised weights: integers of four bits packed, weights stored the way ``MatMul`` reads them.

Before::  w = DequantizeLinear<axis, block_size>(Cast<to = INT4>(Q), S);  y = MatMul(x, Transpose<perm = [1, 0]>(w))
After::   w = DequantizeLinear<1 - axis, block_size>(Qᵀ, Sᵀ);             y = MatMul(x, w)

A transpose between ``DequantizeLinear`` and the product would hide the weight from the engines' kernels, or be computed
in every step. What is stored is a lazy view; bytes are made when the file is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from depthwire.errors import ExportError
from depthwire.export._transpose_weights import transposed

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Int4Tensor(ir.Tensor[Any]):
    """Integers of -8 … 7 that lie in memory as int8, possibly as a transposed view of another tensor."""

    def __init__(self, raw: Any, name: str | None = None) -> None:
        """Take an int8 torch tensor.

        Raises:
            ExportError: A value does not fit into four bits (``export.int4-range``).
        """
        low, high = (int(bound) for bound in raw.aminmax()) if raw.numel() else (0, 0)
        if low < -8 or high > 7:
            raise ExportError(
                "export.int4-range",
                "A weight does not fit into four bits",
                at=str(name),
                want="integers of -8 to 7",
                got=f"{low} to {high}",
                todo="Report this: the pass quantize_linear promised four bits.",
            )
        super().__init__(raw, dtype=ir.DataType.INT4, shape=ir.Shape(raw.shape), name=name)

    def numpy(self) -> NDArray[Any]:
        """Return an array of ``ml_dtypes.int4``."""
        array: NDArray[Any] = self.raw.numpy().astype(self.dtype.numpy())
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:  # noqa: FBT001 - numpy's
        """Return the array for numpy."""
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def tobytes(self) -> bytes:
        """Return two elements a byte, the first in the low half, as ONNX stores them."""
        return packed(np.ascontiguousarray(self.raw.numpy())).tobytes()

    def tofile(self, file: Any) -> None:
        """Write the bytes."""
        file.write(self.tobytes())

    def transposed(self) -> Int4Tensor:
        """Return a view with the two last axes exchanged."""
        return Int4Tensor(self.raw.transpose(-1, -2), self.name)


def packed(integers: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack int8 values of four bits two in a byte, the first in the low half; an odd last one stands alone."""
    flat: NDArray[np.uint8] = integers.reshape(-1).view(np.uint8) & np.uint8(0xF)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    low, high = flat[0::2], flat[1::2]
    both: NDArray[np.uint8] = np.bitwise_or(low, np.left_shift(high, np.uint8(4)))
    return both


class PackInt4(InPlacePass):
    """Turn ``Cast<to = INT4>`` of an int8 initializer into an INT4 initializer."""

    def call(self, model: ir.Model) -> PassResult:
        """Pack them all; reports whether anything changed."""
        graph = model.graph
        changed = False
        for node in list(graph):
            weight = node.inputs[0] if node.op_type == "Cast" and node.domain == "" else None
            if weight is None or node.attributes["to"].as_int() != ir.DataType.INT4:
                continue
            raw = getattr(weight.const_value, "raw", None)
            if raw is None:
                continue
            name = str(weight.name)
            alone = len(weight.uses()) == 1
            if alone:
                graph.initializers.pop(name)
            value = _initializer(graph, name if alone else f"{name}.packed", Int4Tensor(raw.detach(), name))
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)
            changed = True
        return PassResult(model, modified=changed)


class TransposeQuantized(InPlacePass):
    """Move a transpose of a dequantised initializer in front of ``DequantizeLinear``, into the stored bytes."""

    def call(self, model: ir.Model) -> PassResult:
        """Move them all; reports whether anything changed."""
        graph = model.graph
        changed = False
        for node in list(graph):
            dequantize = _dequantize_before(node)
            if dequantize is None:
                continue
            weight, scale = (value for value in dequantize.inputs if value is not None)
            dequantize.replace_input_with(0, _turned(graph, weight))
            rank = len(_shape(scale))
            if rank:
                axis = dequantize.attributes.get("axis")
                dequantize.attributes["axis"] = ir.AttrInt64("axis", 1 - (1 if axis is None else axis.as_int() % 2))
            if rank == 2:
                dequantize.replace_input_with(1, _turned(graph, scale))
            value = dequantize.outputs[0]
            value.shape = node.outputs[0].shape
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)
            changed = True
        return PassResult(model, modified=changed)


def _dequantize_before(node: ir.Node) -> ir.Node | None:
    """Return what makes the matrix that a node transposes, if it dequantises initializers that nothing else reads."""
    perm = node.attributes.get("perm") if node.op_type == "Transpose" and node.domain == "" else None
    if perm is None or list(perm.as_ints()) != [1, 0] or node.inputs[0] is None or node.outputs[0].is_graph_output():
        return None
    value, found = node.inputs[0], node.inputs[0].producer()
    if found is None or found.op_type != "DequantizeLinear" or found.domain != "" or len(value.uses()) != 1:
        return None
    given = [each for each in found.inputs if each is not None]
    alone = all(each.is_initializer() and len(each.uses()) == 1 for each in given)
    return found if len(given) == 2 and alone and not value.is_graph_output() else None


def _shape(value: ir.Value) -> tuple[int, ...]:
    return () if value.const_value is None else tuple(value.const_value.shape.numpy())


def _turned(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Replace an initializer by its transpose."""
    tensor = value.const_value
    turned = tensor.transposed() if isinstance(tensor, Int4Tensor) else transposed(tensor)
    graph.initializers.pop(str(value.name))
    return _initializer(graph, f"{value.name}.T", turned)


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
