from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from depthwire.passes.analysis.token_axes import TokenAxisError, batch_place, kept, moved, reshaped, routed_shape
from tests.zoo import program_of

TOKENS, BATCH = 6, 2


def digits(shape: list[int], tokens: int, axis: int) -> Tensor:
    """Return which token every element of ``[…]`` belongs to: its index along the axis, modulo T."""
    index = torch.arange(shape[axis]) % tokens
    return index.reshape([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    """Draw a shape with a token axis (of lead one or more), another shape of as many elements, the axis and T."""
    tokens = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, tokens]), max_size=3))
    axis = draw(st.integers(0, len(sizes)))
    before = [*sizes[:axis], tokens * draw(st.sampled_from([1, 1, 2, tokens])), *sizes[axis:]]
    left = math.prod(before)
    after: list[int] = []
    while left > 1 and len(after) < 5:
        divisors = [n for n in range(1, left + 1) if left % n == 0]
        after.append(draw(st.sampled_from(divisors)))
        left //= after[-1]
    return before, [*after, left], axis, tokens


@settings(max_examples=400, deadline=None)
@given(shapes())
def test_a_reshape_is_followed_as_the_elements_go(case: tuple[list[int], list[int], int, int]) -> None:
    before, after, axis, tokens = case
    found = reshaped(before, after, {axis: before[axis] // tokens}, tokens)
    moved_digits = digits(before, tokens, axis).reshape(after)
    candidates = [
        a for a, size in enumerate(after) if size % tokens == 0 and torch.equal(digits(after, tokens, a), moved_digits)
    ]
    if found is None:
        assert candidates == []
    else:
        ((place, lead),) = found.items()
        assert candidates == [place]
        assert lead * tokens == after[place]


@settings(max_examples=300, deadline=None)
@given(shapes(), st.data())
def test_rows_are_selected_before_a_reshape_as_behind_it(
    case: tuple[list[int], list[int], int, int], data: st.DataObject
) -> None:
    before, after, axis, tokens = case
    axes = {axis: before[axis] // tokens}
    found = reshaped(before, after, axes, tokens)
    assume(found is not None)
    assert found is not None
    slots = data.draw(st.integers(1, tokens))
    chosen = torch.randperm(tokens, generator=torch.Generator().manual_seed(slots))[:slots].sort().values
    x = torch.arange(math.prod(before)).reshape(before)

    def rows(value: Tensor, at: int, lead: int) -> Tensor:
        return value.index_select(at, (torch.arange(lead)[:, None] * tokens + chosen).flatten())

    ((place, lead),) = found.items()
    got = rows(x, axis, axes[axis]).reshape(routed_shape(after, found, slots, flexible=True))
    assert torch.equal(got, rows(x.reshape(after), place, lead))


@settings(max_examples=300, deadline=None)
@given(shapes(), st.data())
def test_the_batch_is_followed_as_the_elements_go(
    case: tuple[list[int], list[int], int, int], data: st.DataObject
) -> None:
    before, after, axis, batch = case
    inner = data.draw(
        st.sampled_from([n for n in range(1, before[axis] // batch + 1) if before[axis] // batch % n == 0])
    )

    def batches(shape: list[int], at: int, within: int) -> Tensor:
        index = torch.arange(shape[at]) // within % batch
        return index.reshape([-1 if a == at else 1 for a in range(len(shape))]).expand(shape)

    found = batch_place(before, after, (axis, inner), batch)
    want = batches(before, axis, inner).reshape(after)
    if found is None:
        assert all(
            not torch.equal(batches(after, a, n), want)
            for a in range(len(after))
            for n in range(1, after[a] + 1)
            if after[a] % (n * batch) == 0
        )
    else:
        assert torch.equal(batches(after, *found), want)


class Ops(nn.Module):
    """One operation on ``[B, T, d]``."""

    def __init__(self, expression: str) -> None:
        super().__init__()
        self.expression = expression

    def forward(self, x: Tensor) -> object:
        """Evaluate the expression."""
        return eval(self.expression, {"x": x, "torch": torch})  # noqa: S307 - the tests' own text


def call(expression: str) -> torch.fx.Node:
    program = program_of(Ops(expression), torch.randn(BATCH, TOKENS, 4))
    found: torch.fx.Node = next(node for node in program.exported.graph.nodes if node.op == "call_function")
    return found


@pytest.mark.parametrize(
    ("expression", "axis"),
    [
        ("x.transpose(1, 2)", 2),
        ("x.transpose(-1, 0)", 1),
        ("x.permute(2, 0, 1)", 2),
        ("x.permute(1, -1, 0)", 0),
        ("x.unsqueeze(1)", 2),
        ("x.unsqueeze(-1)", 1),
        ("x.unsqueeze(-4)", 2),
        ("x.select(2, 0)", 1),
        ("x.select(0, 1)", 0),
        ("x.squeeze(0)", 1),
    ],
)
def test_axes_move(expression: str, axis: int) -> None:
    assert moved(call(expression), {1: 1}) == {axis: 1}


@pytest.mark.parametrize(
    ("expression", "axes"),
    [
        ("x[..., :2]", {1: 1}),
        ("torch.nn.functional.layer_norm(x, (4,))", {1: 1}),
        ("x.mean(-1)", {1: 1}),
        ("x.mean(-1, keepdim=True)", {1: 1}),
        ("x.sum(0)", {0: 1}),
        ("x.amax(2, keepdim=True)", {1: 1}),
        ("x.var(-1, correction=0, keepdim=True)", {1: 1}),
        ("torch.linalg.vector_norm(x, dim=0)", {0: 1}),
        ("torch.log_softmax(x, -1)", {1: 1}),
        ("torch.nn.functional.glu(x, -1)", {1: 1}),
    ],
)
def test_axes_stay(expression: str, axes: dict[int, int]) -> None:
    assert kept(call(expression), {1: 1}) == axes


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("x[:, 1:]", "works along the tokens"),
        ("x.mean(1)", "reduces over the tokens"),
        ("x.sum((0, 1))", "reduces over the tokens"),
        ("torch.nn.functional.layer_norm(x, (6, 4))", "normalises over the tokens"),
        ("torch.log_softmax(x, 1)", "works along the tokens"),
        ("x.split(2, 1)[0]", "works along the tokens"),
    ],
)
def test_operations_along_the_tokens(expression: str, words: str) -> None:
    with pytest.raises(TokenAxisError, match=words):
        kept(call(expression), {1: 1})


@pytest.mark.parametrize("expression", ["x.select(1, 0)", "x.unbind(1)[0]"])
def test_one_token_is_not_taken_out(expression: str) -> None:
    with pytest.raises(TokenAxisError, match="takes one token out"):
        moved(call(expression), {1: 1})


def test_what_is_unknown_is_neither() -> None:
    node = call("x.cumsum(1)")
    assert moved(node, {1: 1}) is None
    assert kept(node, {1: 1}) is None
