from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from depthwire.passes.fuse_attention import FuseAttention
from depthwire.passes.legalize_attention import LegalizeAttention
from depthwire.passes.standard import canonical_pipeline
from tests.passes.parity import apply, assert_parity, check_golden, named, sabotaged
from tests.zoo import Spec, build, inputs, program_of

if TYPE_CHECKING:
    from depthwire.program import Program

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def expanded(x: Tensor, groups: int) -> Tensor:
    """As transformers repeats key heads."""
    batch, heads, length, width = x.shape
    wide = x[:, :, None].expand(batch, heads, groups, length, width)
    return wide.reshape(batch, heads * groups, length, width)


def copied(x: Tensor, groups: int) -> Tensor:
    """With copies in between."""
    return expanded(x, groups).contiguous().clone()


def interleaved(x: Tensor, groups: int) -> Tensor:
    return x.repeat_interleave(groups, dim=1)


def from_behind(x: Tensor, groups: int) -> Tensor:
    return x.repeat_interleave(groups, dim=-3)


def stretched(x: Tensor, groups: int) -> Tensor:
    """One head for all, without a copy."""
    return x.expand(-1, x.shape[1] * groups, -1, -1)


def tiled(x: Tensor, groups: int) -> Tensor:
    """Another order: query head h reads key head h modulo their number."""
    return x.repeat(1, groups, 1, 1)


class Attend(nn.Module):
    """Attention over repeated heads, with a fixed mask where one is given."""

    def __init__(
        self, repeat: Any = None, mask: Tensor | None = None, groups: tuple[int, int] = (2, 2), **options: Any
    ) -> None:
        super().__init__()
        self.repeat, self.groups, self.options = repeat, groups, options
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.repeat is not None:
            k, v = self.repeat(k, self.groups[0]), self.repeat(v, self.groups[1])
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, **self.options)  # type: ignore[arg-type]


def program(module: nn.Module, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None) -> Program:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": q, "k": k, "v": v or k}
    examples = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
    return canonical_pipeline().run(program_of(module, examples))


def triangle(length: int, kind: str) -> Tensor:
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if kind == "boolean":
        return visible
    lowest = {"infinite": -math.inf, "lowest": torch.finfo(torch.float64).min}[kind]
    return torch.zeros(length, length, dtype=torch.float64).masked_fill(~visible, lowest)


def attention(program: Program) -> torch.fx.Node:
    found: list[torch.fx.Node] = [node for node in program.exported.graph.nodes if node.target is SDPA]
    assert len(found) == 1
    return found[0]


def calls(program: Program) -> list[object]:
    return [node.target for node in program.exported.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("repeat", [expanded, copied, interleaved, from_behind])
@pytest.mark.parametrize(("batch", "length", "kv_heads", "groups"), [(1, 3, 2, 2), (3, 5, 1, 4), (2, 4, 3, 3)])
def test_repeated_heads_are_repeated_by_the_operator(
    repeat: Any, batch: int, length: int, kv_heads: int, groups: int
) -> None:
    module = Attend(repeat, groups=(groups, groups), scale=0.3)
    heads = (batch, kv_heads * groups, length, 8)
    result = apply(FuseAttention(), program(module, heads, (batch, kv_heads, length, 8)))
    assert result.rewrites == 1
    assert calls(result.program) == [SDPA]
    assert attention(result.program).kwargs == {"scale": 0.3, "enable_gqa": True}


def test_one_head_for_all_needs_no_expansion() -> None:
    result = apply(FuseAttention(), program(Attend(stretched, groups=(4, 4)), (2, 4, 5, 8), (2, 1, 5, 8)))
    assert calls(result.program) == [SDPA]


def test_heads_in_another_order_are_left_alone() -> None:
    before = program(Attend(tiled), (2, 4, 5, 8), (2, 2, 5, 8))
    assert FuseAttention().run(before).program is before


@pytest.mark.parametrize("kind", ["boolean", "infinite", "lowest"])
@pytest.mark.parametrize("axes", [0, 2])
@pytest.mark.parametrize("length", [1, 5])
def test_a_causal_mask_becomes_an_option(kind: str, axes: int, length: int) -> None:
    mask = triangle(length, kind)[(None,) * axes]
    result = apply(FuseAttention(), program(Attend(mask=mask), (2, 4, length, 8), (2, 4, length, 8)))
    assert result.rewrites == 1
    node = attention(result.program)
    assert (node.args[3], node.args[5]) == (None, length > 1)  # a single token sees itself in any case
    assert not node.kwargs


@pytest.mark.parametrize("kind", ["boolean", "infinite"])
def test_a_mask_that_hides_nothing_goes(kind: str) -> None:
    mask = torch.ones(5, 7, dtype=torch.bool) if kind == "boolean" else torch.zeros(5, 7, dtype=torch.float64)
    result = apply(FuseAttention(), program(Attend(mask=mask), (2, 4, 5, 8), (2, 4, 7, 8)))
    assert attention(result.program).args[3:] == (None, 0.0, False)


def other_masks() -> dict[str, Tensor]:
    window = triangle(5, "boolean") & ~torch.ones(5, 5, dtype=torch.bool).tril(-3)
    rows = torch.stack([triangle(5, "boolean"), window])[:, None]
    bias = triangle(5, "infinite") - 0.5 * torch.eye(5, dtype=torch.float64)
    padded = triangle(5, "boolean").clone()
    padded[:, 0] = False
    finite = triangle(5, "infinite").clamp(min=-1e4)
    return {"window": window, "one-of-two-rows": rows, "bias": bias, "padded": padded, "finite": finite}


@pytest.mark.parametrize("name", list(other_masks()))
def test_other_masks_stay(name: str) -> None:
    before = program(Attend(mask=other_masks()[name]), (2, 4, 5, 8), (2, 4, 5, 8))
    assert FuseAttention().run(before).program is before


def test_a_triangle_of_unequal_lengths_stays() -> None:
    before = program(Attend(mask=torch.ones(4, 6, dtype=torch.bool).tril()), (2, 4, 4, 8), (2, 4, 6, 8))
    assert FuseAttention().run(before).program is before


def test_a_mask_that_an_input_decides_stays() -> None:
    class Masked(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(q, expanded(k, 2), expanded(v, 2), attn_mask=mask)

    examples = {
        name: torch.randn(2, heads, 5, 8, dtype=torch.float64) for name, heads in zip("qkv", (4, 2, 2), strict=True)
    }
    before = canonical_pipeline().run(program_of(Masked(), {**examples, "mask": triangle(5, "boolean")}))
    result = apply(FuseAttention(), before)
    node = attention(result.program)
    assert node.args[3].name == "mask"  # type: ignore[union-attr]
    assert node.kwargs == {"enable_gqa": True}


def test_both_at_once_golden_text() -> None:
    before = program(Attend(expanded, triangle(3, "boolean")[None, None]), (1, 4, 3, 8), (1, 2, 3, 8))
    after = apply(FuseAttention(), before).program
    assert "mask" not in {node.name for node in after.exported.graph.nodes if node.users}
    check_golden("fuse_attention", before, after)


def test_a_different_number_of_key_and_value_heads_is_declined() -> None:
    shapes = (2, 4, 5, 8), (2, 2, 5, 8), (2, 1, 5, 8)
    before = program(Attend(interleaved, groups=(2, 4)), *shapes)
    result = FuseAttention().run(before)
    assert result.program is before
    assert [(decline.code, decline.got) for decline in result.declines] == [("fuse-attention.heads", "[2, 1]")]
    masked = apply(FuseAttention(), program(Attend(interleaved, triangle(5, "boolean"), groups=(2, 4)), *shapes))
    assert masked.rewrites == 1
    assert attention(masked.program).args[5] is True


@pytest.mark.parametrize(("seed", "batch", "length"), [(0, 1, 3), (1, 3, 4), (2, 2, 5)])
def test_on_transformers_of_other_sizes(seed: int, batch: int, length: int) -> None:
    spec = Spec(attention="mask", kv_heads=1 + seed % 2, layers=3)
    before = canonical_pipeline().run(program_of(build(spec, seed=seed), inputs(batch=batch, length=length)))
    result = apply(FuseAttention(), before)
    assert result.rewrites == 3
    assert not result.program.exported.constants
    spelled = apply(LegalizeAttention(), result.program)
    assert_parity(before, spelled.program)


def _see_the_future(edit: Any) -> None:
    edit.set_arg(named(edit, SDPA)[0], 5, value=False)


def _other_heads(edit: Any) -> None:
    node = named(edit, SDPA)[0]
    edit.set_arg(node, 1, edit.call(aten.flip.default, (node.args[1], [1]), before=node, like=node))


@pytest.mark.parametrize("change", [_see_the_future, _other_heads])
def test_a_lost_mask_or_other_heads_are_noticed(change: Any) -> None:
    before = program(Attend(expanded, triangle(5, "boolean")), (2, 4, 5, 8), (2, 2, 5, 8))
    after = apply(FuseAttention(), before).program
    with pytest.raises(AssertionError):
        assert_parity(before, sabotaged(after, change))
