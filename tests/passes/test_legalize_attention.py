from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from depthwire.passes.legalize_attention import LegalizeAttention
from depthwire.passes.standard import canonical_pipeline
from tests.passes.parity import apply, assert_parity, check_golden, named, run, sabotaged
from tests.zoo import Spec, build, inputs, program_of

if TYPE_CHECKING:
    from depthwire.program import Program

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


class Attend(nn.Module):
    """Scaled dot-product attention with some options, and a mask where one is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


def operands(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"q": q, "k": k, "v": v or k}
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def softmaxes(program: Program) -> int:
    return sum(node.target is aten.softmax.int for node in program.exported.graph.nodes)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((2, 4, 5, 8), (2, 4, 5, 8)), {"is_causal": True}),
        (((2, 4, 5, 8), (2, 4, 5, 8)), {}),
        (((2, 4, 5, 8), (2, 4, 7, 8)), {"is_causal": True}),
        (((2, 4, 5, 8), (2, 2, 5, 8)), {"is_causal": True, "enable_gqa": True}),
        (((2, 4, 5, 8), (2, 1, 5, 8), (2, 2, 5, 8)), {"enable_gqa": True}),
        (((2, 3, 4, 5, 8), (2, 3, 2, 5, 8)), {"enable_gqa": True, "is_causal": True}),
        (((4, 5, 8), (4, 6, 8), (4, 6, 3)), {"scale": 0.3}),
        (((5, 8), (6, 8)), {"scale": 0.0}),
        (((1, 1, 1, 2), (1, 1, 1, 2)), {"is_causal": True, "scale": -2.0}),
    ],
)
def test_attention_without_a_given_mask(shapes: tuple[tuple[int, ...], ...], options: dict[str, Any]) -> None:
    query, key = shapes[:2]
    values = shapes[2] if len(shapes) > 2 else None
    result = apply(LegalizeAttention(), program_of(Attend(**options), operands(query, key, values)))
    assert result.rewrites == 1
    assert all(node.target is not SDPA for node in result.program.exported.graph.nodes)


def test_golden_text() -> None:
    program = program_of(Attend(is_causal=True, enable_gqa=True), operands((1, 4, 3, 8), (1, 2, 3, 8)))
    check_golden("legalize_attention", program, apply(LegalizeAttention(), program).program)


def masks(dtype: torch.dtype) -> dict[str, Tensor]:
    visible = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    visible[0, 0, 2] = False  # a row that sees nothing
    hidden = torch.zeros(2, 1, 5, 5, dtype=dtype)
    return {
        "boolean": visible,
        "infinite": hidden.masked_fill(~visible, -math.inf),
        "lowest": hidden.masked_fill(~visible, torch.finfo(dtype).min),
        "bias": torch.randn(5, 5, dtype=dtype, generator=torch.Generator().manual_seed(1)),
    }


@pytest.mark.parametrize("name", ["boolean", "infinite", "lowest", "bias"])
def test_a_mask_given_as_an_input(name: str) -> None:
    mask = masks(torch.float64)[name]
    examples = {**operands((2, 4, 5, 8), (2, 4, 5, 8)), "mask": mask}
    program = program_of(Attend(), examples)
    after = apply(LegalizeAttention(), program).program
    assert softmaxes(after) == 1
    got, want = run(after, *examples.values())[0], run(program, *examples.values())[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    if name in ("boolean", "infinite"):
        assert torch.count_nonzero(got[0, :, 2]) == 0
    assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize("name", ["boolean", "infinite"])
@pytest.mark.parametrize("empty_row", [True, False])
def test_a_constant_mask_is_masked_again_only_where_a_row_is_empty(name: str, empty_row: bool) -> None:
    mask = masks(torch.float64)[name]
    if not empty_row:
        mask[0, 0, 2] = mask[1, 0, 2]

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", mask, persistent=False)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert isinstance(self.mask, Tensor)
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

    program = program_of(Fixed(), operands((2, 4, 5, 8), (2, 4, 5, 8)))
    after = apply(LegalizeAttention(), program).program
    targets = [node.target for node in after.exported.graph.nodes if node.op == "call_function"]
    behind = targets[targets.index(aten.softmax.int) + 1]
    assert (behind is not aten.matmul.default) == empty_row


def test_causal_masks_of_one_shape_are_one_constant() -> None:
    program = canonical_pipeline().run(program_of(build(Spec(layers=3)), inputs()))
    result = apply(LegalizeAttention(), program)
    assert result.rewrites == 3
    constants = result.program.exported.constants
    assert list(constants) == ["causal_hidden_0"]
    assert torch.equal(constants["causal_hidden_0"], ~torch.ones(5, 5).tril().bool())


def test_a_mask_of_several_calls_is_inverted_once() -> None:
    class Twice(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            q = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    examples = {**operands((2, 4, 5, 8), (2, 4, 5, 8)), "mask": masks(torch.float64)["boolean"]}
    after = apply(LegalizeAttention(), program_of(Twice(), examples)).program
    assert sum(node.target is aten.logical_not.default for node in after.exported.graph.nodes) == 1


def test_attention_without_heads_to_attend_to_is_as_in_torch() -> None:
    program = program_of(Attend(is_causal=True), operands((2, 4, 7, 8), (2, 4, 3, 8)))
    assert apply(LegalizeAttention(), program).rewrites == 1


@pytest.mark.parametrize(("seed", "batch", "length"), [(0, 1, 3), (1, 3, 4), (2, 1, 1)])
def test_on_transformers_of_other_sizes(seed: int, batch: int, length: int) -> None:
    spec = Spec(attention=("causal", "mask", "causal")[seed], kv_heads=1 + seed % 2)
    program = canonical_pipeline().run(program_of(build(spec, seed=seed), inputs(batch=batch, length=length)))
    assert apply(LegalizeAttention(), program).rewrites == 2


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_narrow_dtypes_stay_finite(dtype: torch.dtype, bound: float) -> None:
    examples = {**operands((2, 4, 5, 8), (2, 4, 5, 8), dtype=dtype), "mask": masks(dtype)["boolean"]}
    result = apply(LegalizeAttention(), program_of(Attend(), examples), parity=bound)
    assert result.program.exported.graph_signature.user_outputs


def test_dropout_is_declined() -> None:
    program = program_of(Attend(dropout_p=0.25), operands((2, 4, 5, 8), (2, 4, 5, 8)))
    result = LegalizeAttention().run(program)
    assert result.program is program
    assert [decline.code for decline in result.declines] == ["legalize-attention.dropout"]
    assert result.declines[0].got == "0.25"


def _drop_mask(edit: Any) -> None:
    masked = named(edit, aten.masked_fill.Scalar)[0]
    edit.replace(masked, masked.args[0])


def _other_scale(edit: Any) -> None:
    edit.set_arg(named(edit, aten.mul.Tensor)[0], 1, 0.5)


@pytest.mark.parametrize("change", [_drop_mask, _other_scale])
def test_a_dropped_mask_or_another_scale_is_noticed(change: Any) -> None:
    program = program_of(Attend(is_causal=True), operands((2, 4, 5, 8), (2, 4, 5, 8)))
    after = apply(LegalizeAttention(), program).program
    with pytest.raises(AssertionError):
        assert_parity(program, sabotaged(after, change))
