"""Streams that are easy to get wrong, each either lifted with its function kept or refused with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from depthwire.errors import PassError
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.residual_stream import find_residual_stream
from depthwire.passes.lift_attn_res import READ, LiftAttnRes
from depthwire.passes.partition import Partition
from depthwire.passes.standard import canonical_pipeline
from tests.passes.parity import assert_parity, sources_of
from tests.zoo import program_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.program import Program

D, T = 8, 4


def norm(x: Tensor, eps: float = 0.1) -> Tensor:
    return functional.rms_norm(x, (D,), None, eps)


class Base(nn.Module):
    """Three residual additions around small MLPs; subclasses say how."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D)) for _ in range(4))
        self.out = nn.Linear(D, 5)
        self.gate = nn.Parameter(torch.rand(D))
        self.register_buffer("picks", torch.tensor([0, 2]))

    def body(self, x: Tensor, start: int = 0, count: int = 3) -> Tensor:
        for index in range(start, start + count):
            x = x + self.f[index](norm(x))
        return x


def program(module: nn.Module, *shape: int, dtype: torch.dtype = torch.float64) -> Program:
    torch.manual_seed(1)
    return program_of(module.to(dtype), {"x": torch.randn(*(shape or (2, T, D)), dtype=dtype)})


def lift(given: Program, partition: str = "full", reads: int | None = None) -> Program:
    """Lift the program with each correction, canonical first or not, and check that the function is kept."""
    eps = LiftAttnRes(Partition.parse(partition))
    scale = LiftAttnRes(Partition.parse(partition), "scale")
    assert_parity(given, Pipeline((eps,)).run(given))
    assert_parity(given, Pipeline((*canonical_pipeline().passes, eps)).run(given))
    after = Pipeline((*canonical_pipeline().passes, scale)).run(given)
    assert_parity(given, after)
    if reads is not None:
        assert sum(node.target is READ for node in after.exported.graph.nodes) == reads
    return after


def refuse(given: Program) -> PassError:
    with pytest.raises(PassError) as caught:
        Pipeline((*canonical_pipeline().passes, LiftAttnRes())).run(given)
    return caught.value


# Lifted


class Picks(Base):
    """The last norm reads rows picked in two steps."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        assert isinstance(self.picks, Tensor)
        return self.out(norm(x[:, 1:][:, self.picks]))  # type: ignore[no-any-return]


class Steps(Base):
    """The stream is cut to the last token on the way, skip path included."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x, 0, 2)
        x = x[:, -1:] + self.f[2](norm(x))[:, -1:]
        return self.out(norm(x + self.f[3](norm(x))))  # type: ignore[no-any-return]


class Turned(Base):
    """The stream is turned to [T, B, d] and back, flattened, and scaled on the way."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        x = x + self.f[0](norm(x))
        x = x.permute(1, 0, 2)
        x = x + self.f[1](norm(x))
        x = (x * 0.5).flatten(0, 1)
        x = x + self.f[2](norm(x))
        return self.out(norm(x / 4.0))  # type: ignore[no-any-return]


class Shapes(Base):
    """Something takes the stream's shape and dtype, not its values."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.out(norm(x)) + torch.zeros_like(x)[..., :5] + x.new_ones(5)  # type: ignore[no-any-return]


class OriginRead(Base):
    """The embedding is read without a norm, as a value and as an output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        start = x * 4.0
        x = start + self.f[0](start)
        x = self.body(x, 1, 2)
        return self.out(norm(x)) + self.out(start), start


class OriginAgain(Base):
    """The embedding is written onto the stream a second time."""

    def forward(self, x: Tensor) -> Tensor:
        start = torch.tanh(x)
        x = self.body(start, 0, 1)
        before = norm(x)
        x = x + start
        return self.out(norm(x + self.f[1](norm(x))) + before)  # type: ignore[no-any-return]


class TwoNorms(Base):
    """A norm behind a norm, and a state that two norms read through one cast."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(norm(norm(x)), 0, 2)
        wide = x.to(torch.float64)
        x = x + self.f[2](norm(wide).to(x.dtype)) + self.f[3](norm(wide, 1e-3).to(x.dtype))
        return self.out(norm(norm(x)))  # type: ignore[no-any-return]


class SideStream(Base):
    """A short stream of its own inside one branch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        y = norm(x)
        y = y + self.f[3](y)
        return self.out(norm(x + y))  # type: ignore[no-any-return]


class Experts(Base):
    """Each expert adds its share to the stream itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x, 0, 2)
        y, weights = norm(x), self.out(norm(x)).softmax(-1)
        for index, expert in enumerate(self.f):
            x = x + weights[..., index : index + 1] * expert(y)
        return self.out(norm(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("module", "reads"),
    [
        (Picks, 3),
        (Steps, 4),
        (Turned, 3),
        (Shapes, 3),
        (OriginRead, 3),
        (OriginAgain, 3),
        (TwoNorms, 3),
        (SideStream, 4),
        (Experts, 3),
    ],
)
@pytest.mark.parametrize("partition", ["full", "block:2"])
def test_lifted(module: Callable[[], nn.Module], reads: int, partition: str) -> None:
    lift(program(module()), partition, reads)


def test_the_stream_may_be_wider_than_its_origin_and_its_branches() -> None:
    class Wide(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = x.to(torch.float32)
            for index in range(2):
                x = x + self.f[index](norm(x).to(torch.bfloat16))
            x = x.to(torch.float64)
            x = x + self.f[2](norm(x).to(torch.bfloat16)).to(torch.float32)
            return norm(x)

    given = program(Wide(), dtype=torch.bfloat16)
    for correction in ("eps", "scale"):
        step = LiftAttnRes(Partition.parse("full"), correction)
        after = Pipeline((*canonical_pipeline().passes, step)).run(given)
        assert_parity(given, after, bound=2e-2)  # a bf16 branch may round the other way
        reads = [node for node in after.exported.graph.nodes if node.target is READ]
        assert [node.meta["val"].dtype for node in reads] == [torch.float32, torch.float32, torch.float64]
        assert [list(dict.fromkeys(source.meta["val"].dtype for source in sources_of(read))) for read in reads] == [
            [torch.float32],
            [torch.float32],
            [torch.float64],
        ]


def test_factors_are_reported_and_applied_once() -> None:
    class Scaled(Base):
        def forward(self, x: Tensor) -> Tensor:
            for index in range(3):
                x = torch.add(self.f[index](norm(x)) * 0.25, x * 2.0, alpha=-0.5)
            return norm(x)

    given = program(Scaled())
    writes = [write for sublayer in find_residual_stream(given).sublayers for write in sublayer.writes]
    assert [(write.scale, write.skip_scale) for write in writes] == [(0.25, -1.0)] * 3
    lift(given, reads=3)


def test_a_model_taken_apart_into_core_operators() -> None:
    class Native(Base):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(D, eps=0.1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for index in range(3):
                x = x + self.f[index](self.norms[index](x))
            return self.out(self.norms[3](x))  # type: ignore[no-any-return]

    given = program(Native())
    taken = given.replace(exported=given.exported.run_decompositions())
    targets = {node.target for node in taken.exported.graph.nodes}
    assert torch.ops.aten.native_layer_norm.default in targets
    lift(taken, reads=3)


# Refused


class SharedCast(Base):
    """A router reads the raw stream through the cast that the norm uses."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        wide = x.to(torch.float32)
        return functional.rms_norm(wide, (D,), None, 0.1) + wide.tanh()


class Leak(Base):
    """The norm's root mean square scales something else as well."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)
        return self.out(x * rstd) * rstd  # type: ignore[no-any-return]


class Early(Base):
    """An early state is added to a late one."""

    def forward(self, x: Tensor) -> Tensor:
        early = self.body(x, 0, 1)
        return norm(self.body(early, 1, 2) + early)


class WrongAxis(Base):
    """A mean without its axis, which broadcasts over the wrong one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        variance = (x - x.mean(-1)).pow(2).mean(-1, keepdim=True)
        return (x - x.mean(-1)) * torch.rsqrt(variance + 0.1)


class Unbiased(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 0.1)


class Outside(Base):
    """eps is added behind the root."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 0.1)


class TwoAxes(Base):
    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(self.body(x), (T, D))


class Pooled(Base):
    def forward(self, x: Tensor) -> Tensor:
        return norm(self.body(x).mean(1))


@pytest.mark.parametrize(
    ("module", "shape", "reader"),
    [
        (SharedCast, (), "tanh"),
        (Leak, (), "pow_1"),
        (Early, (), "add_3"),
        (WrongAxis, (D, D), "mean"),
        (Unbiased, (), "mean"),
        (Outside, (), "pow_1"),
        (TwoAxes, (), "layer_norm"),
        (Pooled, (), "mean"),
    ],
)
def test_un_normed_readers(module: Callable[[], nn.Module], shape: tuple[int, ...], reader: str) -> None:
    refused = refuse(program(module(), *shape))
    assert refused.code == "structure.un-normed-reader"
    assert reader in str(refused.got)


class LearnedSkip(Base):
    def forward(self, x: Tensor) -> Tensor:
        for index in range(3):
            x = x * self.gate + self.f[index](norm(x))
        return norm(x)


class Vanishing(Base):
    """Neither the branch nor the skip is really there."""

    def forward(self, x: Tensor) -> Tensor:
        for index in range(3):
            x = torch.add(x, self.f[index](norm(x)), alpha=0.0)
            x = x * 0.0 + self.f[index](norm(x))
        return norm(x)


class Gates(Base):
    """Activations that look like additions onto a stream."""

    def forward(self, x: Tensor) -> Tensor:
        for index in range(3):
            x = self.f[index](norm(x))
            x = x + 0.044715 * x.pow(3)
        return norm(x)


@pytest.mark.parametrize("module", [LearnedSkip, Vanishing, Gates])
def test_no_stream(module: Callable[[], nn.Module]) -> None:
    assert refuse(program(module())).code == "structure.no-residual-stream"


def test_the_structure_as_json() -> None:
    stream = find_residual_stream(program(Picks())).as_dict()
    assert stream["width"] == D
    assert stream["streams"] == 1
    assert [sublayer["kind"] for sublayer in stream["sublayers"]] == ["mlp"] * 3
    assert stream["sublayers"][0]["norms"][0]["eps"] == 0.1
    assert stream["final"]["norms"][0]["kind"] == "rms"
    assert stream["breaks"] == []
