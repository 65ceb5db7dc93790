"""fuse_rotary: rotary positions spelled out in elementary operations become one ``onnx.RotaryEmbedding`` node.

Before::  add(mul(x, cos), mul(cat(neg(x₂), x₁), sin))          After::  RotaryEmbedding(x, cos_half, sin_half)

Every layer rotates its queries and its keys, in eight operations each time, of which some copy. The ONNX operator
(opset 23) is one, in standard form, and torch brings the same operator. Halves and interleaved pairs, whole and partial
rotation, and heads before or behind the sequence are the same to the match, which follows the mathematics
(``analysis.rotary``); the tables keep half of their columns, because both features of a pair share an angle.
Refused: angles that differ within a pair or between heads, which the operator cannot say; arithmetic that changes dtype
on the way, and fp64, which the operator does not take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import aten, constants_of, is_call, value
from depthwire.passes.analysis.rotary import Rotary, find_rotaries

if TYPE_CHECKING:
    from depthwire.program import Program

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Fuse decomposed rotary embeddings."""

    name: ClassVar[str] = "fuse_rotary"
    adds_constants: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """Fuse every rotary embedding whose angles are known."""
        rotaries = find_rotaries(program.exported.graph, constants_of(program))
        verdicts = [(rotary, _match(rotary)) for rotary in rotaries]
        declines = tuple(verdict for _, verdict in verdicts if isinstance(verdict, Decline))
        matches = [(rotary, verdict) for rotary, verdict in verdicts if isinstance(verdict, int)]
        if not matches:
            return PassResult(program, 0, declines)
        rewriter = _Rewriter(GraphEditor(program, self.name))
        for rotary, sequence in matches:
            rewriter.rewrite(rotary, sequence)
        return PassResult(rewriter.edit.finish(), len(matches), declines)


def _match(rotary: Rotary) -> int | Decline:
    """Return the axis of the sequence: 2 behind the heads, 1 before them or without heads."""
    at = where(rotary.output)
    if not rotary.consistent:
        return Decline("fuse-rotary.pairs", at, "one angle and one scale for both features of a pair", "several")
    dtypes = {value(node).dtype for each in rotary.inside for node in (each, *each.all_input_nodes) if _is_tensor(node)}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        return Decline("fuse-rotary.dtype", at, "one of float32, float16 and bfloat16 throughout", found)
    shape, rank = list(value(rotary.source).shape), value(rotary.source).dim()
    table = [max(sizes) for sizes in zip(rotary.cos.shape[:-1], rotary.sin.shape[:-1], strict=True)]
    if rank == 3:
        return 1
    if rank == 4 and table[1] == 1:
        return 2
    if rank == 4 and table[2] == 1:
        return 1
    want = "[batch, heads, length, width] or [batch, length, heads, width] with one table for all heads"
    return Decline("fuse-rotary.layout", at, want, f"{shape} and a table {[*table, rotary.cos.shape[-1]]}")


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(value(node), torch.Tensor)


class _Rewriter:
    def __init__(self, edit: GraphEditor) -> None:
        self.edit = edit
        self._known: list[tuple[torch.Tensor, torch.fx.Node]] = []

    def rewrite(self, rotary: Rotary, sequence: int) -> None:
        """Put the operator in place; it takes ``[B, H, T, D]``, or ``[B, T, H·D]`` with the number of heads."""
        output, source = self.edit.copy_of(rotary.output), self.edit.copy_of(rotary.source)
        shape = [int(size) for size in value(source).shape]
        batch, length, width = shape[0], shape[sequence], shape[-1]
        tables = [
            self._table(table, sequence, (batch, length), value(source).dtype) for table in (rotary.cos, rotary.sin)
        ]
        options: dict[str, Any] = {"interleaved": True} if rotary.interleaved else {}
        rotated = 2 * rotary.cos.shape[-1]
        if rotated != width:
            options["rotary_embedding_dim"] = rotated
        if sequence == 1:
            options["num_heads"] = shape[2] if len(shape) == 4 else 1
        rows = source
        if sequence == 1 and len(shape) == 4:
            rows = self._reshaped(source, [batch, length, shape[2] * width], output)
        new = self.edit.call(_operator(), (rows, *tables), options, before=output, like=output)
        if sequence == 1 and len(shape) == 4:
            new = self._reshaped(new, shape, output)
        self.edit.replace(output, new, keep_name=True)

    def _reshaped(self, source: torch.fx.Node, shape: list[int], output: torch.fx.Node) -> torch.fx.Node:
        inner = source.args[0] if is_call(source, aten.reshape.default) else None
        if isinstance(inner, torch.fx.Node) and list(value(inner).shape) == shape:
            return inner
        return self.edit.call(aten.reshape.default, (source, shape), before=output, like=output)

    def _table(self, table: torch.Tensor, sequence: int, rows: tuple[int, int], dtype: torch.dtype) -> torch.fx.Node:
        """Return the constant ``[B, T, pairs]``; layers share it."""
        if table.dim() == 4:
            table = table.squeeze(3 - sequence)
        wanted = table.expand(*rows, table.shape[-1]).to(dtype).contiguous()
        for tensor, node in self._known:
            if torch.equal(tensor, wanted):
                return node
        node = self.edit.add_constant(self.edit.free_constant_name("rotary"), wanted)
        self._known.append((wanted, node))
        return node


def _operator() -> Any:
    from torch.onnx import ops  # noqa: F401 - registers torch's own ONNX operators

    return torch.ops.onnx.RotaryEmbedding.opset23
