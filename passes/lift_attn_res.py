"""lift_attn_res: a standard residual stream becomes Attention Residuals, with the function preserved.

Before::  x_2 = x_1 + f_1            After::  h = attn_res_read(query, [x_0, …, f_1 + …])
          norm(x_2, eps)                      norm(h, eps / n²)

A read replaces the sum wherever a norm reads the stream. Its sources are the origin (the embedding), the sums of the
completed blocks and the running sum of the open one; every sublayer's output is in exactly one source. With zero
queries the read is the mean x/n of its n sources, and for RMSNorm and LayerNorm alike::

    norm_{eps/n²}(x/n) = norm_eps(x)

so the program computes what it did, exactly up to rounding. Two corrections are offered: ``eps`` divides the eps of
the norms behind the read by n² (nothing is added to the graph); ``scale`` multiplies the read by n instead.
What the skip path does to the sum (a factor, a cast, a reshape, a choice of tokens), it does to each source.

Refused (PassError): a post-norm model, an un-normed reader of the stream or a stream that is an output (the read
would change what they see), several streams, a program that has reads already, and queries that do not fit.

Reference: arXiv 2603.15031, sections 3 and 4; boundaries as in Kimi K3 (tested before attention, embedding first).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from depthwire.errors import PassError
from depthwire.ops import attn_res_read  # noqa: F401 - registers the operator
from depthwire.passes._base import Pass, PassResult, module_path
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import VIEWS, aten, is_call, value
from depthwire.passes.analysis.norm import find_norms
from depthwire.passes.analysis.residual_stream import ResidualStream, State, find_residual_stream, split_readers
from depthwire.passes.analysis.views import copies
from depthwire.passes.partition import Partition
from depthwire.passes.queries import QUERY_PREFIX, load_queries

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from depthwire.passes.analysis.chain import Write
    from depthwire.program import Program

READ = torch.ops.depthwire.attn_res_read.default


@dataclass(frozen=True)
class LiftAttnRes(Pass):
    """Lift a standard residual stream to Attention Residuals.

    Attributes:
        partition: Which sublayers share a source.
        correction: How the mean is made to stand in for the sum.
        queries: A safetensors file of trained queries; zero queries if ``None``.
    """

    name: ClassVar[str] = "lift_attn_res"
    adds_parameters: ClassVar[bool] = True
    partition: Partition = field(default_factory=lambda: Partition("full"))
    correction: Literal["eps", "scale"] = "eps"
    queries: Path | None = None

    def run(self, program: Program) -> PassResult:
        """Insert a read before every reader of the stream.

        Raises:
            PassError: See the module's docstring.
        """
        _refuse_lifted(program)
        stream = find_residual_stream(program)
        _refuse_breaks(stream, program)
        starts = self.partition.starts([sublayer.kind for sublayer in stream.sublayers])
        edit = GraphEditor(program, self.name)
        lifting = _Lifting(self, stream, edit)
        lifting.walk(starts)
        lifting.set_queries()
        return PassResult(edit.finish(), lifting.reads)

    def ensures(self, program: Program) -> list[str]:
        """Every read has a query of its own, at least two sources, and nothing but norms (or a scale) behind it."""
        reads = [node for node in program.exported.graph.nodes if is_call(node, READ)]
        norms = find_norms(program.exported)
        wrong, queries = [], set()
        for node in reads:
            query, sources = node.args[0], node.args[1]
            if query in queries:
                wrong.append(f"{node.name} shares its query")
            queries.add(query)
            if len(sources) < 2 or len(set(sources)) != len(sources):
                wrong.append(f"{node.name} reads {len(sources)} sources, some of them twice or too few")
            found, others = split_readers(node, norms)
            if not found or others:
                wrong.append(f"{node.name} is read by {others[0][0].name if others else 'nothing'}, which is no norm")
        return wrong


class _Lifting:
    """One walk along the stream: keeps the bank of completed sources and the partial sum of the open block."""

    def __init__(self, options: LiftAttnRes, stream: ResidualStream, edit: GraphEditor) -> None:
        self._options = options
        self._stream = stream
        self._edit = edit
        self._bank = [edit.copy_of(stream.origin)]
        self._partial: torch.fx.Node | None = None
        self._queries: dict[int, torch.fx.Node] = {}

    @property
    def reads(self) -> int:
        return len(self._queries)

    @property
    def _sources(self) -> list[torch.fx.Node]:
        return [*self._bank] if self._partial is None else [*self._bank, self._partial]

    def walk(self, starts: list[bool]) -> None:
        """Insert the reads in order; ``starts[i]`` tells whether a block starts with sublayer i."""
        for index, sublayer in enumerate(self._stream.sublayers):
            if starts[index] and self._partial is not None:
                self._bank.append(self._partial)
                self._partial = None
            self._read(index, sublayer.reads)
            for write in sublayer.writes:
                self._carry(write)
                self._append(write)
        self._read(len(self._stream.sublayers), self._stream.final)

    def _carry(self, write: Write) -> None:
        """Take the sources along the skip path: what it does to the sum, it does to each addend."""
        add = self._edit.copy_of(write.add)
        for node in reversed(write.skip):
            view = self._edit.copy_of(node)
            if not copies(node):
                # A source has strides of its own, for which a view may not be legal.
                target = aten.reshape.default if is_call(node, *VIEWS) else view.target
                self._map(target, view.args[1:], view, view.kwargs)
        if write.skip_alpha != 1.0:
            self._map(aten.mul.Tensor, (write.skip_alpha,), add)
        self._bank = [self._cast(source, add) for source in self._bank]
        self._partial = None if self._partial is None else self._cast(self._partial, add)

    def _map(
        self, target: Any, arguments: tuple[Any, ...], place: torch.fx.Node, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Apply one operator to every source."""

        def apply(source: torch.fx.Node) -> torch.fx.Node:
            return self._edit.call(target, (source, *arguments), kwargs, before=place, like=place)

        self._bank = [apply(source) for source in self._bank]
        self._partial = None if self._partial is None else apply(self._partial)

    def _append(self, write: Write) -> None:
        """Add a branch to the open block, or open one with it."""
        add, branch = self._edit.copy_of(write.add), self._edit.copy_of(write.branch)
        if write.alpha != 1.0:
            branch = self._edit.call(aten.mul.Tensor, (branch, write.alpha), before=add, like=add)
        branch = self._cast(branch, add)
        if branch in self._bank:  # an earlier source is written once more: it then stands twice
            branch = self._edit.call(aten.clone.default, (branch,), before=add, like=add)
        if self._partial is None:
            self._partial = branch
        else:
            self._partial = self._edit.call(aten.add.Tensor, (self._partial, branch), before=add, like=add)

    def _cast(self, node: torch.fx.Node, add: torch.fx.Node) -> torch.fx.Node:
        """Give a source the dtype of the sum: an addition of two dtypes promotes."""
        dtype = value(add).dtype
        if value(node).dtype == dtype:
            return node
        return self._edit.call(aten.to.dtype, (node, dtype), before=add, like=add)

    def _read(self, index: int, state: State) -> None:
        """Let the readers of one state read the sources; a single source is the state itself."""
        sources = self._sources
        count = len(sources)
        if count == 1 or not state.norms:
            return
        copy_of = self._edit.copy_of
        old = copy_of(state.node)
        users = list(old.users)
        dtype = torch.float64 if value(old).dtype == torch.float64 else torch.float32
        query = self._edit.add_parameter(f"{QUERY_PREFIX}{index}", torch.zeros(self._stream.width, dtype=dtype))
        self._queries[index] = query
        following, anchor = old.next, copy_of(state.norms[0].output)
        name = f"attn_res_read_{index}"
        args = (query, sources, state.norms[0].eps, 1.0)
        read = self._edit.call(READ, args, before=following, like=anchor, name=name)
        if self._options.correction == "scale":
            read = self._edit.call(aten.mul.Tensor, (read, float(count)), before=following, like=anchor)
        for user in users:  # the next write among them: nothing reads the old sums any more
            self._edit.reroute(user, old, read)
        if self._options.correction == "eps":
            for norm in state.norms:
                site, position = norm.eps_site
                key = position if len(site.args) > position else "eps"
                self._edit.set_arg(copy_of(site), key, norm.eps / count**2)

    def set_queries(self) -> None:
        """Put trained queries, if a file was given, in the place of the zeros."""
        if self._options.queries is None:
            return
        trained = load_queries(self._options.queries, sorted(self._queries), self._stream.width)
        for index, tensor in trained.items():
            self._edit.set_parameter(f"{QUERY_PREFIX}{index}", tensor)


def _refuse_lifted(program: Program) -> None:
    for node in program.exported.graph.nodes:
        if is_call(node, READ):
            raise PassError(
                "attn-res.already-lifted",
                "The model reads its depth by attention already",
                at=f"{module_path(node)} ({node.name})",
                want="a model with a standard residual stream",
                got="depthwire::attn_res_read",
                todo="Leave out --attn-res: the reads are kept as they are.",
            )


def _refuse_breaks(stream: ResidualStream, program: Program) -> None:
    if stream.streams > 1:
        raise PassError(
            "structure.several-streams",
            "The model has several residual streams",
            at=program.source.reference,
            want="one stream (a decoder, an encoder or a vision transformer)",
            got=f"{stream.streams} streams",
            todo="Capture encoder and decoder as separate modules.",
        )
    if not stream.breaks:
        return
    first = stream.breaks[0]
    more = f" (and {len(stream.breaks) - 1} more; see 'depthwire inspect')" if len(stream.breaks) > 1 else ""
    raise PassError(
        f"structure.{first.code}",
        "The residual stream cannot be lifted without changing the function",
        at=first.at,
        want="a pre-norm model: every reader of the stream is an RMSNorm or LayerNorm",
        got=first.detail + more,
        todo="Lift needs a pre-norm model; export this one without --attn-res.",
    )
