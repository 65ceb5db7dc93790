"""Finds the residual stream of a transformer by data flow: who writes onto it, and who reads it through a norm.

::

    x_0                      the origin: an embedding and whatever is added to it
    x_{i+1} = c·x_i + f(x_i)  a write; f is one or more branches of a sublayer, c is 1 unless the skip is scaled
    norm(x_i)                a reader, directly or through views (a cast, a reshape, the last token, a factor)

The stream is the longest chain of additions in which the written branch depends on the chain's own origin while the
skip operand does not pass through the branch. Module names serve as labels only. Consecutive writes with no reader
between them (parallel attention and MLP) are one sublayer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthwire.errors import PassError
from depthwire.passes._base import module_path, where
from depthwire.passes._match import strip, value
from depthwire.passes.analysis.chain import Chain, Write, longest_chain
from depthwire.passes.analysis.norm import Norm, find_norms
from depthwire.passes.analysis.sublayer import Branches, kind_of
from depthwire.passes.analysis.views import leaves

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from depthwire.program import Program


@dataclass(frozen=True)
class Break:
    """Something that keeps the stream from being read by scale-invariant norms alone.

    Attributes:
        code: ``post-norm``, ``un-normed-reader`` or ``stream-is-output``.
        at: Module path and node.
        detail: One sentence.
    """

    code: str
    at: str
    detail: str


@dataclass(frozen=True)
class State:
    """One value of the stream, x_i, and who reads it.

    Attributes:
        node: The value ``[..., d]``.
        norms: The norms that read it, directly or through views.
        others: The nodes that read it without a norm; the next write does not count.
    """

    node: torch.fx.Node
    norms: tuple[Norm, ...]
    others: tuple[torch.fx.Node, ...] = ()


@dataclass(frozen=True)
class Sublayer:
    """One sublayer: reads a state through norms, writes one branch or several.

    Attributes:
        index: 0-based position.
        kind: ``attention``, ``mlp``, ``parallel`` or ``other``.
        module: Module path of the sublayer.
        reads: The state that it reads.
        writes: The additions that put its branches onto the stream.
    """

    index: int
    kind: str
    module: str
    reads: State
    writes: tuple[Write, ...]


@dataclass(frozen=True)
class ResidualStream:
    """The residual stream of one model.

    Attributes:
        origin: x_0.
        sublayers: In order.
        final: The last state; its norms are the final reader.
        breaks: What keeps the rewrite from preserving the function: post-norms first, then readers in graph order.
        width: d.
        streams: How many streams were found; passes that rewrite one refuse more.
    """

    origin: torch.fx.Node
    sublayers: tuple[Sublayer, ...]
    final: State
    breaks: tuple[Break, ...]
    width: int
    streams: int

    @property
    def states(self) -> tuple[State, ...]:
        """The states that sublayers and the final norm read, in order; one more than there are sublayers."""
        return (*(sublayer.reads for sublayer in self.sublayers), self.final)

    def as_dict(self) -> dict[str, Any]:
        """Return the structure as JSON-ready values."""
        return {
            "origin": {"node": self.origin.name, "module": module_path(self.origin)},
            "width": self.width,
            "streams": self.streams,
            "sublayers": [_sublayer_dict(sublayer) for sublayer in self.sublayers],
            "final": {"node": self.final.node.name, "norms": [_norm_dict(norm) for norm in self.final.norms]},
            "breaks": [{"code": b.code, "at": b.at, "detail": b.detail} for b in self.breaks],
        }


def find_residual_stream(program: Program) -> ResidualStream:
    """Find the residual stream.

    Args:
        program: A captured program; canonical or not.

    Returns:
        The stream with its breaks; a stream with breaks can be inspected, but not lifted.

    Raises:
        PassError: There is no chain of residual additions.
    """
    exported = program.exported
    norms = find_norms(exported)
    chain, streams = longest_chain(exported, norms)
    if chain is None:
        raise PassError(
            "structure.no-residual-stream",
            "The model has no residual stream",
            at=program.source.reference,
            want="two or more additions x + f(x), each reading the sum of those before it",
            got=f"{len(exported.graph.nodes)} nodes without such a chain",
            todo="Check with 'depthwire inspect' that the right module was captured.",
        )
    states = [_state(chain, position, norms) for position in range(len(chain.writes) + 1)]
    breaks = [_post_norm_break(norm) for norm in chain.post_norms]
    # The origin is a source of its own, so a read of it alone stays what it is: its readers need no norm.
    breaks += [_other_break(state.node, reader) for state in states[1:] for reader in state.others]
    sublayers, final = _group(chain, states, exported)
    width = int(value(chain.origin).shape[-1])
    return ResidualStream(chain.origin, sublayers, final, tuple(dict.fromkeys(breaks)), width, streams)


def split_readers(
    node: torch.fx.Node, norms: list[Norm]
) -> tuple[list[Norm], list[tuple[torch.fx.Node, torch.fx.Node]]]:
    """Return the norms that read a value, directly or through views, and all other readers with the view they read."""
    members = {member: norm for norm in norms for member in norm.nodes}
    found: dict[torch.fx.Node, Norm] = {}
    others = []
    for reader, view in leaves(node):
        norm = members.get(reader)
        if norm is not None and norm.source is strip(view):
            found[norm.output] = norm
        else:
            others.append((reader, view))
    return list(found.values()), others


def _state(chain: Chain, position: int, norms: list[Norm]) -> State:
    node = chain.states[position]
    found, others = split_readers(node, norms)
    if position < len(chain.writes):
        write = chain.writes[position]
        others = [pair for pair in others if pair != (write.add, (*write.skip, node)[0])]
    return State(node, tuple(found), tuple(dict.fromkeys(reader for reader, _ in others)))


def _post_norm_break(norm: Norm) -> Break:
    detail = "the norm lies on the skip path: it normalises the sum itself (post-norm), so the stream is not a sum"
    return Break("post-norm", where(norm.output), detail)


def _other_break(node: torch.fx.Node, reader: torch.fx.Node) -> Break:
    if reader.op == "output":
        return Break("stream-is-output", where(node), "the raw stream is an output of the model")
    detail = f"{reader.name} reads the stream without a norm, so its result depends on the stream's scale"
    return Break("un-normed-reader", where(reader), detail)


def _group(chain: Chain, states: list[State], exported: ExportedProgram) -> tuple[tuple[Sublayer, ...], State]:
    """Join consecutive writes with no reader between them into one sublayer."""
    branches = Branches(exported)
    sublayers: list[Sublayer] = []
    reads = states[0]
    pending: list[Write] = []
    for write, following in zip(chain.writes, states[1:], strict=True):
        pending.append(write)
        if not following.norms and not following.others and following is not states[-1]:
            continue
        origins = [norm.output for norm in reads.norms] if reads.norms and not reads.others else [reads.node]
        kinds = [kind for member in pending for kind in branches.kinds(member.branch, origins)]
        module = branches.module([member.branch for member in pending], origins)
        sublayers.append(Sublayer(len(sublayers), kind_of(kinds), module, reads, tuple(pending)))
        reads, pending = following, []
    return tuple(sublayers), reads


def _norm_dict(norm: Norm) -> dict[str, Any]:
    return {
        "kind": norm.kind,
        "module": module_path(norm.output),
        "node": norm.output.name,
        "eps": norm.eps,
        "weight": None if norm.weight is None else norm.weight.name,
        "bias": None if norm.bias is None else norm.bias.name,
        "native": norm.native,
    }


def _sublayer_dict(sublayer: Sublayer) -> dict[str, Any]:
    return {
        "index": sublayer.index,
        "kind": sublayer.kind,
        "module": sublayer.module,
        "reads": sublayer.reads.node.name,
        "norms": [_norm_dict(norm) for norm in sublayer.reads.norms],
        "writes": [
            {"node": write.add.name, "branch": write.branch.name, "scale": write.scale, "skip_scale": write.skip_scale}
            for write in sublayer.writes
        ],
    }
