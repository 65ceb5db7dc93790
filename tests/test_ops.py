from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from depthwire.ops import attn_res_read, attn_res_read_reference
from depthwire.passes.lift_attn_res import READ

SHAPES = [(1, (4,)), (2, (3, 8)), (3, (2, 5, 16)), (9, (1, 2, 3, 4))]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def operands(
    count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, *, magnitude: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(count)
    query = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    sources = [torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude for _ in range(count)]
    return query.to(dtype), [source.to(dtype) for source in sources]


def naive(query: Tensor, sources: list[Tensor], eps: float, scale: float) -> Tensor:
    """The formula, one token and one number at a time."""
    out = torch.empty_like(sources[0])
    for token in itertools.product(*(range(size) for size in sources[0].shape[:-1])):
        logits = []
        for source in sources:
            value = [float(x) for x in source[token]]
            rstd = 1.0 / math.sqrt(sum(x * x for x in value) / len(value) + eps)
            logits.append(scale * rstd * sum(float(u) * x for u, x in zip(query, value, strict=True)))
        largest = max(logits)
        powers = [math.exp(logit - largest) for logit in logits]
        for channel in range(sources[0].shape[-1]):
            mixed = sum(power * float(source[token][channel]) for power, source in zip(powers, sources, strict=True))
            index = (*token, channel)
            out[index] = mixed / sum(powers)
    return out


@pytest.mark.parametrize(("count", "shape"), SHAPES)
@pytest.mark.parametrize(("eps", "scale"), [(1e-6, 1.0), (0.5, -0.25), (0.0, 0.0)])
def test_the_reference_is_the_formula(count: int, shape: tuple[int, ...], eps: float, scale: float) -> None:
    query, sources = operands(count, shape)
    expected = naive(query, sources, eps, scale)
    torch.testing.assert_close(attn_res_read_reference(query, sources, eps, scale), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(attn_res_read(query, sources, eps, scale), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_is_fp32_inside(dtype: torch.dtype) -> None:
    query, sources = operands(5, (3, 16), dtype)
    out = attn_res_read(query, sources, 1e-6, 1.0)
    assert out.dtype == dtype
    exact = naive(query.double(), [source.double() for source in sources], 1e-6, 1.0)
    # One rounding to the sources' dtype, and fp32's before it.
    rounding = torch.finfo(dtype).eps / 2 + 16 * torch.finfo(max(dtype, torch.float32, key=lambda d: d.itemsize)).eps
    assert float((out.double() - exact).abs().max() / exact.abs().max()) <= rounding


def test_the_query_may_have_another_dtype() -> None:
    query, sources = operands(3, (2, 16), torch.bfloat16)
    mixed = attn_res_read(query.float(), sources, 1e-6, 1.0)
    assert torch.equal(mixed, attn_res_read(query, sources, 1e-6, 1.0))


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_magnitudes(magnitude: float, dtype: torch.dtype) -> None:
    query, sources = operands(4, (3, 16), dtype, magnitude=magnitude)
    if magnitude == 1e4 and dtype == torch.float16:
        assert max(float(source.abs().max()) for source in sources) > 2.5e4  # the squares overflow fp16
    out = attn_res_read(query, sources, 1e-6, 1.0)
    assert bool(torch.isfinite(out).all())
    exact = naive(query.double(), [source.double() for source in sources], 1e-6, 1.0)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # subnormals round absolutely
    bound = 2 * torch.finfo(dtype).eps * float(exact.abs().max()) + float(smallest)
    assert float((out.double() - exact).abs().max()) <= max(bound, 1e-5 * float(exact.abs().max()))


def test_sources_of_unequal_magnitude_are_compared_by_direction() -> None:
    query = torch.ones(4, dtype=torch.float64)
    small, large = torch.full((1, 4), 1e-2, dtype=torch.float64), torch.full((1, 4), -1e4, dtype=torch.float64)
    out = attn_res_read(query, [small, large], 0.0, 1.0)
    weight = 1 / (1 + math.exp(-8.0))  # logits +4 and -4
    torch.testing.assert_close(out, weight * small + (1 - weight) * large, rtol=1e-12, atol=0)


def test_equal_logits_give_the_mean() -> None:
    query, sources = operands(7, (3, 16))
    mean = torch.stack(sources).mean(0)
    torch.testing.assert_close(attn_res_read(torch.zeros_like(query), sources, 1e-6, 1.0), mean, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(attn_res_read(query, sources, 1e-6, 0.0), mean, rtol=1e-14, atol=1e-15)
    same = attn_res_read(query, [sources[0]] * 7, 1e-6, 1.0)
    torch.testing.assert_close(same, sources[0], rtol=1e-14, atol=1e-15)


def test_huge_logits_choose_one_source() -> None:
    query, sources = operands(3, (2, 16))
    out = attn_res_read(query * 1e6, sources, 1e-6, 1.0)
    scores = torch.stack([(source @ query) / source.square().mean(-1).sqrt() for source in sources])
    chosen = torch.stack(sources).gather(0, scores.argmax(0)[None, :, None].expand(1, 2, 16))[0]
    torch.testing.assert_close(out, chosen)


def test_the_order_of_sources_does_not_matter() -> None:
    query, sources = operands(6, (3, 16))
    forwards, backwards = (attn_res_read(query, order, 1e-6, 1.0) for order in (sources, sources[::-1]))
    torch.testing.assert_close(forwards, backwards, rtol=1e-14, atol=1e-15)


def test_sources_need_not_be_contiguous() -> None:
    query, sources = operands(3, (4, 5, 4))
    turned = [source.transpose(0, 1) for source in sources]
    out = attn_res_read(query, turned, 1e-6, 1.0)
    assert out.is_contiguous()
    assert torch.equal(out, attn_res_read(query, [source.contiguous() for source in turned], 1e-6, 1.0))


@pytest.mark.parametrize(("count", "shape"), [(1, (4,)), (2, (3, 8)), (3, (2, 3, 4))])
def test_gradients(count: int, shape: tuple[int, ...]) -> None:
    query, sources = operands(count, shape)
    leaves = [tensor.requires_grad_() for tensor in (query, *sources)]

    def read(query: Tensor, *sources: Tensor) -> Tensor:
        out: Tensor = attn_res_read(query, sources, 1e-3, 0.7)
        return out

    assert torch.autograd.gradcheck(read, leaves)


def test_gradients_reach_what_needs_them() -> None:
    query, sources = operands(3, (2, 4))
    query.requires_grad_()
    attn_res_read(query, sources, 1e-6, 1.0).square().sum().backward()
    assert query.grad is not None
    assert float(query.grad.abs().max()) > 0
    assert all(source.grad is None for source in sources)


def test_second_derivatives() -> None:
    query, sources = operands(2, (2, 4))

    def read(query: Tensor, *sources: Tensor) -> Tensor:
        out: Tensor = attn_res_read(query, sources, 1e-3, 0.7)
        return out

    assert torch.autograd.gradgradcheck(read, [tensor.requires_grad_() for tensor in (query, *sources)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_operator_keeps_torchs_rules(dtype: torch.dtype, gradient: bool) -> None:
    query, sources = operands(3, (2, 5, 8), dtype)
    query.requires_grad_(gradient)
    result = torch.library.opcheck(READ, (query, sources, 1e-6, 1.0))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("query", "sources", "text"),
    [
        (torch.ones(4), [], "at least one source"),
        (torch.ones(4), [torch.ones(2, 4), torch.ones(3, 4)], r"source 1 is torch.float32\[3, 4\]"),
        (torch.ones(4), [torch.ones(2, 4), torch.ones(2, 4).half()], r"source 1 is torch.float16\[2, 4\]"),
        (torch.ones(3), [torch.ones(2, 4)], r"query must be \[4\], not \[3\]"),
        (torch.ones(1, 4), [torch.ones(2, 4)], r"query must be \[4\], not \[1, 4\]"),
        (torch.ones(4), [torch.ones(2, 4, dtype=torch.int64)], "floating point, not torch.int64"),
        (torch.ones(4, dtype=torch.int64), [torch.ones(2, 4)], "query must be floating point"),
        (torch.ones(()), [torch.ones(())], "sources must have a last axis"),
    ],
)
def test_what_does_not_fit_is_refused(query: Tensor, sources: list[Tensor], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        attn_res_read(query, sources, 1e-6, 1.0)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=text):
        attn_res_read(query, sources, 1e-6, 1.0)


def test_nan_is_not_hidden() -> None:
    query, sources = operands(3, (2, 4))
    sources[1][0, 0] = math.nan
    out = attn_res_read(query, sources, 1e-6, 1.0)
    assert bool(torch.isnan(out[0]).all())
    assert bool(torch.isfinite(out[1]).all())
