"""Finds RMSNorm and LayerNorm, native or spelled out, by their arithmetic.

::

    RMSNorm    x · rsqrt(mean(x²) + eps) [· weight]
    LayerNorm  (x - mean(x)) · rsqrt(mean((x - mean(x))²) + eps) [· weight] [+ bias]

Both are invariant to the scale of x up to eps: norm_eps(x/n) = norm_{n²·eps}(x), which is what lets a mean of sources
stand in for their sum. Spellings understood: ``pow(x, 2)``, ``x·x`` or ``square``; ``var`` or a mean of squares;
``rsqrt``, ``1/sqrt``, ``pow(·, -0.5)`` or division by ``sqrt``; casts to fp32 on the way; a weight used as ``w`` or
``1 + w``, multiplied from either side.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from depthwire.passes._match import (
    TRANSPARENT,
    argument,
    aten,
    commuted,
    independent_of_inputs,
    is_call,
    last_axis,
    readers,
    same_shape,
    scalar,
    strip,
    value,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Kind = Literal["rms", "layer"]


@dataclass(frozen=True)
class Norm:
    """One norm over the last axis.

    Attributes:
        kind: ``rms`` or ``layer``.
        source: What is normalised ``[..., d]``, before any cast.
        output: The last node of the norm ``[..., d]``.
        weight: Gain ``[d]``, or ``None``.
        bias: Offset ``[d]``, or ``None``.
        eps: Added to the mean square (or variance).
        eps_site: Node and argument index that hold eps.
        native: Whether it is one operator.
        nodes: Every node that belongs to it; nodes that compute the weight (``1 + w``) do not. None but the output
            and the casts of the source is read from outside.
    """

    kind: Kind
    source: torch.fx.Node
    output: torch.fx.Node
    weight: torch.fx.Node | None
    bias: torch.fx.Node | None
    eps: float
    eps_site: tuple[torch.fx.Node, int]
    native: bool
    nodes: frozenset[torch.fx.Node]


def find_norms(exported: ExportedProgram) -> list[Norm]:
    """Return every norm over the last axis, in graph order of the anchor."""
    free = independent_of_inputs(exported)
    found = []
    for node in exported.graph.nodes:
        norm = _native(node) or _decomposed(node, free)
        if norm is not None:
            found.append(norm)
    return found


_RMS = (aten.rms_norm.default, aten._fused_rms_norm.default)
_LAYER = (aten.layer_norm.default, aten.native_layer_norm.default)
_WITH_STATISTICS = (aten._fused_rms_norm.default, aten.native_layer_norm.default)


def _native(node: torch.fx.Node) -> Norm | None:
    if is_call(node, *_RMS):
        weight, bias, eps, site = argument(node, 2, "weight"), None, argument(node, 3, "eps"), 3
        kind: Kind = "rms"
    elif is_call(node, *_LAYER):
        weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
        eps, site, kind = argument(node, 4, "eps", 1e-5), 4, "layer"
    else:
        return None
    wide: Any = node.args[0]
    output = _first_result(node) if is_call(node, *_WITH_STATISTICS) else node
    if output is None or len(argument(node, 1, "normalized_shape")) != 1:
        return None
    if eps is None:  # torch then takes the machine epsilon of the dtype it computes in
        double = value(wide).dtype == torch.float64
        eps = torch.finfo(torch.float64 if double else torch.float32).eps
    source = strip(wide)
    nodes = frozenset((node, output, *_casts(wide, source)))
    return Norm(kind, source, output, weight, bias, float(eps), (node, site), native=True, nodes=nodes)


def _first_result(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return the normalised value of an operator that returns its statistics too, unless these are read."""
    results = readers(node)
    if len(results) != 1 or not is_call(results[0], operator.getitem) or results[0].args[1] != 0:
        return None
    return results[0]


def _decomposed(node: torch.fx.Node, free: set[torch.fx.Node]) -> Norm | None:
    """Match from the (inverse) square root outwards: down to the source, up to the affine part."""
    inverse = _is_inverse_root(node)
    if not inverse and not is_call(node, aten.sqrt.default):
        return None
    shifted: Any = node.args[0]
    eps = scalar(shifted.args[1]) if is_call(shifted, aten.add.Tensor, aten.add.Scalar) else None
    statistic = None if eps is None or shifted.kwargs else _statistic(shifted.args[0])
    if eps is None or statistic is None:
        return None
    kind, wide, nodes = statistic
    source = strip(wide)
    scaled = _scaled(node, kind, source, inverse=inverse)
    if scaled is None:
        return None
    top, between = scaled
    nodes |= {node, shifted, top, *between, *_casts(wide, source)}
    output, weight, bias = _affine(top, value(source).dtype, free, nodes)
    if _leaks(nodes, output, source):
        return None
    return Norm(kind, source, output, weight, bias, eps, (shifted, 1), native=False, nodes=frozenset(nodes))


def _is_inverse_root(node: torch.fx.Node) -> bool:
    if is_call(node, aten.rsqrt.default):
        return True
    return is_call(node, aten.pow.Tensor_Scalar) and scalar(node.args[1]) == -0.5


_Statistic = tuple[Kind, torch.fx.Node, set[torch.fx.Node]]


def _statistic(moment: Any) -> _Statistic | None:
    """Match mean(x²) or var(x): kind, widened source, and the nodes."""
    if is_call(moment, aten.var.correction, aten.var.dim):
        return _variance(moment)
    if (
        not is_call(moment, aten.mean.dim)
        or not last_axis(moment, moment.args[1])
        or not argument(moment, 2, "keepdim")
    ):
        return None
    square: Any = moment.args[0]
    base = _squared(square)
    if base is None:
        return None
    mean = _centring_mean(base)
    if mean is None:
        return "rms", base, {moment, square}
    wide: Any = base.args[0]
    return "layer", wide, {moment, square, base, mean}


def _variance(moment: torch.fx.Node) -> _Statistic | None:
    wide: Any = moment.args[0]
    if is_call(moment, aten.var.dim):
        unbiased, keepdim = argument(moment, 2, "unbiased", default=True), argument(moment, 3, "keepdim")
    else:
        unbiased, keepdim = moment.kwargs.get("correction") != 0, moment.kwargs.get("keepdim")
    if unbiased or not keepdim or not last_axis(moment, argument(moment, 1, "dim")):
        return None
    return "layer", wide, {moment}


def _centring_mean(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return the mean that ``node = x - mean(x)`` subtracts, or ``None`` if it is no such subtraction."""
    if not is_call(node, aten.sub.Tensor) or node.kwargs:
        return None
    wide, mean = node.args[0], node.args[1]
    if not isinstance(mean, torch.fx.Node) or not is_call(mean, aten.mean.dim) or mean.args[0] is not wide:
        return None
    return mean if last_axis(mean, mean.args[1]) and argument(mean, 2, "keepdim") else None


def _squared(node: Any) -> torch.fx.Node | None:
    power = is_call(node, aten.pow.Tensor_Scalar) and scalar(node.args[1]) == 2.0
    product = is_call(node, aten.mul.Tensor) and node.args[0] is node.args[1]
    base = node.args[0] if power or product or is_call(node, aten.square.default) else None
    return base if isinstance(base, torch.fx.Node) else None


_Scaled = tuple[torch.fx.Node, set[torch.fx.Node]]


def _scaled(root: torch.fx.Node, kind: Kind, source: torch.fx.Node, *, inverse: bool) -> _Scaled | None:
    """Find the product (or quotient) of the source, centred for LayerNorm, and the root; casts may lie between."""
    for user in readers(root):
        target = aten.mul.Tensor if inverse else aten.div.Tensor
        if is_call(user, target):
            other = user.args[1] if user.args[0] is root else user.args[0]
            members = _numerator(other, kind, source) if inverse or user.args[1] is root else None
            if members is not None:
                return user, members
        flips = not inverse and is_call(user, aten.reciprocal.default)
        passes_on = is_call(user, *TRANSPARENT) or (is_call(user, aten.mul.Tensor) and scalar(user.args[1]) == 1.0)
        if flips or passes_on:
            found = _scaled(user, kind, source, inverse=inverse or flips)
            if found is not None:
                return found[0], {user, *found[1]}
    return None


def _numerator(node: Any, kind: Kind, source: torch.fx.Node) -> set[torch.fx.Node] | None:
    """Return the nodes between the source and what is divided by its root mean square, or ``None``."""
    if not isinstance(node, torch.fx.Node):
        return None
    if kind == "rms":
        return _casts(node, source) if strip(node) is source else None
    centred = strip(node)
    mean = _centring_mean(centred)
    wide: Any = centred.args[0] if centred.args else None
    if mean is None or strip(wide) is not source:
        return None
    return {centred, mean, *_casts(node, centred), *_casts(wide, source)}


def _casts(node: torch.fx.Node, source: torch.fx.Node) -> set[torch.fx.Node]:
    """Return the casts that lie between a value and its source, the source excluded."""
    nodes: set[torch.fx.Node] = set()
    while node is not source:
        nodes.add(node)
        node = node.args[0]  # type: ignore[assignment]
    return nodes


def _affine(
    top: torch.fx.Node, dtype: torch.dtype, free: set[torch.fx.Node], nodes: set[torch.fx.Node]
) -> tuple[torch.fx.Node, torch.fx.Node | None, torch.fx.Node | None]:
    """Follow single readers upwards through casts, one gain and one offset; adds what it passes to ``nodes``."""
    weight = bias = None
    pending: list[torch.fx.Node] = []  # casts, which count if something of the norm follows them
    output = current = top
    while len(readers(current)) == 1:
        user = readers(current)[0]
        if is_call(user, *TRANSPARENT):
            pending.append(user)
            current = user
            continue
        operand = _free_operand(user, current, free)
        if operand is None:
            break
        if is_call(user, aten.mul.Tensor) and weight is None and bias is None:
            weight = operand
        elif is_call(user, aten.add.Tensor) and bias is None and not user.kwargs:
            bias = operand
        else:
            break
        nodes |= {*pending, user}
        pending.clear()
        output = current = user
    if pending and value(output).dtype != dtype == value(pending[-1]).dtype:
        # A trailing cast back to the source's dtype is part of the norm: it undoes the widening.
        nodes |= set(pending)
        output = pending[-1]
    return output, weight, bias


def _free_operand(user: torch.fx.Node, current: torch.fx.Node, free: set[torch.fx.Node]) -> torch.fx.Node | None:
    if not is_call(user, aten.mul.Tensor, aten.add.Tensor) or not same_shape(user, current):
        return None
    for mine, other in commuted(user):
        if mine is current and isinstance(other, torch.fx.Node) and other in free and value(other).dim() == 1:
            return other
    return None


def _leaks(nodes: set[torch.fx.Node], output: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Tell whether something outside reads a value from within the norm, such as its root mean square."""
    inner = (node for node in nodes if node is not output and strip(node) is not source)
    return any(user not in nodes for node in inner for user in readers(node))
