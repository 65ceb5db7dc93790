"""What a sublayer is: attention over itself or a memory, an MLP or experts, or neither."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.residual_stream import find_residual_stream
from depthwire.passes.lift_attn_res import READ, LiftAttnRes
from depthwire.passes.partition import Partition
from depthwire.passes.standard import canonical_pipeline
from tests.passes.parity import assert_parity, sources_of
from tests.zoo import program_of

D, T = 8, 4


def norm(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (D,), None, 0.1)


class Heads(nn.Module):
    """Attention spelled out, over itself or over a memory."""

    def __init__(self, *, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        source = memory if self.cross else x
        scores = torch.tanh(self.q(x) @ self.k(source).transpose(-2, -1) / 2.0) * 5.0
        sink = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)
        values: Tensor = self.v(source)
        return sink.softmax(-1)[..., :-1] @ values


class Soft(nn.Module):
    """A dense mixture of experts, whose softmax weighs products as attention's does."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 3)
        self.experts = nn.Parameter(torch.randn(3, D, D) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bte,bted->btd", self.router(x).softmax(-1), torch.einsum("btd,edf->btef", x, self.experts))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.self_attention = nn.ModuleList(Heads(cross=False) for _ in range(2))
        self.cross_attention = nn.ModuleList(Heads(cross=True) for _ in range(2))
        self.experts = nn.ModuleList(Soft() for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for first, second, third in zip(self.self_attention, self.cross_attention, self.experts, strict=True):
            x = x + first(norm(x), memory)
            x = x + second(norm(x), memory)
            x = x + third(norm(x))
        return norm(x)


def test_kinds_of_a_decoder_with_a_memory() -> None:
    torch.manual_seed(0)
    examples = {name: torch.randn(2, T, D, dtype=torch.float64) for name in ("x", "memory")}
    given = program_of(Decoder().double(), examples)
    stream = find_residual_stream(given)
    assert [sublayer.kind for sublayer in stream.sublayers] == ["attention", "attention", "mlp"] * 2
    modules = [f"{part}.{layer}" for layer in range(2) for part in ("self_attention", "cross_attention", "experts")]
    assert [sublayer.module for sublayer in stream.sublayers] == modules
    lift = LiftAttnRes(Partition.parse("block-layers:1"))
    after = Pipeline((*canonical_pipeline().passes, lift)).run(given)
    assert_parity(given, after)
    reads = [node for node in after.exported.graph.nodes if node.target is READ]
    assert [len(sources_of(read)) for read in reads] == [2, 2, 2, 3, 3, 3]


def test_a_sublayer_without_weights_is_other() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + norm(x).tanh()
            return norm(x + norm(x).cumsum(1))

    stream = find_residual_stream(program_of(Plain(), {"x": torch.randn(2, T, D)}))
    assert [sublayer.kind for sublayer in stream.sublayers] == ["other", "other"]
