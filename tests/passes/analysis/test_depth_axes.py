from __future__ import annotations

import pytest
import torch

from depthwire.passes.analysis.depth_axes import DEPTH, Atom, layout_to, own_axes, reshaped, sizes, whole
from depthwire.passes.analysis.depth_contractions import parse_einsum


def test_a_stack_that_is_flattened_and_back_is_the_same() -> None:
    dims = (whole(DEPTH, 3), *own_axes([2, 5, 4]))
    flat = reshaped(dims, [3, 10, 4])
    assert flat == (whole(DEPTH, 3), (Atom(0, 1, 2), Atom(1, 1, 5)), whole(2, 4))
    assert reshaped(flat, [3, 1, 2, 5, 4]) == (dims[0], (), *dims[1:])


def test_an_axis_is_cut_and_joined_again() -> None:
    dims = own_axes([6, 4])
    cut = reshaped(dims, [2, 3, 2, 2])
    assert cut == ((Atom(0, 3, 2),), (Atom(0, 1, 3),), (Atom(1, 2, 2),), (Atom(1, 1, 2),))
    assert reshaped(cut, [6, 4]) == dims
    assert reshaped(own_axes([6, 4]), [4, 6]) is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_a_layout_moves_elements_as_the_views_did(order: tuple[int, ...]) -> None:
    source = torch.arange(24).reshape(2, 3, 4)
    dims = tuple(own_axes([2, 3, 4])[axis] for axis in order)
    target = [sizes(dims)[0] * sizes(dims)[1], 1, sizes(dims)[2]]
    moved = reshaped(dims, target)
    assert moved is not None
    layout = layout_to(moved, [2, 3, 4], target)
    assert layout is not None
    got = source.reshape(layout.split).permute(layout.order).reshape(layout.shape)
    assert torch.equal(got, source.permute(order).reshape(target))


@pytest.mark.parametrize(
    ("equation", "ranks", "want"),
    [
        ("nbt, nbtd -> btd", [3, 4], ([["n", "b", "t"], ["n", "b", "t", "d"]], ["b", "t", "d"])),
        ("d,...d->...", [1, 3], ([["d"], [-2, -1, "d"]], [-2, -1])),
        ("ij,jk", [2, 2], ([["i", "j"], ["j", "k"]], ["i", "k"])),
        ("ii->i", [2], None),
    ],
)
def test_einsum_equations(equation: str, ranks: list[int], want: object) -> None:
    assert parse_einsum(equation, ranks) == want
