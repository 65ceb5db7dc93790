"""recognize_attn_res: an AttnRes read spelled out in elementary operations becomes one ``attn_res_read`` node.

Before::  V = stack([x_0, f_1, …])                         After::  attn_res_read(u, [x_0, f_1, …], eps, scale)
          k = V · rsqrt(mean(V²) + eps) · gain
          p = softmax(k @ proj, depth)                              u = gain ⊙ proj
          h = Σ p · V

For the sources v_1 … v_n a read is ``Σ_i p_i v_i`` with ``p = softmax_i(scale · (u · v_i) / sqrt(mean(v_i²) + eps))``.
It is found by this formula (``analysis.depth_algebra``), whatever operations, layout of axes, casts, buffers or packed
operators of other packages spell it. The sources become direct inputs: a bank that is stacked again for every read,
that grows by ``cat`` or that lives in a buffer is not built any more. All constants of the logits are folded into one
query ``attn_res.query.K`` (K counts the reads; reads with the same query share the parameter), in fp32, or fp64 for
fp64 sources. A bias of the last logit and normalised values (Inkling-2) are arguments of the operator. The operator
computes in fp32: where a model rounds between the steps of a read, these roundings go.

Left alone, with the reason (``REASONS``): a softmax over depth whose query depends on activations, whose keys are not
normalised or normalised in another way, or whose values are others than the keys' sources; sigmoid gates. What a model
does with a read (adds it to a stream, say) stays as it is.

Reference: arXiv 2603.15031, section 3; the forms of Kimi K3, Inkling-2 and SANA-Video-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import aten, is_call
from depthwire.passes.analysis.depth_algebra import Anchor, DepthAlgebra, find_reads
from depthwire.passes.analysis.depth_emit import Emitter

if TYPE_CHECKING:
    import torch

    from depthwire.program import Program

_SDPA = aten.scaled_dot_product_attention.default

# Reason -> what a read needs there, what was found.
REASONS = {
    "bias-depends-on-input": ("a constant bias of the last logit", "a bias computed from activations"),
    "bias-not-last": ("a bias of the last logit alone", "a bias of other logits too"),
    "bias-per-token": ("one bias for all tokens", "a bias that differs between tokens"),
    "joint-softmax": ("a softmax over the sources alone", "a softmax over depth and something else together"),
    "key-norm": ("keys under one RMSNorm over all features", "keys normalised in another way"),
    "layer-norm-keys": ("keys under an RMSNorm", "keys under a LayerNorm"),
    "low-rank-keys": ("keys of all features", "keys of some of the features"),
    "masked": ("attention over all sources", "a mask, dropout or grouped heads"),
    "no-dot-product": ("logits that are a constant query times the normalised sources", "other logits"),
    "no-key-norm": ("keys under an RMSNorm", "keys that are not normalised"),
    "norm-eps": ("an eps added to the keys' mean square", "an eps in another place"),
    "per-source-scale": ("one scale for all sources", "a factor per source"),
    "query-depends-on-input": ("a query that is a parameter", "a query computed from activations"),
    "query-per-token": ("one query for all tokens", "a query that differs between tokens"),
    "sigmoid": ("a softmax over depth", "a sigmoid"),
    "temperature-depends-on-input": ("a constant scale of the logits", "a factor computed from activations"),
    "unsupported": ("the arithmetic of a read", "an operation that is not part of one"),
    "unwritten-slot": ("a source in every slot of the buffer", "a slot that nothing was written into"),
    "value-norm": ("values as they are, or under the keys' norm", "values under a norm with another eps"),
    "values": ("weights that mix their sources", "weights that are used in another way"),
    "values-differ": ("values that are the sources of the keys", "other values"),
}


@dataclass(frozen=True)
class RecognizeAttnRes(Pass):
    """Recognise native AttnRes reads."""

    name: ClassVar[str] = "recognize_attn_res"
    adds_parameters: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """Replace every read whose value the program needs."""
        found = find_reads(program.exported)
        declines = tuple(_decline(anchor) for anchor in found.anchors)
        reads, lanes = _demanded(program.exported.graph, found)
        if not reads:
            return PassResult(program, 0, declines)
        edit = GraphEditor(program, self.name)
        emitter = Emitter(edit, found.constants)
        for node in program.exported.graph.nodes:
            if node in reads:
                emitter.emit(node, found.reads[node])
            elif node in lanes:
                emitter.forward(node, found.lanes[node])
        _erase_dead_attention(edit.graph)
        return PassResult(edit.finish(), emitter.reads, declines)

    def ensures(self, program: Program) -> list[str]:
        """No read is spelled out any more, and no source is taken out of a stack of sources."""
        found = find_reads(program.exported)
        reads, _ = _demanded(program.exported.graph, found)
        return [f"{node.name} is still a read spelled out" for node in reads]


def _erase_dead_attention(graph: torch.fx.Graph) -> None:
    """Erase attention whose result nothing reads any more: FX keeps it, as attention with dropout draws numbers."""
    for node in reversed(graph.nodes):
        if node.op != "call_function" or node.users or (node.is_impure() and not is_call(node, _SDPA)):
            continue
        graph.erase_node(node)


def _decline(anchor: Anchor) -> Decline:
    want, got = REASONS[anchor.reason]
    at = "" if anchor.at is anchor.node else f" at {where(anchor.at)}: {anchor.at.target}"
    return Decline(f"recognize-attn-res.{anchor.reason}", where(anchor.node), want, got + at)


def _demanded(graph: torch.fx.Graph, found: DepthAlgebra) -> tuple[set[torch.fx.Node], set[torch.fx.Node]]:
    """Return the reads that something needs as they are, and the sources that it takes out of stacks.

    A view of a read that is read itself stands for both; reads that only other reads are made of are not needed.
    """
    needed: set[torch.fx.Node] = set()
    reads: set[torch.fx.Node] = set()
    lanes: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "output" and node not in needed:
            continue
        if node in found.reads:
            reads.add(node)
            needed.update(source.node for source in found.reads[node].mix.logits.bank.sources)
        elif node in found.lanes:
            lanes.add(node)
            needed.add(found.lanes[node].node)
        else:
            needed.update(node.all_input_nodes)
    return reads, lanes
