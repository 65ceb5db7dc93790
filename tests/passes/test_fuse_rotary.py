"""Rotary positions in the spellings that models use; all arithmetic in fp32, since the operator takes no fp64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from depthwire.passes.fuse_rotary import FuseRotary
from depthwire.passes.standard import canonical_pipeline
from tests.passes.parity import apply, assert_parity, check_golden, named, sabotaged
from tests.zoo import program_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.passes._base import PassResult
    from depthwire.program import Program

aten = torch.ops.aten
# The operator makes the same products and one sum of them: a few roundings at 6e-8 each.
FP32 = 5e-7


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama and most others: the pairs lie half the width apart."""
    middle = x.shape[-1] // 2
    turned = torch.cat((-x[..., middle:], x[..., :middle]), dim=-1)
    return x * torch.cat((cos, cos), -1) + turned * torch.cat((sin, sin), -1)


def chunks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """gpt-oss: tables of half the width."""
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-J: the pairs lie side by side."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return turned * sin.repeat_interleave(2, -1) + x * cos.repeat_interleave(2, -1)


def real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama's own code, in real arithmetic: an axis of two, taken apart and put together."""
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).reshape(x.shape)


def rolled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The two halves exchanged by ``roll``, the sign in the table."""
    return torch.cat((cos, cos), -1) * x + torch.cat((-sin, sin), -1) * x.roll(x.shape[-1] // 2, -1)


def backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A rotation by the negative angle, and a sum the other way round."""
    first, second = torch.split(x, x.shape[-1] // 2, dim=-1)
    return torch.cat((second, -first), -1) * torch.cat((sin, sin), -1) + x * torch.cat((cos, cos), -1)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-NeoX: the first features turn, the others pass through."""
    width = 2 * cos.shape[-1]
    return torch.cat((half(x[..., :width], cos, sin), x[..., width:]), dim=-1)


def partial_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-J, where it turns the first features only."""
    width = 2 * cos.shape[-1]
    return torch.cat((pairs(x[..., :width], cos, sin), x[..., width:]), dim=-1)


WHOLE = (half, chunks, pairs, real, rolled, backwards)
INTERLEAVED = (pairs, real, partial_pairs)


class Rotate(nn.Module):
    """``x [B, T, H·D]`` to rotated heads ``[B, H, T, D]`` (or ``[B, T, H, D]``), by a table ``[T, pairs]``."""

    def __init__(
        self,
        spell: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        length: int = 5,
        heads: int = 3,
        width: int = 8,
        rotated: int | None = None,
        behind: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.spell, self.heads, self.width, self.behind = spell, heads, width, behind
        rotated = rotated or width
        frequencies = 100.0 ** -(torch.arange(0, rotated, 2) / rotated)
        angles = torch.arange(length)[:, None] * frequencies
        table = (None, None) if behind else (None, slice(None), None)
        self.register_buffer("cos", (angles.cos() * scale)[table], persistent=False)
        self.register_buffer("sin", (angles.sin() * scale)[table], persistent=False)
        self.project = nn.Linear(heads * width, heads * width)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.cos, Tensor)
        assert isinstance(self.sin, Tensor)
        heads = self.project(x).view(*x.shape[:2], self.heads, self.width)
        heads = heads.transpose(1, 2) if self.behind else heads
        return self.spell(heads, self.cos.to(x.dtype), self.sin.to(x.dtype)).tanh()


def captured(module: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    return canonical_pipeline().run(program_of(module.to(dtype), torch.randn(shape).to(dtype)))


def rotations(program: Program) -> list[torch.fx.Node]:
    return [node for node in program.exported.graph.nodes if str(node.target) == "onnx.RotaryEmbedding.opset23"]


def fused(program: Program, parity: float = FP32) -> PassResult:
    """Apply the pass; check that it left one operator and nothing of the spelling."""
    result = apply(FuseRotary(), program, parity=parity)
    assert result.rewrites == len(rotations(result.program)) == 1
    left = {node.target for node in result.program.exported.graph.nodes if node.op == "call_function"}
    assert left <= {
        aten.linear.default,
        aten.reshape.default,
        aten.transpose.int,
        aten.tanh.default,
        *_operators(result),
    }
    return result


def _operators(result: PassResult) -> set[Any]:
    return {node.target for node in rotations(result.program)}


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("spell", WHOLE)
def test_every_spelling_becomes_one_operator(spell: Any, behind: bool) -> None:
    result = fused(captured(Rotate(spell, behind=behind), 2, 5, 24))
    node = rotations(result.program)[0]
    assert node.kwargs.get("interleaved", False) == (spell in INTERLEAVED)
    assert node.kwargs.get("num_heads", 0) == (0 if behind else 3)
    assert node.args[0].meta["val"].dim() == (4 if behind else 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("spell", [partial, partial_pairs])
@pytest.mark.parametrize("rotated", [4, 2])
def test_a_partial_rotation_is_one_operator(spell: Any, rotated: int) -> None:
    node = rotations(fused(captured(Rotate(spell, rotated=rotated), 2, 5, 24)).program)[0]
    assert node.kwargs["rotary_embedding_dim"] == rotated


def test_golden_text() -> None:
    program = captured(Rotate(half), 1, 5, 24)
    check_golden("fuse_rotary", program, apply(FuseRotary(), program, parity=FP32).program)


def test_golden_text_of_heads_behind_the_sequence() -> None:
    program = captured(Rotate(partial_pairs, behind=False, rotated=4), 1, 5, 24)
    check_golden("fuse_rotary_partial", program, apply(FuseRotary(), program, parity=FP32).program)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "width"), [(1, 1, 1, 2), (3, 2, 1, 6), (1, 7, 4, 2), (2, 3, 3, 64)]
)
@pytest.mark.parametrize("spell", [half, real])
def test_other_sizes(spell: Any, batch: int, length: int, heads: int, width: int) -> None:
    module = Rotate(spell, length=length + 1, heads=heads, width=width)
    module.cos, module.sin = module.cos[..., 1:, :], module.sin[..., 1:, :]  # type: ignore[index]
    fused(captured(module, batch, length, heads * width))


def test_scaled_tables_and_three_axes() -> None:
    fused(captured(Rotate(half, scale=1.3), 2, 5, 24))

    class Flat(Rotate):
        def forward(self, x: Tensor) -> Tensor:
            return self.spell(self.project(x), self.cos[0, 0], self.sin[0, 0]).tanh()  # type: ignore[index]

    node = rotations(fused(captured(Flat(half, heads=1), 2, 5, 8)).program)[0]
    assert node.kwargs == {"num_heads": 1}


def test_queries_and_keys_taken_from_one_product_share_their_tables() -> None:
    class Both(Rotate):
        def forward(self, x: Tensor) -> Tensor:
            q, k = self.project(x).view(*x.shape[:2], 2, 24).transpose(1, 2).split((8, 16), dim=-1)
            parts = [self.spell(part, self.cos, self.sin) for part in (q, *k.chunk(2, -1))]  # type: ignore[arg-type]
            return torch.cat(parts, -1).tanh()

    result = apply(FuseRotary(), captured(Both(half, heads=6), 2, 5, 48), parity=FP32)
    assert result.rewrites == 3
    tables = [name for name in result.program.exported.constants if name.startswith("rotary")]
    assert tables == ["rotary_0", "rotary_1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_round_as_before(dtype: torch.dtype) -> None:
    fused(captured(Rotate(half), 2, 5, 24, dtype=dtype), parity=0.0)


def test_a_position_where_nothing_turns_is_no_rotation() -> None:
    program = captured(Rotate(half, length=1), 2, 1, 24)
    assert FuseRotary().run(program).program is program


class Other(nn.Module):
    """``x · c + turned(x) · s`` with tables of any shape."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.cos, Tensor)
        assert isinstance(self.sin, Tensor)
        turned = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
        return x * self.cos + turned * self.sin


@pytest.mark.parametrize(
    ("code", "table", "shape", "dtype", "got"),
    [
        ("pairs", (5, 8), (2, 3, 5, 8), torch.float32, "several"),
        ("layout", (3, 5, 4), (2, 3, 5, 8), torch.float32, "[2, 3, 5, 8] and a table [1, 3, 5, 4]"),
        ("layout", (5, 4), (2, 2, 3, 5, 8), torch.float32, "[2, 2, 3, 5, 8] and a table [1, 1, 1, 5, 4]"),
        ("dtype", (5, 4), (2, 3, 5, 8), torch.float64, "torch.float64"),
        ("dtype", (5, 4), (2, 3, 5, 8), torch.bfloat16, "torch.bfloat16, torch.float32"),
    ],
)
def test_what_the_operator_cannot_say_is_declined(
    code: str, table: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, got: str
) -> None:
    tables = torch.rand(2, *table).to(torch.promote_types(dtype, torch.float32))
    cos, sin = tables if table[-1] == 8 else torch.cat((tables, tables), -1)
    program = captured(Other(cos, sin), *shape, dtype=dtype) if dtype != torch.bfloat16 else _narrow(cos, sin, shape)
    result = FuseRotary().run(program)
    assert result.program is program
    assert [decline.code for decline in result.declines] == [f"fuse-rotary.{code}"]
    assert result.declines[0].got == got


def _narrow(cos: Tensor, sin: Tensor, shape: tuple[int, ...]) -> Program:
    return canonical_pipeline().run(program_of(Other(cos, sin), torch.randn(shape).to(torch.bfloat16)))


@pytest.mark.parametrize("what", ["angles", "sign", "third"])
def test_what_is_no_rotation_is_left_alone(what: str) -> None:
    class Module(Rotate):
        def forward(self, x: Tensor) -> Tensor:
            x = self.project(x)
            angles = x.sum() if what == "angles" else torch.ones(())
            signed = x[..., 4:] if what == "sign" else -x[..., 4:]
            turned = torch.cat((signed, x[..., :4]), -1)
            rotated = x * 0.5 + turned * (angles * 0.25)
            return rotated + x.roll(1, -1) * 0.5 if what == "third" else rotated

    program = captured(Module(half, heads=1), 2, 5, 8)
    result = FuseRotary().run(program)
    if what == "sign":
        assert [decline.code for decline in result.declines] == ["fuse-rotary.pairs"]
    assert result.rewrites == (what == "third")  # the rotation inside is one


def _other_angle(edit: Any) -> None:
    rotary = edit.graph.find_nodes(op="call_function", target=torch.ops.onnx.RotaryEmbedding.opset23)[0]
    edit.set_arg(rotary, 2, rotary.args[1])


def _other_pairs(edit: Any) -> None:
    edit.set_arg(named(edit, torch.ops.onnx.RotaryEmbedding.opset23)[0], "interleaved", value=True)


@pytest.mark.parametrize("change", [_other_angle, _other_pairs])
def test_another_angle_or_other_pairs_are_noticed(change: Any) -> None:
    program = captured(Rotate(half), 2, 5, 24)
    after = apply(FuseRotary(), program, parity=FP32).program
    with pytest.raises(AssertionError):
        assert_parity(program, sabotaged(after, change), bound=FP32)
