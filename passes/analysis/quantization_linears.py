"""The linear layers of a program as quantisation sees them: which weights, read how, and which must stay as they are.

A weight is quantised if all that reads it are products of an activation with it, ``aten.linear``, ``mm``, ``addmm`` or
``matmul``, directly or through one transpose. Left alone are:

* what is no weight of a linear layer: AttnRes queries, norms, rotary tables, convolutions, experts behind one axis;
* tied embeddings and the output head, whose errors land in the logits undamped;
* routers: every linear layer whose result reaches the outputs through the scores that ``select_tokens`` or a top-k
  ranks and in no other way. So do the priors of a surprise. A rank is decided by the last digits of a score;
* what ``route_tokens`` brought in: routers and the priors that stand in for updates (``route.<layer>.<part>``).

The input of a linear layer is not quantised where it is a source of an AttnRes read: sources keep all their digits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.export.graph_signature import InputKind

from depthwire.passes._base import Decline, where
from depthwire.passes._match import TRANSPARENT, VIEWS, aten, is_call, value
from depthwire.passes.analysis.reach import ancestors
from depthwire.passes.analysis.reads import INTER, find_reads, read_arguments
from depthwire.passes.analysis.routing_ops import SELECT, SELECT_BUDGET, SURPRISE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from depthwire.program import Program

_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)
_PRODUCTS = (aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default)
_BATCHED = (aten.bmm.default, aten.baddbmm.default, aten.matmul.default, aten.einsum.default)
_MOVES = (*TRANSPARENT, *VIEWS, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor)
_RANKED = (SELECT, SELECT_BUDGET, aten.topk.default)
_PART = re.compile(r"route\.\d+\.")


@dataclass(frozen=True)
class Linear:
    """One product of an activation and a weight.

    Attributes:
        node: The product.
        weight: The placeholder of the weight.
        reader: What reads the placeholder: the product itself, or a transpose.
        input: The activation ``[..., K]``.
        axis: The axis of the weight that is summed over.
        source: Whether the activation is a source of an AttnRes read.
    """

    node: torch.fx.Node
    weight: torch.fx.Node
    reader: torch.fx.Node
    input: torch.fx.Node
    axis: int
    source: bool


@dataclass(frozen=True)
class Linears:
    """What can be quantised, by the name of the weight, and why the rest cannot."""

    found: dict[str, list[Linear]]
    kept: dict[str, Decline]


def find_linears(program: Program) -> Linears:
    """Return the linear layers of a program whose weights may be quantised.

    Args:
        program: A program behind the standard passes; of one that is quantised already only what is left is found.
    """
    graph = program.exported.graph
    specs = program.exported.graph_signature.input_specs
    weights = {s.arg.name: str(s.target) for s in specs if s.kind in (InputKind.PARAMETER, InputKind.BUFFER)}
    sources = _sources(graph)
    routers = _routers(graph)
    head = _heads(graph)
    found: dict[str, list[Linear]] = {}
    kept: dict[str, Decline] = {}
    for node in graph.nodes:
        name = weights.get(node.name)
        if node.op != "placeholder" or name is None:
            continue
        experts = _expert_products(node)
        if experts:
            kept[name] = Decline(
                "quantize-linear.experts", where(experts[0]), "a matrix", f"{name} {list(value(node).shape)}"
            )
        linears = [linear for user in node.users for linear in _linears_of(node, user, sources)]
        if not linears:
            continue
        others = [user for user in node.users if not any(linear.reader is user for linear in linears)]
        decline = _refusal(name, linears, others, routers, head)
        if decline is None:
            found[name] = linears
        else:
            kept[name] = decline
    return Linears(found, kept)


def _expert_products(weight: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the products with a weight that holds a matrix for every expert."""
    users = [each for user in weight.users for each in (user.users if is_call(user, *_TRANSPOSES) else [user])]
    return [user for user in users if is_call(user, *_BATCHED) and value(weight).dim() == 3]


def _linears_of(weight: torch.fx.Node, reader: torch.fx.Node, sources: set[torch.fx.Node]) -> list[Linear]:
    """Return the products that read a weight through one of its users."""
    tensor = value(weight)
    if tensor.dim() != 2 or tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        return []
    turned = is_call(reader, *_TRANSPOSES)
    operand, products = (reader, list(reader.users)) if turned else (weight, [reader])
    found = []
    for product in products:
        if not is_call(product, *_PRODUCTS):
            return []
        # addmm is (bias, input, weight); linear's weight is [out, in], the others' [in, out].
        place = 1 if is_call(product, aten.addmm.default) else 0
        activation = product.args[place]
        if product.args[place + 1] is not operand or activation is operand or not isinstance(activation, torch.fx.Node):
            return []
        axis = 1 if is_call(product, aten.linear.default) != turned else 0
        source = bool(sources & {activation, _moved_from(activation)})
        found.append(Linear(product, weight, reader, activation, axis, source))
    return found


def _refusal(
    name: str,
    linears: list[Linear],
    others: list[torch.fx.Node],
    routers: set[torch.fx.Node],
    heads: set[torch.fx.Node],
) -> Decline | None:
    at = where(linears[0].node)
    if others:
        read = ", ".join(sorted({str(user.target) for user in others}))
        return Decline(
            "quantize-linear.shared", at, "a weight that only products read", f"{name} is read by {read} too"
        )
    if len({linear.axis for linear in linears}) > 1:
        return Decline("quantize-linear.axis", at, "one axis to sum over", f"{name} is read by rows and by columns")
    if _PART.match(name) or any(linear.node in routers for linear in linears):
        return Decline(
            "quantize-linear.router", at, "a layer whose result is not ranked", f"{name} decides the routing"
        )
    if any(linear.node in heads for linear in linears):
        return Decline("quantize-linear.head", at, "a layer inside the model", f"{name} gives the logits")
    return None


def refuse_block(linear: Linear, block: int) -> Decline | None:
    """Return why a weight cannot be divided into blocks; ``None`` if it can, or need not."""
    tensor = linear.weight.meta["val"]
    if block and tensor.shape[linear.axis] % block:
        return Decline(
            "quantize-linear.block",
            where(linear.node),
            f"a multiple of {block} along the summed axis",
            f"a weight {list(tensor.shape)} that is summed over axis {linear.axis}",
        )
    return None


def _moved_from(node: torch.fx.Node) -> torch.fx.Node:
    """Follow casts and views back to the value that they pass on."""
    while is_call(node, *_MOVES) and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
    return node


def _sources(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Return the sources of all reads, and the values that they are views of."""
    found: set[torch.fx.Node] = set()
    for node, _ in find_reads(graph):
        found.update(read_arguments(node)["sources"])
    for node in graph.find_nodes(op="call_function", target=INTER):
        found.update(node.args[1])
    return found | {_moved_from(node) for node in found}


def _heads(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Return the values that are outputs of the program, and what they are views of."""
    output = next(iter(reversed(graph.nodes)))
    found = set(output.all_input_nodes)
    return found | {_moved_from(node) for node in found}


def _routers(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Return what only the ranking of tokens or experts is made of.

    From a ranked score back go the values that are no larger than it (a gate may read them too), up to the products
    that made them. Without those, a node that no output depends on is a router's.
    """
    scores = [node.args[0] for node in graph.nodes if is_call(node, *_RANKED)]
    scores += graph.find_nodes(op="call_function", target=SURPRISE)
    cut: set[torch.fx.Node] = set()
    stack: list[torch.fx.Node] = [node for node in scores if isinstance(node, torch.fx.Node)]
    while stack:
        node = stack.pop()
        if node in cut or node.op != "call_function":
            continue
        cut.add(node)
        if not is_call(node, *_PRODUCTS):
            stack.extend(each for each in node.all_input_nodes if _size(each) <= _size(node))
    output = next(iter(reversed(graph.nodes)))
    return (ancestors(cut) - _ancestors_without(output, cut)) | cut


def _size(node: torch.fx.Node) -> float:
    tensor = value(node)
    return tensor.numel() if isinstance(tensor, torch.Tensor) else float("inf")


def _ancestors_without(root: torch.fx.Node, cut: Iterable[torch.fx.Node]) -> set[torch.fx.Node]:
    found = set(cut)
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found - set(cut)
