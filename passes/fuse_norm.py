"""fuse_norm: a norm spelled out in elementary operations becomes one ``rms_norm`` or ``layer_norm`` node.

Before::  pow(x, 2) → mean(-1) → add(eps) → rsqrt → mul(x, ·) → mul(weight, ·)        After::  rms_norm(x, weight, eps)

One node per norm is what the ONNX operator (``RMSNormalization``, opset 23) and every back end's kernel want, and a
third of the nodes of a decoder are norms. Refused where the arithmetic changes dtype on the way (a bf16 model that
computes its norm in fp32 and rounds before the weight): fusing would move a rounding step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import aten, value
from depthwire.passes.analysis.norm import Norm, find_norms

if TYPE_CHECKING:
    from depthwire.program import Program


@dataclass(frozen=True)
class FuseNorm(Pass):
    """Fuse decomposed norms."""

    name: ClassVar[str] = "fuse_norm"

    def run(self, program: Program) -> PassResult:
        """Fuse every decomposed norm whose arithmetic stays in one dtype."""
        norms = [norm for norm in find_norms(program.exported) if not norm.native]
        verdicts = [(norm, _match(norm)) for norm in norms]
        declines = tuple(verdict for _, verdict in verdicts if isinstance(verdict, Decline))
        fusable = [norm for norm, verdict in verdicts if verdict is None]
        if not fusable:
            return PassResult(program, 0, declines)
        edit = GraphEditor(program, self.name)
        for norm in fusable:
            _rewrite(norm, edit)
        return PassResult(edit.finish(), len(fusable), declines)


def _match(norm: Norm) -> Decline | None:
    affine = [node for node in (norm.weight, norm.bias) if node is not None]
    dtypes = {value(node).dtype for node in (*norm.nodes, *affine, norm.source)}
    if len(dtypes) > 1:
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        return Decline("fuse-norm.mixed-dtype", where(norm.output), "one dtype throughout", found)
    for node in affine:
        if value(node).shape != value(norm.source).shape[-1:]:
            return Decline("fuse-norm.affine-shape", where(norm.output), "[d]", str(list(value(node).shape)))
    return None


def _rewrite(norm: Norm, edit: GraphEditor) -> None:
    output, source = edit.copy_of(norm.output), edit.copy_of(norm.source)
    shape = [int(value(source).shape[-1])]
    weight = None if norm.weight is None else edit.copy_of(norm.weight)
    bias = None if norm.bias is None else edit.copy_of(norm.bias)
    if norm.kind == "rms" and bias is None:
        target, args = aten.rms_norm.default, (source, shape, weight, norm.eps)
    elif norm.kind == "layer":
        target, args = aten.layer_norm.default, (source, shape, weight, bias, norm.eps)  # type: ignore[assignment]
    else:
        normed = edit.call(aten.rms_norm.default, (source, shape, weight, norm.eps), before=output, like=output)
        target, args = aten.add.Tensor, (normed, bias)  # type: ignore[assignment]
    fused = edit.call(target, args, before=output, like=output)
    if value(fused).shape != value(output).shape or not isinstance(value(fused), torch.Tensor):
        raise AssertionError(norm.output.name)
    edit.replace(output, fused, keep_name=True)
