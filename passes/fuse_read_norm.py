"""fuse_read_norm: the RMSNorm behind a read becomes part of it.

Before::  h = attn_res_read(query, sources, …)          After::  n = attn_res_read_norm(query, weight, sources, …, eps)
          n = rms_norm(h, [d], weight, eps)

The mixed value is then normalised where it lies instead of being stored, read, normalised and stored again. A norm
without a gain gets ones. Merges of the two-phase form alike. A reshape of the tokens between the two comes after both.

Declined: a read that something besides one RMSNorm looks at, a LayerNorm, a norm in another dtype than the read's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import argument, aten, is_call, readers, value
from depthwire.passes.analysis.depth_layout import RESHAPES
from depthwire.passes.analysis.reads import ReadForm, find_reads, read_arguments, read_call

if TYPE_CHECKING:
    from depthwire.program import Program


@dataclass(frozen=True)
class FuseReadNorm(Pass):
    """Fuse the norm behind each read into the read."""

    name: ClassVar[str] = "fuse_read_norm"
    adds_constants: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """Fuse every read with one RMSNorm behind it."""
        plain = [(node, form) for node, form in find_reads(program.exported.graph) if not form.norm and not form.add]
        verdicts = [(node, form, _match(node)) for node, form in plain]
        declines = tuple(verdict for _, _, verdict in verdicts if isinstance(verdict, Decline))
        matches = [(node, form, verdict) for node, form, verdict in verdicts if isinstance(verdict, _Norm)]
        if not matches:
            return PassResult(program, 0, declines)
        edit = GraphEditor(program, self.name)
        for node, form, norm in matches:
            _rewrite(edit.copy_of(node), form, norm, edit)
        return PassResult(edit.finish(), len(matches), declines)


@dataclass(frozen=True)
class _Norm:
    """The norm behind a read: its node, gain (``None``: ones) and eps."""

    node: torch.fx.Node
    weight: torch.fx.Node | None
    eps: float


def _match(read: torch.fx.Node) -> _Norm | Decline:
    users = readers(read)
    while len(users) == 1 and _regroups_tokens(users[0]):
        users = readers(users[0])
    norms = [user for user in users if is_call(user, aten.rms_norm.default)]
    if len(users) != 1 or not norms:
        names = ", ".join(sorted({str(user.target) for user in users})) or "nothing"
        return Decline("fuse-read-norm.reader", where(read), "one rms_norm behind the read", names)
    norm = norms[0]
    eps = argument(norm, 3, "eps")
    if eps is None:  # torch then takes the machine epsilon of the dtype it computes in
        eps = torch.finfo(torch.float64 if value(read).dtype == torch.float64 else torch.float32).eps
    return _Norm(norm, argument(norm, 2, "weight"), float(eps))


def _regroups_tokens(node: torch.fx.Node) -> bool:
    """Tell whether a node is a reshape that keeps the features."""
    return is_call(node, *RESHAPES) and value(node).shape[-1:] == value(node.args[0]).shape[-1:]  # type: ignore[arg-type]


def _rewrite(read: torch.fx.Node, form: ReadForm, norm: _Norm, edit: GraphEditor) -> None:
    node = edit.copy_of(norm.node)
    if norm.weight is None:
        width = int(value(read).shape[-1])
        weight = edit.add_constant(edit.free_constant_name("ones"), torch.ones(width, dtype=value(read).dtype))
    else:
        weight = edit.copy_of(norm.weight)
    arguments = {**read_arguments(read), "norm_weight": weight, "norm_eps": norm.eps}
    target, args = read_call(ReadForm(merge=form.merge, norm=True), arguments)
    fused = edit.call(target, args, before=node, like=node)
    shape = value(fused).shape
    if shape == value(node).shape:
        edit.replace(node, fused, keep_name=True)
        return
    for user in list(node.users):
        if is_call(user, *RESHAPES) and value(user).shape == shape:
            edit.replace(user, fused)
    flat = edit.call(aten.reshape.default, (fused, list(value(node).shape)), before=node, like=node)
    edit.replace(node, flat, keep_name=True)
