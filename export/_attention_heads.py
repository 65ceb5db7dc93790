"""An ONNX IR pass: let ``Attention`` split and merge the heads itself.

Before::  q = Transpose(Reshape(x, [B, T, H, D]));  Attention(q, k, v) → Transpose → Reshape
After::   Attention<q_num_heads, kv_num_heads>(x, k, v)         # [B, T, H·D] throughout

The operator takes its operands as ``[B, H, T, D]`` or as ``[B, T, H·D]``. Linear layers read and write the second, and
the first costs four transpositions a layer, with a copy each. A ``RotaryEmbedding`` between a transposition and the
attention takes both forms as well. Attention whose operands are not all transposed stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

_SWAP = [0, 2, 1, 3]


class AttentionHeads(InPlacePass):
    """Give ``Attention`` operands of three axes."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every attention whose transpositions that removes; reports whether anything changed."""
        rewriter = _Rewriter(model.graph)
        changed = [rewriter.rewrite(node) for node in list(model.graph) if _is(node, "Attention")]
        return PassResult(model, modified=any(changed))


@dataclass(frozen=True)
class _Operand:
    """``apart`` is ``[B, T, H, D]``; ``rotary`` the node that rotates its transposition, if one does."""

    apart: ir.Value
    rotary: ir.Node | None


class _Rewriter:
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._shapes: dict[tuple[int, ...], ir.Value] = {}

    def rewrite(self, node: ir.Node) -> bool:
        """Give one attention operands of three axes, if that removes every transposition around it."""
        operands = [_operand(value) for value in node.inputs[:3]]
        query, key, values = operands
        if query is None or key is None or values is None or len(node.inputs) > 4:
            return False
        if "q_num_heads" in node.attributes or any(value.uses() for value in node.outputs[1:]):
            return False
        old = node.outputs[0]
        swaps = [use.node for use in old.uses()]
        if old.is_graph_output() or not all(_is(swap, "Transpose") and _perm(swap) == _SWAP for swap in swaps):
            return False
        heads = [_sizes(operand.apart)[2] for operand in (query, key)]
        if _sizes(values.apart)[2] != heads[1]:
            return False
        rows = [self._rows(operand, node) for operand in (query, key, values)]
        batch, length, _, _ = _sizes(query.apart)
        width = _sizes(values.apart)[3]
        merged = ir.Value(name=f"{old.name}.rows", type=old.type, shape=ir.Shape([batch, length, heads[0] * width]))
        attributes = [
            *node.attributes.values(),
            ir.AttrInt64("q_num_heads", heads[0]),
            ir.AttrInt64("kv_num_heads", heads[1]),
        ]
        self._insert(ir.Node("", "Attention", [*rows, *node.inputs[3:]], attributes, outputs=[merged]), node, node)
        for swap in swaps:
            self._merge(swap, merged, [batch, length, heads[0], width])
        for done in (*swaps, node):
            self._graph.remove(done, safe=True)
        return True

    def _merge(self, swap: ir.Node, merged: ir.Value, shape: list[int]) -> None:
        """Let what reads ``[B, T, H, D]`` read the result: itself where its reader merges the heads, else a reshape."""
        apart = swap.outputs[0]
        for use in list(apart.uses()):
            result = use.node.outputs[0]
            if _is(use.node, "Reshape") and result.shape == merged.shape and not result.is_graph_output():
                merged.name = result.name
                ir.convenience.replace_all_uses_with(result, merged)
                self._graph.remove(use.node, safe=True)
        if apart.uses() or apart.is_graph_output():
            split = self._reshape(merged, shape, swap, name=str(apart.name))
            ir.convenience.replace_all_uses_with(apart, split, replace_graph_outputs=True)

    def _rows(self, operand: _Operand, node: ir.Node) -> ir.Value:
        """Return ``[B, T, H·D]`` of an operand, rotated where it was."""
        batch, length, heads, width = _sizes(operand.apart)
        source = operand.apart.producer()
        inner = source.inputs[0] if source is not None and _is(source, "Reshape") else None
        shape = [batch, length, heads * width]
        before = operand.rotary or node
        if inner is not None and inner.shape is not None and list(inner.shape) == shape:
            rows = inner
        else:
            rows = self._reshape(operand.apart, shape, before, name=f"{operand.apart.name}.rows")
        if operand.rotary is None:
            return rows
        old = operand.rotary.outputs[0]
        turned = ir.Value(name=f"{old.name}.rows", type=old.type, shape=ir.Shape(shape))
        attributes = [*operand.rotary.attributes.values(), ir.AttrInt64("num_heads", heads)]
        inputs = [rows, *operand.rotary.inputs[1:]]
        self._insert(ir.Node("", "RotaryEmbedding", inputs, attributes, outputs=[turned]), before, before)
        return turned

    def _reshape(self, value: ir.Value, shape: list[int], before: ir.Node, *, name: str) -> ir.Value:
        sizes = tuple(shape)
        if sizes not in self._shapes:
            tensor = ir.tensor(shape, dtype=ir.DataType.INT64, name="rows_" + "_".join(map(str, shape)))
            constant = ir.Value(
                name=tensor.name, shape=ir.Shape([len(shape)]), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(constant)
            self._shapes[sizes] = constant
        result = ir.Value(name=name, type=value.type, shape=ir.Shape(shape))
        self._insert(ir.Node("", "Reshape", [value, self._shapes[sizes]], outputs=[result]), before, before)
        return result

    def _insert(self, node: ir.Node, before: ir.Node, like: ir.Node) -> None:
        node.metadata_props.update(like.metadata_props)
        self._graph.insert_before(before, node)


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.op_type == op_type and node.domain == ""


def _perm(node: ir.Node) -> list[int]:
    perm = node.attributes.get("perm")
    return [] if perm is None else list(perm.as_ints())


def _operand(value: ir.Value | None) -> _Operand | None:
    """Return an operand that a transposition makes, rotated or not, of static shape."""
    node = None if value is None else value.producer()
    rotary = None
    if value is not None and node is not None and _is(node, "RotaryEmbedding"):
        if "num_heads" in node.attributes or len(value.uses()) > 1 or value.is_graph_output():
            return None
        rotary, node = node, None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or not _is(node, "Transpose") or _perm(node) != _SWAP or node.inputs[0] is None:
        return None
    apart = node.inputs[0]
    static = apart.shape is not None and all(isinstance(size, int) for size in apart.shape)
    return _Operand(apart, rotary) if static else None


def _sizes(value: ir.Value) -> list[int]:
    return [] if value.shape is None else [int(size) for size in value.shape]  # type: ignore[arg-type]
