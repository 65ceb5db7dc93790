"""recognize_triangular_inverse: forward substitution, unrolled row by row, becomes a few matrix products.

Before::  for i in 1 … N-1:                                          After::  X = I + A∘M₁
              a[i, :i] = a[i, :i] + Σ_j a[i, j] · a[j, :i]                    X = X + X (A∘M_b) X      b = 2, 4, … < N
                                                                              a = X - I

For a strictly lower triangular A the loop computes (I - A)⁻¹ - I. Chunked delta rules (Kimi Delta Attention, gated
DeltaNet) spell it with writes into a buffer, and capture unrolls it into some sixteen operations a row: a thousand for
each layer with chunks of 64. In the result X is, before step b, the inverse of the diagonal blocks of size b; M_b
selects the lower left block of each block of size 2b, and

    ⎡I-A₁₁    0  ⎤⁻¹   ⎡    X₁₁       0 ⎤
    ⎣-A₂₁   I-A₂₂⎦   = ⎣X₂₂ A₂₁ X₁₁  X₂₂⎦

so log₂ N steps of two products do it, for every N. Products of squares, Π (I + A^(2^k)), need as few, but powers of A
reach binomial coefficients where keys repeat, and fp32 then loses every digit; this is substitution by blocks, with its
rounding. The arithmetic is 2 N³ log₂ N instead of N³/6 multiplications, in products that are fast.

The loop is known by what it computes, not by its spelling. Between A and the last write there may be only operators
that act on the two last axes and are polynomial in A, and A must be zero on and above the diagonal for every input. The
operations are then evaluated at random points in fp64 and compared with the inverse: two different polynomials agree at
a random point with probability zero.
Left alone: another function of A (``another-function``), a matrix that need not be strictly lower triangular.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from depthwire.passes._base import Decline, Pass, PassResult, where
from depthwire.passes._edit import GraphEditor
from depthwire.passes._match import CASTS, argument, aten, constants_of, is_call, scalar, value
from depthwire.passes.analysis.matrices import acts_on_last_two, evaluate

if TYPE_CHECKING:
    from depthwire.program import Program

_WRITES = (aten.slice_scatter.default, aten.select_scatter.default)
_COPIES = (*CASTS, aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default)
_SMALLEST = 3  # a loop over fewer rows costs less than the products
_POINTS = 3
_AGREE = 1e-9  # relative; fp64 rounding in at most N² terms stays far below, another polynomial far above


@dataclass(frozen=True)
class RecognizeTriangularInverse(Pass):
    """Replace unrolled forward substitution by products of blocks."""

    name: ClassVar[str] = "recognize_triangular_inverse"
    adds_constants: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """Rewrite every unrolled inverse."""
        constants = constants_of(program)
        ends = [node for node in program.exported.graph.nodes if is_call(node, *_WRITES) and _is_end(node)]
        verdicts = [(node, _match(node, constants)) for node in ends]
        declines = tuple(verdict for _, verdict in verdicts if isinstance(verdict, Decline))
        matches = [(node, verdict) for node, verdict in verdicts if isinstance(verdict, torch.fx.Node)]
        if not matches:
            return PassResult(program, 0, declines)
        edit = GraphEditor(program, self.name)
        rewriter = _Rewriter(edit)
        for end, matrix in matches:
            rewriter.rewrite(edit.copy_of(end), edit.copy_of(matrix))
        return PassResult(edit.finish(), len(matches), declines)


def _is_end(node: torch.fx.Node) -> bool:
    """Tell whether a write into a square matrix is the last of its buffer."""
    shape = value(node).shape
    square = len(shape) >= 2 and shape[-1] == shape[-2] >= _SMALLEST
    return square and not any(is_call(user, *_WRITES) and user.args[0] is node for user in node.users)


def _match(end: torch.fx.Node, constants: dict[str, torch.Tensor]) -> torch.fx.Node | Decline | None:
    """Return A, a decline once a loop over one matrix is there, ``None`` where there is nothing of the kind."""
    matrix, writes = end, 0
    while is_call(matrix, *_WRITES):
        matrix, writes = matrix.args[0], writes + 1  # type: ignore[assignment]
    size = int(value(end).shape[-1])
    region = _between(matrix, end)
    if writes < size - 1 or region is None:
        return None
    if not _is_strictly_lower(matrix, constants):
        want = "a matrix that is zero on and above the diagonal"
        return Decline("recognize-triangular-inverse.not-strictly-lower", where(end), want, where(matrix))
    distance = _distance(region, matrix, end)
    if not distance <= _AGREE:  # NaN is no agreement either
        return Decline(
            "recognize-triangular-inverse.another-function", where(end), "(I - A)⁻¹ - I", f"off by {distance:.1e}"
        )
    return matrix


def _between(matrix: torch.fx.Node, end: torch.fx.Node) -> list[torch.fx.Node] | None:
    """Return the nodes that lead from a matrix to a node, in order; ``None`` if anything else enters."""
    leading = value(matrix).dim() - 2
    found: set[torch.fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node is matrix or node in found:
            continue
        if not acts_on_last_two(node, leading):
            return None
        found.add(node)
        waiting += node.all_input_nodes
    return [node for node in end.graph.nodes if node in found]


def _distance(region: list[torch.fx.Node], matrix: torch.fx.Node, end: torch.fx.Node) -> float:
    """Return how far the region is from (I - A)⁻¹ - I at random points, relative to the largest entry."""
    shape = value(matrix).shape
    size, leading = int(shape[-1]), [1] * (len(shape) - 2)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(_POINTS):
        # Entries of this size keep those of the inverse near 1: a wrong coefficient shows in every one of them.
        point = torch.randn(*leading, size, size, dtype=torch.float64, generator=generator).tril(-1) / math.sqrt(size)
        identity = torch.eye(size, dtype=torch.float64)
        wanted = torch.linalg.solve_triangular(identity - point, identity.expand_as(point), upper=False) - identity
        got = evaluate(region, {matrix: point})[end]
        difference = float((got - wanted).abs().max() / wanted.abs().max()) if got.shape == wanted.shape else math.inf
        worst = max(worst, difference) if not math.isnan(difference) else math.nan
    return worst


def _is_strictly_lower(node: torch.fx.Node, constants: dict[str, torch.Tensor]) -> bool:
    """Tell whether a matrix is zero on and above the diagonal whatever the inputs are."""
    while is_call(node, aten.neg.default, *_COPIES) or (
        is_call(node, aten.mul.Tensor, aten.mul.Scalar) and scalar(node.args[1]) is not None
    ):
        node = node.args[0]  # type: ignore[assignment]
    if is_call(node, aten.tril.default):
        return int(argument(node, 1, "diagonal", 0)) <= -1
    if not is_call(node, aten.masked_fill.Scalar) or scalar(node.args[2]) != 0.0:
        return False
    mask: Any = node.args[1]
    known = constants.get(mask.name)
    if known is None or known.dtype != torch.bool:
        return False
    size = int(value(node).shape[-1])
    upper = torch.ones(size, size, dtype=torch.bool).triu()
    return bool((known.expand(*known.shape[:-2], size, size) | ~upper).all()) if known.dim() >= 2 else False


class _Rewriter:
    def __init__(self, edit: GraphEditor) -> None:
        self._edit = edit
        self._made: dict[object, torch.fx.Node] = {}

    def rewrite(self, end: torch.fx.Node, matrix: torch.fx.Node) -> None:
        size, dtype = int(value(matrix).shape[-1]), value(matrix).dtype
        identity = self._constant("identity", size, 0, dtype)
        inverse = None
        block = 1
        while block < size:
            mask = self._constant("block_mask", size, block, dtype)
            corner = self._call(aten.mul.Tensor, (matrix, mask), end)
            if inverse is None:
                inverse = self._call(aten.add.Tensor, (corner, identity), end)
            else:
                right = self._call(aten.matmul.default, (corner, inverse), end)
                filled = self._call(aten.matmul.default, (inverse, right), end)
                inverse = self._call(aten.add.Tensor, (inverse, filled), end)
            block *= 2
        strict = self._call(aten.sub.Tensor, (inverse, identity), end)
        self._edit.replace(end, strict, keep_name=True)

    def _call(self, target: Any, args: tuple[Any, ...], end: torch.fx.Node) -> torch.fx.Node:
        return self._edit.call(target, args, before=end, like=end)

    def _constant(self, stem: str, size: int, block: int, dtype: torch.dtype) -> torch.fx.Node:
        """Return the identity (block 0), or the mask of the lower left blocks; all layers share one of each."""
        key = (size, block, dtype)
        if key not in self._made:
            tensor = block_mask(size, block) if block else torch.eye(size)
            self._made[key] = self._edit.add_constant(self._edit.free_constant_name(stem), tensor.to(dtype))
        return self._made[key]


def block_mask(size: int, block: int) -> torch.Tensor:
    """Return the ``[size, size]`` matrix that is 1 on the lower left block of each diagonal block of size 2·block."""
    number = torch.arange(size) // block
    rows, columns = number[:, None], number[None, :]
    return ((rows % 2 == 1) & (columns == rows - 1)).to(torch.float32)
