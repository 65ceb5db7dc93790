from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from depthwire.export._torch_export import export_module
from depthwire.passes.canonicalize_constants import CanonicalizeConstants
from depthwire.passes.recognize_triangular_inverse import RecognizeTriangularInverse, block_mask
from depthwire.program import Program, Source
from tests.passes.parity import apply, assert_parity, check_golden, error, named, run, sabotaged
from tests.zoo import program_of

if TYPE_CHECKING:
    from depthwire.passes._edit import GraphEditor

aten = torch.ops.aten


class Loop(nn.Module):
    """Forward substitution on a square matrix, as chunked delta rules of transformers spell it.

    ``in_place`` writes into a buffer, as they do; the other form is what capture makes of it, and is captured sooner.
    """

    def __init__(
        self, mask: str = "fill", update: str = "sum", rows: int | None = None, *, in_place: bool = False
    ) -> None:
        super().__init__()
        self.mask, self.update, self.rows, self.in_place = mask, update, rows, in_place

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        hidden = torch.ones(size, size, dtype=torch.bool).triu(1 if self.mask == "diagonal" else 0)
        matrix = {
            "fill": lambda: -x.masked_fill(hidden, 0),
            "diagonal": lambda: x.masked_fill(hidden, 0),
            "tril": lambda: x.tril(-1) * 1.0,
            "none": lambda: x * 1.0,
        }[self.mask]()
        for i in range(1, self.rows or size):
            row, above = matrix[..., i, :i].clone(), matrix[..., :i, :i].clone()
            added = {
                "sum": lambda row=row, above=above: (row.unsqueeze(-1) * above).sum(-2),
                "product": lambda row=row, above=above: (row.unsqueeze(-2) @ above).squeeze(-2),
                "minus": lambda row=row, above=above: -(row.unsqueeze(-1) * above).sum(-2),
            }[self.update]()
            if self.in_place:
                matrix[..., i, :i] = row + added
            else:
                line = torch.slice_scatter(matrix[..., i, :], row + added, -1, 0, i)
                matrix = torch.select_scatter(matrix, line, -2, i)
        return torch.tanh(matrix)


def program(module: nn.Module, *shape: int, dtype: torch.dtype = torch.float64) -> Program:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(dtype) / math.sqrt(shape[-1])
    if getattr(module, "in_place", True):
        exported, names = export_module(module, {"x": x})
        captured = Program(exported, Source("module", "Loop"), {"x": x}, names)
    else:
        captured = program_of(module, {"x": x})
    return CanonicalizeConstants().run(captured).program


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Loop(in_place=True), (2, 3, 5, 5)),
        (Loop(), (2, 8, 8)),
        (Loop("tril", "product", in_place=True), (1, 4, 4)),
        (Loop("tril"), (3, 3)),
        (Loop(update="product"), (2, 1, 2, 13, 13)),
    ],
)
def test_a_loop_becomes_a_few_products(module: Loop, shape: tuple[int, ...]) -> None:
    result = apply(RecognizeTriangularInverse(), program(module, *shape))
    assert result.rewrites == 1
    calls = [node.target for node in result.program.exported.graph.nodes if node.op == "call_function"]
    steps = math.ceil(math.log2(shape[-1]))
    assert calls.count(aten.matmul.default) == 2 * (steps - 1)
    assert aten.select_scatter.default not in calls
    assert len(calls) <= 8 + 4 * steps


def test_golden() -> None:
    before = program(Loop(), 2, 4, 4)
    check_golden("recognize_triangular_inverse", before, apply(RecognizeTriangularInverse(), before).program)


def test_equal_keys_lose_no_digit() -> None:
    """Where all keys are equal and nothing decays, powers of A reach 3e8; the inverse has entries of size 0 and 1."""
    size = 32
    before = program(Loop(), size, size, dtype=torch.float32)
    after = RecognizeTriangularInverse().run(before).program
    (got,) = run(after, torch.ones(size, size))
    assert torch.equal(got, torch.tanh(-torch.ones(size - 1).diag(-1)))
    keys = torch.nn.functional.normalize(torch.randn(size, 16, dtype=torch.float64) + 1.0, dim=-1)
    matrix = torch.rand(size, 1, dtype=torch.float64) * (keys @ keys.T)
    identity = torch.eye(size, dtype=torch.float64)
    wanted = torch.tanh(torch.linalg.inv(identity + matrix.tril(-1)) - identity)
    (exact,), (loop,) = run(after, matrix.float()), run(before, matrix.float())
    # Both round each of at most 32 terms; neither may lose more than a few units in the last place.
    assert error([exact], [wanted]) <= 1e-6
    assert error([exact], [wanted]) <= 4 * error([loop], [wanted]) + 1e-7


def test_the_masks_cover_the_triangle_once() -> None:
    for size in (2, 5, 8, 13):
        masks = [block_mask(size, 1 << k) for k in range(math.ceil(math.log2(size)))]
        assert torch.equal(torch.stack(masks).sum(0), torch.ones(size, size).tril(-1))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        (Loop("none"), "not-strictly-lower"),
        (Loop("diagonal"), "not-strictly-lower"),
        (Loop(update="minus"), "another-function"),
    ],
)
def test_declines(module: Loop, code: str) -> None:
    result = RecognizeTriangularInverse().run(program(module, 2, 5, 5))
    assert result.rewrites == 0
    assert [decline.code for decline in result.declines] == [f"recognize-triangular-inverse.{code}"]


class Fill(nn.Module):
    """Writes into square matrices that are no substitution: row by row from elsewhere, and too few rows."""

    def forward(self, x: Tensor) -> Tensor:
        matrix = torch.zeros_like(x)
        for i in range(x.shape[-1]):
            matrix[..., i, :] = x[..., :, i].exp()
        first = x.tril(-1)
        first[..., 1, :1] = 2 * first[..., 0, :1]
        return matrix + first


def test_other_writes_are_none_of_its_business() -> None:
    result = RecognizeTriangularInverse().run(program(Fill(), 2, 4, 4))
    assert (result.rewrites, result.declines) == (0, ())


def test_a_loop_that_stops_early_stays() -> None:
    assert RecognizeTriangularInverse().run(program(Loop(rows=5), 2, 6, 6)).rewrites == 0


def test_a_left_out_product_is_noticed() -> None:
    before = program(Loop(), 2, 8, 8)
    after = apply(RecognizeTriangularInverse(), before).program

    def drop(edit: GraphEditor) -> None:
        last = named(edit, aten.matmul.default)[-1]
        right = last.args[1]
        assert isinstance(right, torch.fx.Node)
        edit.replace(last, right)

    broken = sabotaged(after, drop)
    with pytest.raises(AssertionError):
        assert_parity(before, broken)
    x = torch.randn(2, 8, 8, dtype=torch.float64)
    assert error(run(broken, x), run(before, x)) > 1e-3
