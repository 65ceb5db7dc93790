from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.residual_stream import find_residual_stream
from depthwire.passes.lift_attn_res import READ, LiftAttnRes
from depthwire.passes.partition import Partition
from depthwire.passes.queries import QUERY_PREFIX
from depthwire.passes.standard import canonical_pipeline, standard_pipeline
from tests.passes.parity import FP64, assert_parity, error, node_values, run, runner, sources_of
from tests.property.strategies import fixed, specs
from tests.zoo import Spec, Transformer, build, captured, inputs, program_of, truth

if TYPE_CHECKING:
    from torch import Tensor

    from depthwire.program import Program

Correction = Literal["eps", "scale"]
PARTITIONS = ("full", "block:1", "block:2", "block-layers:1", "block-layers:2")


def read(query: Tensor, sources: list[Tensor], eps: float) -> Tensor:
    """h = sum_i softmax_i(w . RMSNorm(v_i)) v_i (arXiv 2603.15031, section 3)."""
    logits = [(source / (source.pow(2).mean(-1) + eps).sqrt()[..., None]) @ query for source in sources]
    largest = torch.stack(logits).amax(0)
    powers = [(logit - largest).exp() for logit in logits]
    total = sum(powers)
    return sum((power / total)[..., None] * source for power, source in zip(powers, sources, strict=True))  # type: ignore[return-value]


def block_starts(kinds: tuple[str, ...], partition: str) -> list[bool]:
    """Which sublayers a block starts with, by the definitions of Full and Block AttnRes."""
    mode, _, size = partition.partition(":")
    if mode == "full":
        return [True] * len(kinds)
    if mode == "block":
        edges = [math.floor(len(kinds) * number / int(size)) for number in range(int(size))]
        return [index in edges for index in range(len(kinds))]
    layer = [sum(kind != "mlp" for kind in kinds[: index + 1]) - 1 for index in range(len(kinds))]
    return [kind != "mlp" and layer[index] % int(size) == 0 for index, kind in enumerate(kinds)]


def attn_res(
    model: Transformer, ids: Tensor, partition: str, queries: dict[int, Tensor], correction: Correction
) -> list[Tensor]:
    """The model with Attention Residuals, written out: bank of completed blocks, and the open block's partial sum."""
    spec = model.spec
    starts = block_starts(truth(spec).kinds, partition)
    norm_eps = torch.finfo(torch.float64).eps if spec.eps is None else spec.eps
    bank: list[Tensor] = [model.embedding(ids)]
    partial: Tensor | None = None
    extra: list[Tensor] = []
    index = 0

    def mixed() -> tuple[Tensor, float]:
        sources = bank if partial is None else [*bank, partial]
        if len(sources) == 1:
            return sources[0], 1.0
        h = read(queries[index], sources, norm_eps)
        return (h, float(len(sources) ** 2)) if correction == "eps" else (h * len(sources), 1.0)

    for position, layer in enumerate(model.blocks()):
        for step in layer.steps():
            if starts[index] and partial is not None:
                bank, partial = [*bank, partial], None
            h, shrink = mixed()
            if position == 1 and step is not None and not extra:
                extra = model.extras(h, shrink)
            bank = [source * spec.skip_scale for source in bank]
            partial = None if partial is None else partial * spec.skip_scale
            for branch in layer.branches(step, h, shrink):
                written = branch * 0.5 if spec.branch_scale == "alpha" else branch
                partial = written if partial is None else partial + written
            index += 1
    h, shrink = mixed()
    h = h[:, -1:] if spec.cut == "stream" else h
    h = model.norm(h, shrink)
    h = h[:, -1] if spec.cut == "norm" else h
    return [model.head(h), *extra]


def lift(program: Program, partition: str, correction: Correction) -> Program:
    return Pipeline((LiftAttnRes(Partition.parse(partition), correction),)).run(program)


def reads(program: Program) -> dict[int, torch.fx.Node]:
    found = [node for node in program.exported.graph.nodes if node.target is READ]
    return {int(node.name.rpartition("_")[2]): node for node in found}


def with_random_queries(program: Program) -> tuple[Program, dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    trained = {
        key: torch.randn(old.shape, dtype=old.dtype, generator=generator)
        for key, old in program.exported.state_dict.items()
        if key.startswith(QUERY_PREFIX)
    }
    queries = {int(key.removeprefix(QUERY_PREFIX)): query for key, query in trained.items()}
    return program.with_state({**program.exported.state_dict, **trained}), queries


def check_sources(canonical: Program, lifted: Program, spec: Spec, partition: str) -> None:
    """Every writer's value is in exactly one source of every later read: the sources sum to the stream."""
    stream = find_residual_stream(canonical)
    ids = inputs(seed=5)
    before, after = node_values(canonical, ids), node_values(lifted, ids)
    starts = block_starts(truth(spec).kinds, partition)
    found = reads(lifted)
    assert sorted(found) == list(range(1, len(stream.states)))
    for index, node in found.items():
        sources = [after[source.name] for source in sources_of(node)]
        assert len(sources) == 1 + sum(starts[:index])
        torch.testing.assert_close(sum(sources), before[stream.states[index].node.name], rtol=0, atol=1e-11)
        if spec.skip_scale == 1.0 and not spec.flat_mlp:
            assert torch.equal(sources[0], before[stream.origin.name])


@fixed(14)
@given(
    spec=specs(liftable=True),
    partition=st.sampled_from(PARTITIONS),
    correction=st.sampled_from(["eps", "scale"]),
)
def test_a_lift_preserves_the_function(spec: Spec, partition: str, correction: Correction) -> None:
    model, program = captured(spec)
    canonical = canonical_pipeline().run(program)
    lifted = lift(canonical, partition, correction)
    assert_parity(program, lifted)
    check_sources(canonical, lifted, spec, partition)
    again = canonical_pipeline().run(lifted)
    assert [record.rewrites for record in again.history[-4:]] == [0, 0, 0, 0]

    trained, queries = with_random_queries(lifted)
    ids = inputs(seed=9)
    with torch.no_grad():
        expected, standard = attn_res(model, ids, partition, queries, correction), list(model(ids))
    got = run(trained, ids)
    assert error(got, expected) <= FP64
    assert error(got, standard) > 1e-4


@fixed(5)
@given(spec=specs(liftable=True), partition=st.sampled_from(PARTITIONS))
def test_the_standard_pipeline_keeps_fp32_to_rounding(spec: Spec, partition: str) -> None:
    double = build(spec)
    single = build(spec, dtype=torch.float64).float()
    program = program_of(single, inputs())
    lifted = standard_pipeline(attn_res=partition).run(program)
    before, after = runner(program), runner(lifted)
    for seed in range(3):
        ids = inputs(seed=seed)
        with torch.no_grad():
            exact = list(double(ids))
        bound = 8 * error(before(ids), exact) + 32 * torch.finfo(torch.float32).eps
        assert error(after(ids), exact) <= bound


@pytest.mark.parametrize("block", ["sequential", "parallel-two"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_source_counts_of_layer_blocks(block: Literal["sequential", "parallel-two"], size: int) -> None:
    layers = 5
    _, program = captured(Spec(layers=layers, block=block))
    found = reads(lift(program, f"block-layers:{size}", "eps"))
    counts = {index: len(sources_of(node)) for index, node in found.items()}
    per_layer = 2 if block == "sequential" else 1
    expected = {per_layer * layer: math.ceil(layer / size) + 1 for layer in range(1, layers)}
    if per_layer == 2:
        expected |= {2 * layer + 1: layer // size + 2 for layer in range(layers)}
    expected[per_layer * layers] = math.ceil(layers / size) + 1
    assert counts == expected


@pytest.mark.parametrize(("count", "blocks"), [(4, 1), (4, 3), (6, 4), (6, 6)])
def test_source_counts_of_blocks(count: int, blocks: int) -> None:
    _, program = captured(Spec(layers=count // 2))
    found = reads(lift(program, f"block:{blocks}", "eps"))
    starts = [number * count // blocks for number in range(blocks)]
    assert {index: len(sources_of(node)) for index, node in found.items()} == {
        index: 1 + sum(start < index for start in starts) for index in range(1, count + 1)
    }


def test_full_is_a_block_per_sublayer() -> None:
    _, program = captured(Spec())
    full, blocks = lift(program, "full", "eps"), lift(program, "block:4", "eps")
    ids = inputs()
    trained = [run(with_random_queries(lifted)[0], ids) for lifted in (full, blocks)]
    assert all(torch.equal(*pair) for pair in zip(*trained, strict=True))


def test_the_reference_without_reads_is_the_model() -> None:
    spec = dataclasses.replace(Spec(), skip_scale=0.5, branch_scale="vector")
    model = build(spec)
    ids = inputs()
    zeros = {index: torch.zeros(16, dtype=torch.float64) for index in range(1, 5)}
    with torch.no_grad():
        assert error(attn_res(model, ids, "full", zeros, "eps"), list(model(ids))) <= FP64
