"""Any composition of spellings of an AttnRes model is recognised, and computes what it did."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from depthwire.passes._pipeline import Pipeline
from depthwire.passes.recognize_attn_res import RecognizeAttnRes
from tests.passes.native_attn_res import spellings
from tests.passes.native_attn_res.capture import canonical, reads_of, stacks_of
from tests.passes.native_attn_res.spellings import Spelling
from tests.passes.parity import FP64, error, run

QUICK = settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)

stacked = st.builds(
    Spelling,
    axis=st.sampled_from([0, 1, -2]),
    flat=st.sampled_from(["tokens", "flat", "flat-bank"]),
    bank=st.sampled_from(["list", "cat", "buffer", "buffer-slice"]),
    norm=st.sampled_from(spellings.NORMS),
    dot=st.sampled_from(spellings.DOTS),
    softmax=st.sampled_from(spellings.SOFTMAXES),
    mix=st.sampled_from(spellings.MIXES),
    gain=st.booleans(),
    scale=st.sampled_from([1.0, 0.5, 3.0]),
    bias=st.sampled_from(spellings.BIASES),
    block=st.integers(1, 3),
)
per_source = st.builds(
    Spelling,
    flat=st.sampled_from(["tokens", "flat"]),
    bank=st.just("per-source"),
    norm=st.sampled_from(spellings.NORMS),
    dot=st.sampled_from(spellings.DOTS),
    softmax=st.sampled_from(spellings.SOFTMAXES),
    scale=st.sampled_from([1.0, 0.5]),
    bias=st.sampled_from(spellings.BIASES),
    block=st.integers(1, 2),
)


@QUICK
@given(spelling=stacked | per_source, seed=st.integers(0, 9), batch=st.integers(1, 3), length=st.integers(1, 4))
def test_every_composition_of_spellings_is_recognised(spelling: Spelling, seed: int, batch: int, length: int) -> None:
    depth = 1 + seed % 3
    model = spellings.build(spelling, depth=depth, seed=seed)
    example = spellings.example(batch=batch, length=length)
    program = canonical(model, example)
    after = Pipeline((RecognizeAttnRes(),)).run(program)
    note(str(spelling))
    assert len(reads_of(after)) == depth
    assert stacks_of(after) == []
    assert after.history[-1].declines == ()
    fresh = torch.randn_like(example)
    assert error(run(after, fresh), run(program, fresh)) <= FP64


@QUICK
@given(
    seed=st.integers(0, 99),
    spelling=st.builds(
        Spelling,
        axis=st.sampled_from([0, 1, -2]),
        bank=st.sampled_from(["list", "cat", "buffer"]),
        norm=st.sampled_from(spellings.NORMS),
        dot=st.sampled_from(spellings.DOTS),
        softmax=st.sampled_from(["softmax", "exp-max"]),
        mix=st.sampled_from(spellings.MIXES),
        bias=st.sampled_from(spellings.BIASES),
        island=st.just(True),
    ),
)
def test_fp32_islands_of_narrow_models_keep_the_dtype_of_the_sources(seed: int, spelling: Spelling) -> None:
    model = spellings.build(spelling, depth=2, seed=seed, dtype=torch.bfloat16)
    example = spellings.example(dtype=torch.bfloat16)
    after = Pipeline((RecognizeAttnRes(),)).run(canonical(model, example))
    assert [node.meta["val"].dtype for node in reads_of(after)] == [torch.bfloat16] * 2
    assert stacks_of(after) == []
