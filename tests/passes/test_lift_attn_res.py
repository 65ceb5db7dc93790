from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch import Tensor, nn

from depthwire.errors import PassError, UsageError
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.lift_attn_res import READ, LiftAttnRes
from depthwire.passes.partition import Partition
from depthwire.passes.standard import canonical_pipeline
from tests.passes.parity import apply, assert_parity, check_golden, error, named, run, sabotaged, sources_of
from tests.zoo import NORMS, NormKind, Spec, build, captured, inputs, program_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.passes._edit import GraphEditor
    from depthwire.program import Program

aten = torch.ops.aten


@functools.lru_cache(maxsize=32)
def lifted(spec: Spec, step: LiftAttnRes) -> tuple[Program, Program]:
    _, program = captured(spec)
    return program, Pipeline((*canonical_pipeline().passes, step)).run(program)


@pytest.mark.parametrize(("name", "correction"), [("lift_attn_res", "eps"), ("lift_attn_res_scale", "scale")])
def test_golden_text(name: str, correction: Literal["eps", "scale"]) -> None:
    program = canonical_pipeline().run(program_of(build(Spec(layers=1, mlp="gelu", tied=True)), inputs()))
    check_golden(name, program, apply(LiftAttnRes(correction=correction), program).program)


@pytest.mark.parametrize(("seed", "batch", "length"), [(0, 1, 3), (1, 3, 4), (2, 2, 7)])
def test_other_sizes(seed: int, batch: int, length: int) -> None:
    model = build(Spec(block=("sequential", "parallel-one", "parallel-two")[seed], positions=True), seed=seed)
    program = canonical_pipeline().run(program_of(model, inputs(batch=batch, length=length)))
    for partition in ("full", "block:2", "block-layers:1"):
        assert apply(LiftAttnRes(Partition.parse(partition)), program).rewrites > 0


@pytest.mark.parametrize(
    ("kind", "correction"), [*((kind, "eps") for kind in NORMS), ("rms-hf", "scale"), ("layer-var", "scale")]
)
def test_spelled_norms_without_fusion(kind: NormKind, correction: Literal["eps", "scale"]) -> None:
    _, program = captured(Spec(norm=kind, eps=0.1))
    assert apply(LiftAttnRes(correction=correction), program).rewrites == 4


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.bfloat16) for kind in ("rms", "rms-hf", "rms-gemma", "rms-narrow", "layer", "layer-var")),
        ("rms-hf", torch.float16),
        ("layer", torch.float16),
    ],
)
def test_narrow_models_keep_their_casts(kind: NormKind, dtype: torch.dtype) -> None:
    program = program_of(build(Spec(norm=kind), dtype=dtype), inputs())
    step = LiftAttnRes(Partition.parse("block:2"))
    after = Pipeline((*canonical_pipeline().passes, step)).run(program)
    (declines,) = (record.declines for record in after.history if record.name == "fuse_norm")
    assert {decline["code"] for decline in declines} <= {"fuse-norm.mixed-dtype"}
    assert (len(declines) == 5) == (kind not in ("rms", "layer"))
    reads = [node for node in after.exported.graph.nodes if node.target is READ]
    assert [node.meta["val"].dtype for node in reads] == [dtype] * 4
    ids = inputs(seed=4)
    with torch.no_grad():
        exact = list(build(Spec(norm=kind), dtype=dtype).double()(ids))
    assert error(run(after, ids), exact) < 2.5 * error(run(program, ids), exact) + torch.finfo(dtype).eps


def test_a_second_lift_is_refused() -> None:
    _, after = lifted(Spec(), LiftAttnRes())
    with pytest.raises(PassError) as caught:
        LiftAttnRes().run(after)
    assert caught.value.code == "attn-res.already-lifted"
    assert caught.value.at is not None
    assert "attn_res_read_1" in caught.value.at


@pytest.mark.parametrize(
    ("spec", "code", "at"),
    [
        (Spec(placement="post"), "structure.post-norm", "layers.0.norm_3"),
        (Spec(placement="inside"), "structure.un-normed-reader", "layers.0.mlp.up"),
        (Spec(raw_reader="probe"), "structure.un-normed-reader", "probe"),
        (Spec(raw_reader="output"), "structure.stream-is-output", "layers.0"),
    ],
)
def test_a_stream_that_something_else_than_a_norm_reads_is_refused(spec: Spec, code: str, at: str) -> None:
    _, program = captured(spec)
    with pytest.raises(PassError) as caught:
        LiftAttnRes().run(program)
    assert caught.value.code == code
    assert str(caught.value.at).partition(" (")[0] == at
    assert "export this one without --attn-res" in str(caught.value.todo)


def test_a_model_without_a_stream_is_refused() -> None:
    program = program_of(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(PassError) as caught:
        LiftAttnRes().run(program)
    assert caught.value.code == "structure.no-residual-stream"


def test_two_streams_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = build(Spec()), build(Spec(layers=3))

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(ids)[0], self.right(ids)[0]

    with pytest.raises(PassError) as caught:
        LiftAttnRes().run(program_of(Two().double(), inputs()))
    assert caught.value.code == "structure.several-streams"
    assert caught.value.got == "2 streams"


@pytest.mark.parametrize("text", ["", "full:1", "block", "block:", "block:0", "block:-1", "block:1.5", "layers:2", "8"])
def test_partitions_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Partition.parse(text)
    assert caught.value.code == "attn-res.bad-partition"
    assert caught.value.got == text


@pytest.mark.parametrize("text", ["full", "block:8", "block-layers:12"])
def test_partitions_print_as_they_are_read(text: str) -> None:
    assert str(Partition.parse(text)) == text


@pytest.mark.parametrize("text", ["block:5", "block-layers:3"])
def test_more_blocks_than_the_model_has_are_refused(text: str) -> None:
    with pytest.raises(PassError) as caught:
        lifted(Spec(), LiftAttnRes(Partition.parse(text)))
    assert caught.value.code == "attn-res.too-many-blocks"
    assert caught.value.got == text


def test_layers_are_counted_by_attention() -> None:
    with pytest.raises(PassError) as caught:
        Partition.parse("block-layers:1").starts(["mlp", "other"])
    assert caught.value.code == "attn-res.no-layers"
    starts = Partition.parse("block-layers:2").starts
    assert starts(["attention", "mlp"] * 3) == [True, False, False, False, True, False]
    assert starts(["attention", "attention", "mlp"] * 3) == [True, *[False] * 5, True, False, False]
    assert starts(["attention"] * 3) == [True, False, True]
    assert starts(["mlp", "parallel", "parallel", "parallel"]) == [True, True, False, True]


def test_ensures_names_what_is_wrong() -> None:
    _, after = lifted(Spec(), LiftAttnRes())
    assert LiftAttnRes().ensures(after) == []

    def share(edit: GraphEditor) -> None:
        first, second = named(edit, READ)[:2]
        edit.set_arg(second, 0, first.args[0])

    def twice(edit: GraphEditor) -> None:
        read = named(edit, READ)[0]
        edit.set_arg(read, 1, [*sources_of(read), sources_of(read)[0]])

    def raw(edit: GraphEditor) -> None:
        read = named(edit, READ)[0]
        norm = next(iter(read.users))
        edit.replace(norm, edit.call(aten.tanh.default, (read,), before=norm, like=norm))

    for change, text in ((share, "shares its query"), (twice, "twice"), (raw, "is no norm")):
        assert any(text in wrong for wrong in LiftAttnRes().ensures(sabotaged(after, change)))


# Teeth: what a wrong lift would look like, and that parity notices.


def _norms(edit: GraphEditor) -> list[Any]:
    return named(edit, aten.rms_norm.default)


def no_correction(edit: GraphEditor) -> None:
    edit.set_arg(_norms(edit)[1], 3, 1e-5)


def wrong_count(edit: GraphEditor) -> None:
    edit.set_arg(_norms(edit)[2], 3, 1e-5 / 4**2)


def wrong_scale(edit: GraphEditor) -> None:
    read = named(edit, READ)[1]
    edit.set_arg(next(iter(read.users)), 1, float(len(sources_of(read)) + 1))


def dropped_source(edit: GraphEditor) -> None:
    read = named(edit, READ)[2]
    edit.set_arg(read, 1, sources_of(read)[:-1])


def duplicated_source(edit: GraphEditor) -> None:
    read = named(edit, READ)[2]
    edit.set_arg(read, 1, [*sources_of(read), sources_of(read)[0]])


def exchanged_source(edit: GraphEditor) -> None:
    """Give the last read the partial sum of the one before."""
    earlier, later = named(edit, READ)[-2:]
    edit.set_arg(later, 1, [*sources_of(later)[:-1], sources_of(earlier)[-1]])


def perturbed_query(edit: GraphEditor) -> None:
    edit.set_parameter("attn_res.query.3", torch.full((16,), 1e-3, dtype=torch.float64))


def reader_left_behind(edit: GraphEditor) -> None:
    """Let a later norm read an earlier read."""
    first, second = named(edit, READ)[:2]
    edit.reroute(next(iter(second.users)), second, first)


@pytest.mark.parametrize(
    ("change", "correction"),
    [
        (no_correction, "eps"),
        (wrong_count, "eps"),
        (wrong_scale, "scale"),
        (dropped_source, "eps"),
        (duplicated_source, "scale"),
        (exchanged_source, "eps"),
        (perturbed_query, "eps"),
        (reader_left_behind, "eps"),
    ],
)
def test_a_wrong_lift_is_noticed(change: Callable[[GraphEditor], None], correction: Literal["eps", "scale"]) -> None:
    program, after = lifted(Spec(), LiftAttnRes(Partition.parse("block:2"), correction))
    assert_parity(program, after)
    with pytest.raises(AssertionError):
        assert_parity(program, sabotaged(after, change))


def test_the_order_of_sources_within_a_read_does_not_matter() -> None:
    program, after = lifted(Spec(), LiftAttnRes())

    def reverse(edit: GraphEditor) -> None:
        for read in named(edit, READ):
            edit.set_arg(read, 1, sources_of(read)[::-1])
            query = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            edit.set_parameter(f"attn_res.query.{read.name.rpartition('_')[2]}", query)

    def trained(edit: GraphEditor) -> None:
        for read in named(edit, READ):
            query = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            edit.set_parameter(f"attn_res.query.{read.name.rpartition('_')[2]}", query)

    assert_parity(sabotaged(after, trained), sabotaged(after, reverse), bound=1e-12)
    with pytest.raises(AssertionError):
        assert_parity(program, sabotaged(after, trained))


def test_options_are_plain_values() -> None:
    step = LiftAttnRes(Partition.parse("block:3"), "scale")
    assert step.options() == {"partition": "block:3", "correction": "scale", "queries": None}
    assert LiftAttnRes().options()["partition"] == "full"


def test_no_read_where_the_origin_is_the_only_source() -> None:
    _, after = lifted(Spec(), LiftAttnRes())
    keys = sorted(key for key in after.exported.state_dict if key.startswith("attn_res."))
    assert keys == [f"attn_res.query.{index}" for index in range(1, 5)]
