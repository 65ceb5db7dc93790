from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from depthwire.errors import PassError
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.lift_attn_res import LiftAttnRes
from depthwire.passes.recognize_attn_res import REASONS, RecognizeAttnRes
from depthwire.passes.standard import canonical_pipeline, standard_pipeline
from tests.passes.native_attn_res import inkling2, kimi_k3, packages, paper, refused, sana_video2, spellings, variants
from tests.passes.native_attn_res.capture import canonical, reads_of, stacks_of
from tests.passes.native_attn_res.spellings import Spelling
from tests.passes.parity import apply, assert_parity, check_golden, error, named, run, sabotaged, sources_of
from tests.zoo import Spec, build, captured, inputs, program_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.passes._edit import GraphEditor

STEP = RecognizeAttnRes()
READ = torch.ops.depthwire.attn_res_read.default
FORMS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "paper": (paper.build, paper.READS),
    "paper-native-norm": (lambda **options: paper.build(native=True, **options), paper.READS),
    "kimi-k3": (kimi_k3.build, kimi_k3.READS),
    "sana-video2": (sana_video2.build, sana_video2.READS),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_read_of_a_known_form_is_found(name: str) -> None:
    make, count = FORMS[name]
    program = canonical(make(), paper.example())
    result = apply(STEP, program)
    assert result.rewrites == len(reads_of(result.program)) == count
    assert not result.declines
    assert stacks_of(result.program) == []


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in FORMS), ("kimi-k3", torch.float16)])
def test_narrow_models_read_in_their_own_dtype(name: str, dtype: torch.dtype) -> None:
    make, count = FORMS[name]
    model = make(dtype=dtype)
    program = canonical(model, paper.example(dtype))
    after = Pipeline((STEP,)).run(program)
    reads = reads_of(after)
    assert len(reads) == count
    assert {node.meta["val"].dtype for node in reads} == {dtype}
    assert {node.args[0].meta["val"].dtype for node in reads} == {torch.float32}  # type: ignore[union-attr]
    example = paper.example(dtype)
    with torch.no_grad():
        exact = [copy.deepcopy(model).double()(example.double())]
    # One rounding per read instead of several: no further from exact than the original, up to one rounding.
    assert error(run(after, example), exact) < 1.5 * error(run(program, example), exact) + torch.finfo(dtype).eps


def test_golden_text() -> None:
    program = canonical(spellings.build(Spelling(bank="cat", axis=1), depth=2), spellings.example())
    check_golden("recognize_attn_res", program, apply(STEP, program).program)


def test_inkling_2_of_transformers() -> None:
    program = canonical(inkling2.build(), inkling2.example())
    after = Pipeline((STEP,)).run(program)
    reads = reads_of(after)
    assert len(reads) == inkling2.READS
    assert [node.args[3] for node in reads] == [pytest.approx(32**-0.5)] * len(reads)
    assert [node.args[4] for node in reads] == [True] * len(reads)
    assert STEP.ensures(after) == []
    example = inkling2.example()
    # fp32 throughout; the reads come before norms of order-1 values.
    assert error(run(after, example), run(program, example)) < 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("form", packages.READS)
def test_operators_of_other_packages(form: str) -> None:
    result = apply(STEP, canonical(packages.build(form), spellings.example()))
    assert result.rewrites == packages.READS[form]
    assert stacks_of(result.program) == []
    left = {node.target.namespace for node in result.program.exported.graph.nodes if hasattr(node.target, "namespace")}
    assert left <= {"aten", "depthwire"}


BASE = Spelling()
VARIED: dict[str, tuple[object, ...]] = {
    "axis": (1, -2),
    "flat": ("flat", "flat-bank"),
    "bank": ("cat", "buffer", "buffer-slice", "per-source"),
    "norm": spellings.NORMS[1:],
    "dot": spellings.DOTS[1:],
    "softmax": spellings.SOFTMAXES[1:],
    "mix": spellings.MIXES[1:],
    "bias": spellings.BIASES[1:],
    "island": (True,),
    "gain": (False,),
    "scale": (0.3,),
    "block": (2,),
}


@pytest.mark.parametrize(("field", "choice"), [(field, choice) for field in VARIED for choice in VARIED[field]])
def test_every_spelling_of_a_step(field: str, choice: object) -> None:
    changes: dict[str, Any] = {field: choice}
    program = canonical(spellings.build(dataclasses.replace(BASE, **changes), depth=2), spellings.example())
    result = apply(STEP, program)
    assert result.rewrites == 2
    assert not result.declines
    assert stacks_of(result.program) == []


def test_a_bias_of_the_last_logit_becomes_an_argument() -> None:
    program = canonical(spellings.build(Spelling(bias="last"), depth=1), spellings.example())
    (read,) = reads_of(apply(STEP, program).program)
    assert read.args[5] == pytest.approx(0.7, abs=1e-7)


def test_gain_and_projection_are_one_parameter() -> None:
    model = spellings.build(Spelling(), depth=1)
    after = apply(STEP, canonical(model, spellings.example())).program
    folded = after.exported.state_dict["attn_res.query.0"]
    read = model.reads[0]
    assert torch.equal(folded, read.gain * read.proj)  # type: ignore[operator]


def test_a_zero_query_is_an_ordinary_read() -> None:
    model = spellings.build(Spelling(), depth=1)
    torch.nn.init.zeros_(model.reads[0].proj)  # type: ignore[arg-type]
    assert apply(STEP, canonical(model, spellings.example())).rewrites == 1


def test_reads_with_one_query_share_the_parameter() -> None:
    after = apply(STEP, canonical(sana_video2.build(), paper.example())).program
    assert len({node.args[0] for node in reads_of(after)}) == 3


@pytest.mark.parametrize("variant", variants.VARIANTS, ids=lambda variant: variant.__name__)
def test_reads_with_something_special(variant: variants.Variant) -> None:
    result = apply(STEP, canonical(variants.build(variant), spellings.example()))
    assert result.rewrites == variants.VARIANTS[variant]
    assert result.declines == ()
    # Reads whose results the model wants stacked are stacked again; no source is.
    assert len(stacks_of(result.program)) == (variants.VARIANTS[variant] > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_l2_norm_is_an_rms_norm_with_a_tiny_eps(dtype: torch.dtype) -> None:
    program = canonical(variants.build(variants.l2_norm).to(dtype), spellings.example(dtype=dtype))
    after = STEP.run(program).program
    (read,) = reads_of(after)
    assert list(read.args[2:]) == [pytest.approx(1e-24 / spellings.WIDTH), 1.0]
    # From far below the least norm that the two eps tell apart in fp32 (3e-9) up to large activations.
    for size in (1e-30, 1e-8, 1e-4, 1.0, 1e4):
        x = spellings.example(dtype=dtype) * size
        got, want = run(after, x), run(program, x)
        if size > 3e-9:
            assert error(got, want) < 32 * torch.finfo(dtype).eps + 0.5 * (1e-12 / size) ** 2
        else:
            assert all(bool(each.isfinite().all()) for each in got)


def test_channels_come_last_with_one_transposition_per_source() -> None:
    program = canonical(variants.build(variants.channels_first), spellings.example())
    after = apply(STEP, program).program
    (read,) = reads_of(after)
    assert [str(source.target) for source in sources_of(read)] == ["aten.permute.default"] * 3
    assert [str(user.target) for user in read.users] == ["aten.permute.default"]


class Twice(nn.Module):
    """One query that varies over the tokens' axes in name alone, multiplied along either of them."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(spellings.WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        v = torch.stack([x, x.sin(), x.cos()])
        table = self.query.expand(3, -1).clone()
        keys = torch.einsum("nbtd,td->nbtd", spellings.normalised(v, "rsqrt"), table)
        return torch.einsum("nbt,nbtd->btd", torch.einsum("nbtd,bd->nbt", keys, table).softmax(0), v)


def test_a_query_that_is_multiplied_twice_is_squared() -> None:
    model = Twice().double()
    after = apply(STEP, canonical(model, spellings.example(batch=3, length=3))).program
    assert torch.allclose(after.exported.state_dict["attn_res.query.0"], model.query.detach() ** 2, rtol=1e-15)


def test_sizes_that_coincide_are_told_apart() -> None:
    # Batch, tokens and sources are all 3: only their labels tell the axes apart.
    model = spellings.build(Spelling(mix="einsum", axis=1), depth=2)
    assert apply(STEP, canonical(model, spellings.example(batch=3, length=3))).rewrites == 2


class Swapped(nn.Module):
    """Weights over depth meet the sources' tokens: the sizes fit, the axes do not."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        v = torch.stack([x, x.sin(), x.cos()])
        weights = (spellings.normalised(v, "rsqrt") @ self.query).softmax(0)
        return torch.einsum("nbt,bntd->btd", weights, v)


def test_weights_on_another_axis_are_no_read() -> None:
    result = STEP.run(canonical(Swapped().double(), spellings.example(batch=3, length=3)))
    assert result.rewrites == 0
    assert [decline.code for decline in result.declines] == ["recognize-attn-res.values"]


class Additive(nn.Module):
    """Additive routing: the read is added onto the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.read = spellings.Read(Spelling())

    def forward(self, x: Tensor) -> Tensor:
        f = torch.tanh(x)
        return x + f + self.read(torch.stack([x, f]))  # type: ignore[no-any-return]


def test_additive_routing_is_a_read_and_an_addition() -> None:
    result = apply(STEP, canonical(Additive().double(), spellings.example()))
    assert result.rewrites == 1
    (read,) = reads_of(result.program)
    assert [str(user.target) for user in read.users] == ["aten.add.Tensor"]


class Absolute(nn.Module):
    """``|v|`` is mixed: the root of a square is not the value."""

    def __init__(self) -> None:
        super().__init__()
        self.read = spellings.Read(Spelling())

    def forward(self, x: Tensor) -> Tensor:
        v = torch.stack([x, x.sin()])
        weights = self.read.logits(v, 0).softmax(0)
        return (weights.unsqueeze(-1) * v.square().sqrt()).sum(0)


def test_absolute_values_are_other_values() -> None:
    result = STEP.run(canonical(Absolute().double(), spellings.example()))
    assert result.rewrites == 0
    assert result.declines


@pytest.mark.parametrize("mixer", refused.REFUSED, ids=lambda mixer: mixer.__name__)
def test_other_depth_mixing_is_declined_with_the_reason(mixer: refused.Mixer) -> None:
    result = STEP.run(canonical(refused.build(mixer), spellings.example()))
    assert result.rewrites == 0
    reason = refused.REFUSED[mixer]
    assert [decline.code for decline in result.declines] == ([] if reason is None else [f"recognize-attn-res.{reason}"])
    for decline in result.declines:
        assert (decline.want, decline.got.partition(" at ")[0]) == REASONS[str(reason)]


def test_every_reason_is_provoked() -> None:
    assert {reason for reason in refused.REFUSED.values() if reason is not None} == set(REASONS)


def test_every_reason_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs/troubleshooting.md").read_text(encoding="utf-8")
    assert all(f"## recognize-attn-res.{reason}\n" in page for reason in REASONS)


@pytest.mark.parametrize("spec", [Spec(), Spec(mlp="moe", kv_heads=1), Spec(attention="eager", norm="rms-hf")])
def test_ordinary_transformers_have_nothing_to_recognise(spec: Spec) -> None:
    _, program = captured(spec)
    result = STEP.run(canonical_pipeline().run(program))
    assert result.rewrites == 0
    assert result.declines == ()


class Interleaved(nn.Module):
    """Keys stacked from halves (rotary embeddings do so) under ordinary attention over the sequence."""

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.stack([x[..., ::2].cos(), x[..., 1::2].sin()], -1)
        keys = halves.flatten(-2)
        return nn.functional.scaled_dot_product_attention(x, keys, keys)


def test_stacks_of_other_things_are_not_mentioned() -> None:
    result = STEP.run(canonical(Interleaved(), spellings.example()))
    assert (result.rewrites, result.declines) == (0, ())


class Transposed(nn.Module):
    """``exp(s - log Σ exp(s))`` where the sum belongs to another token."""

    def __init__(self) -> None:
        super().__init__()
        self.read = spellings.Read(Spelling())

    def forward(self, x: Tensor) -> Tensor:
        v = torch.stack([x, x.sin(), x.cos()])
        logits = self.read.logits(v, 0)
        weights = torch.exp(logits - logits.logsumexp(0).mT)
        return (weights.unsqueeze(-1) * v).sum(0)


def test_a_sum_of_other_tokens_is_no_softmax() -> None:
    assert STEP.run(canonical(Transposed().double(), spellings.example(batch=3, length=3))).rewrites == 0


def test_a_model_with_native_reads_is_not_lifted() -> None:
    program = STEP.run(canonical(kimi_k3.build(), paper.example())).program
    with pytest.raises(PassError) as caught:
        LiftAttnRes().run(program)
    assert caught.value.code == "attn-res.already-lifted"


def test_the_standard_passes_recognise_before_they_lift() -> None:
    names = [step.name for step in standard_pipeline(attn_res="full").passes]
    assert names.index("fuse_norm") < names.index("recognize_attn_res") < names.index("lift_attn_res")
    lifted = standard_pipeline(attn_res="full").run(program_of(build(Spec()), inputs()))
    record = next(record for record in lifted.history if record.name == STEP.name)
    assert record.rewrites == 0


def test_the_promise_is_checked_on_the_result() -> None:
    program = canonical(kimi_k3.build(), paper.example())
    assert len(STEP.ensures(program)) == kimi_k3.READS


def swapped_sources(edit: GraphEditor) -> None:
    read = named(edit, READ)[-1]
    edit.set_arg(read, 1, sources_of(read)[::-1])


def dropped_source(edit: GraphEditor) -> None:
    read = named(edit, READ)[-1]
    edit.set_arg(read, 1, sources_of(read)[:-1])


def other_eps(edit: GraphEditor) -> None:
    edit.set_arg(named(edit, READ)[-1], 2, 1e-6)


def other_scale(edit: GraphEditor) -> None:
    edit.set_arg(named(edit, READ)[-1], 3, 0.9)


def no_bias(edit: GraphEditor) -> None:
    edit.set_arg(named(edit, READ)[-1], 5, 0.0)


def unit_values(edit: GraphEditor) -> None:
    edit.set_arg(named(edit, READ)[-1], 4, True)


def other_query(edit: GraphEditor) -> None:
    reads = named(edit, READ)
    edit.set_arg(reads[-1], 0, reads[0].args[0])


@pytest.mark.parametrize(
    "change",
    [swapped_sources, dropped_source, other_eps, other_scale, no_bias, unit_values, other_query],
    ids=lambda change: change.__name__,
)
def test_a_wrong_read_is_noticed(change: Callable[[GraphEditor], None]) -> None:
    program = canonical(spellings.build(Spelling(bias="cat"), depth=2), spellings.example())
    after = apply(STEP, program).program
    with pytest.raises(AssertionError):
        assert_parity(program, sabotaged(after, change))
