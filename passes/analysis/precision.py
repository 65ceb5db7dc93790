"""Which dtype each value of a program is computed in, when its bulk is to run in half precision.

Three kinds of operators:

* *wide ones* stay fp32: norms, and functions whose result overflows or loses its meaning in half precision;
* *narrow ones* take the low dtype: matrix products, attention, embeddings;
* all others *follow* the largest of their operands, weights and constants aside.

Two kinds of places stay fp32 whatever stands there: what decides which tokens (or experts) are computed, that is the
scores behind ``select_tokens``, ``topk`` and ``sort`` with everything that only they read, and the values per token
that are made of such scores (gates); and, if asked for, the product behind the logits. Depth-attention operators
compute in fp32 inside whatever their sources are; their queries and gains are never narrowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

from depthwire.passes._match import aten, is_float, value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from depthwire.program import Program

NORMS: Final = (
    aten.rms_norm.default,
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.group_norm.default,
    aten.batch_norm.default,
)
_WIDE_PACKETS: Final = (
    *("pow", "exp", "expm1", "log", "log1p", "log2", "softplus", "logsumexp", "cosh", "sinh", "tan", "reciprocal"),
    *("rsqrt", "sum", "mean", "var", "var_mean", "std", "norm", "linalg_vector_norm", "prod", "cumsum", "cumprod"),
    *("log_softmax", "_log_softmax", "linalg_solve_triangular", "triangular_solve", "erfinv", "square"),
)
_NARROW_PACKETS: Final = (
    *("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "einsum", "dot", "mv", "embedding", "_grouped_mm"),
    *("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "scaled_dot_product_attention"),
)
_DECIDING_PACKETS: Final = ("topk", "sort", "argsort")
_OWN_DECIDING: Final = ("select_tokens", "select_tokens_budget")
_OWN_NARROW: Final = ("dequantize", "quantize")


def packet(node: torch.fx.Node) -> tuple[str, str]:
    """Return namespace and name of a node's operator without its overload."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return "", getattr(node.target, "__name__", "")
    space, _, name = schema.name.partition("::")
    return space, name


def is_read(node: torch.fx.Node) -> bool:
    """Tell whether a node is one of the depth-attention operators."""
    space, name = packet(node)
    return space == "depthwire" and name.startswith("attn_res")


def takes_dtype(node: torch.fx.Node, operand: torch.fx.Node) -> bool:
    """Tell whether an operand has the dtype that a call computes in: not a read's query, gain and logsumexp."""
    if not is_read(node):
        return True
    target: Any = node.target
    given = dict(zip((argument.name for argument in target._schema.arguments), node.args, strict=False))
    sources: Any = given["sources"]
    return operand in (*sources, given.get("delta"), given.get("inter_out"))


def is_wide(node: torch.fx.Node) -> bool:
    """Tell whether an operator stays fp32 wherever it stands."""
    space, name = packet(node)
    if space == "aten":
        return node.target in NORMS or name in _WIDE_PACKETS
    return space == "depthwire" and (name == "surprise_score" or name in _OWN_DECIDING)


def is_narrow(node: torch.fx.Node) -> bool:
    """Tell whether an operator takes the low dtype wherever it stands, islands aside."""
    space, name = packet(node)
    return (space == "aten" and name in _NARROW_PACKETS) or (space == "depthwire" and name in _OWN_NARROW)


def names_its_dtype(node: torch.fx.Node) -> bool:
    """Tell whether an operator says itself which floating dtype it gives (casts, ``full``, ``softmax(dtype=…)``)."""
    asked = node.kwargs.get("dtype")
    if asked is None and packet(node) == ("aten", "to") and len(node.args) > 1:
        asked = node.args[1]
    return isinstance(asked, torch.dtype) and asked.is_floating_point


@dataclass(frozen=True)
class Assignment:
    """What is computed in the low dtype.

    Attributes:
        low: Names of the calls that compute in the low dtype.
        weights: Names of the weights and constants that are stored in it: those that only such calls take.
        islands: Number of calls kept in fp32, by reason: ``norms``, ``scores``, ``logits``, ``functions``.
    """

    low: frozenset[str]
    weights: frozenset[str] = frozenset()
    islands: dict[str, int] = field(default_factory=dict)


def assign(program: Program, *, wide_logits: bool = False) -> Assignment:
    """Decide for every call of a program.

    Args:
        program: A program computed in fp32.
        wide_logits: Keep the matrix products whose result is an output in fp32.
    """
    graph = program.exported.graph
    scores = _score_island(graph)
    logits = _products_behind_outputs(program) if wide_logits else set()
    low: set[str] = set()
    islands = {"norms": 0, "scores": 0, "logits": 0, "functions": 0}
    for node in graph.nodes:
        if node.op != "call_function" or not (is_narrow(node) or any(True for _ in floats(node))):
            continue
        reason = _reason(node, scores, logits)
        if reason is not None:
            islands[reason] += 1
        elif is_narrow(node) or (not names_its_dtype(node) and _follows_low(node, low)):
            low.add(node.name)
    weights = {node.name for node in graph.nodes if node.op == "placeholder" and _only_low(node, low)}
    weights -= set(program.input_names)
    return Assignment(frozenset(low), frozenset(weights), {reason: n for reason, n in islands.items() if n})


def _only_low(node: torch.fx.Node, low: set[str]) -> bool:
    if not is_float(node) or value(node).dtype != torch.float32 or not node.users:
        return False
    return all(user.name in low and takes_dtype(user, node) for user in node.users)


def floats(node: torch.fx.Node) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors (fake) that a node computes."""
    result = value(node)
    for each in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(each, torch.Tensor) and each.dtype.is_floating_point:
            yield each


def _reason(node: torch.fx.Node, scores: set[torch.fx.Node], logits: set[torch.fx.Node]) -> str | None:
    if node in scores:
        return "scores"
    if node in logits:
        return "logits"
    if node.target in NORMS:
        return "norms"
    return "functions" if is_wide(node) else None


def voters(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the operands that an operator's dtype follows: of its floating tensors, computed ones, the largest."""
    computed = [arg for arg in node.all_input_nodes if arg.op == "call_function" and takes_dtype(node, arg)]
    computed = [arg for arg in computed if any(True for _ in floats(arg))]
    sizes = {arg: max(each.numel() for each in floats(arg)) for arg in computed}
    return [arg for arg, size in sizes.items() if size == max(sizes.values())]


def _follows_low(node: torch.fx.Node, low: set[str]) -> bool:
    return any(arg.name in low for arg in voters(node))


def _deciding(node: torch.fx.Node) -> bool:
    space, name = packet(node)
    return (space == "aten" and name in _DECIDING_PACKETS) or (space == "depthwire" and name in _OWN_DECIDING)


def _score_island(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Return the calls that make scores, those that only scores are made of, and the values per token behind them."""
    island: set[torch.fx.Node] = set()
    for node in graph.nodes:  # forward: a score, and what is as small and made of it
        for score in (arg for arg in node.args[:1] if _deciding(node) and isinstance(arg, torch.fx.Node)):
            island.add(score)
            island |= _small_behind(score)
    for node in reversed(graph.nodes):  # backward: what nobody else reads
        read = node.op == "call_function" and is_float(node) and node.users
        if read and all(_enters(user, node, island) for user in node.users):
            island.add(node)
    return {node for node in island if node.op == "call_function" and not _deciding(node)}


def _enters(user: torch.fx.Node, node: torch.fx.Node, island: set[torch.fx.Node]) -> bool:
    return user in island or (_deciding(user) and user.args[0] is node)


def _small_behind(score: torch.fx.Node) -> set[torch.fx.Node]:
    limit = value(score).numel()
    found: set[torch.fx.Node] = set()
    pending = [score]
    while pending:
        for user in pending.pop().users:
            sizes = [each.numel() for each in floats(user)]
            if user not in found and sizes and max(sizes) <= limit and not _deciding(user):
                found.add(user)
                pending.append(user)
    return found


def _products_behind_outputs(program: Program) -> set[torch.fx.Node]:
    """Return the matrix products whose results only outputs see, and the element-wise calls and views in between."""
    nodes = {node.name: node for node in program.exported.graph.nodes}
    output = next(reversed(program.exported.graph.nodes))
    found: set[torch.fx.Node] = set()
    pending = [nodes[name] for name in program.output_nodes]
    while pending:
        node = pending.pop()
        seen = all(user is output or user in found for user in node.users)
        if node.op != "call_function" or node in found or not is_float(node) or not seen:
            continue
        if node.target in NORMS or is_read(node):
            continue
        found.add(node)
        if not is_narrow(node):
            pending += node.all_input_nodes
    return found if any(is_narrow(node) for node in found) else set()
