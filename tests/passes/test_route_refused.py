"""What cannot be routed, each with its code and the module."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from depthwire.errors import DepthwireError, PassError, UsageError
from depthwire.passes.route_tokens import RouteTokens
from depthwire.route import RouteSpec
from tests.passes.lifted import lifted
from tests.routable import FORMS, WIDTH, Form, Layer, build, canonical, examples, parts_of, routed
from tests.zoo import Spec, captured

if TYPE_CHECKING:
    from depthwire.program import Program

HALF = (Fraction(1, 2),)


def refusal(program: Program, spec: RouteSpec) -> DepthwireError:
    with pytest.raises((PassError, UsageError)) as caught:
        routed(program, parts_of(spec))
    assert caught.value.todo
    return caught.value


def llama(**options: Any) -> Program:
    form = Form(**options)
    return canonical(build(form), examples(form, batch=2, length=6))


def test_a_layer_that_does_not_exist() -> None:
    error = refusal(llama(), RouteSpec((1, 7), HALF))
    assert error.code == "route.layers"
    assert (error.want, error.got) == ("layers 0 to 1", "7")


def test_a_second_routing() -> None:
    once = routed(llama(), parts_of(RouteSpec((1,), HALF)))
    error = refusal(once, RouteSpec((0,), HALF))
    assert error.code == "route.routed-already"
    assert "layers.1" in str(error.at)


def test_one_token() -> None:
    form = Form()
    error = refusal(canonical(build(form), examples(form, length=1)), RouteSpec((1,), HALF))
    assert error.code == "route.one-token"


@pytest.mark.parametrize("score", ["surprise"])
def test_the_surprise_of_the_first_layer(score: Any) -> None:
    error = refusal(llama(), RouteSpec((0, 1), HALF, score=score))
    assert error.code == "route.surprise"
    assert "layers.0" in str(error.at)


def test_the_surprise_of_sources() -> None:
    error = refusal(lifted(Spec(), "full"), RouteSpec((1,), HALF, score="surprise"))
    assert error.code == "route.surprise"
    assert error.got == "AttnRes sources"


def test_a_prior_for_two_sublayers_of_attn_res() -> None:
    error = refusal(lifted(Spec(), "full"), RouteSpec((1,), HALF, fallback="linear"))
    assert error.code == "route.options"
    assert "attention or mlp" in str(error.want)


def test_a_window_that_does_not_divide() -> None:
    error = refusal(llama(), RouteSpec((1,), HALF, rule="top-k", window=4))
    assert error.code == "route.options"
    assert error.want == "a divisor of 6"


def test_attention_and_mlp_side_by_side() -> None:
    error = refusal(llama(parallel=True), RouteSpec((1,), HALF, unit="mlp"))
    assert error.code == "route.structure"
    assert "layers.1" in str(error.at)
    assert error.got == "parallel"


@pytest.mark.parametrize(
    ("spec", "at", "got"),
    [
        (Spec(skip_scale=0.5), "layers.0", "factor 0.5"),
        (Spec(flat_mlp=True), "layers.0", "[10, 16]"),
    ],
)
def test_streams_that_are_scaled_or_flattened(spec: Spec, at: str, got: str) -> None:
    _, program = captured(spec)
    error = refusal(program, RouteSpec((0,), HALF, unit="mlp", score="mod"))
    assert error.code == "route.structure"
    assert at in str(error.at)
    assert error.got == got


def test_a_router_without_a_norm() -> None:
    _, program = captured(Spec(placement="inside"))
    error = refusal(program, RouteSpec((1,), HALF))
    assert error.code == "route.structure"
    assert error.got == "no norm"


def test_a_model_without_a_stream() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    error = refusal(canonical(model, {"x": torch.randn(2, 4)}), RouteSpec((0,), HALF))
    assert error.code == "structure.no-residual-stream"


class Wrapped(nn.Module):
    """A model whose second layer does something else with its tokens, or shows what is inside it."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.inner = what, build(Form())

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return logits, and the keys of layer 1."""
        x = self.inner.embedded(ids)
        shown: tuple[Tensor, ...] = ()
        for number, layer in enumerate(self.inner.layers):
            assert isinstance(layer, Layer)
            normed = layer.norm_1(x)
            if number == 1 and self.what == "mean":
                normed = normed + normed.mean(1, keepdim=True)
            elif number == 1 and self.what == "cumsum":
                normed = normed.cumsum(1)
            elif number == 1 and self.what == "convolution":
                kernel = self.inner.head.weight[: 3 * 4 : 4, None, :1].expand(3, 1, 1).reshape(1, 1, 3)
                normed = functional.conv1d(normed.transpose(1, 2), kernel.expand(WIDTH, 1, 3), padding=1, groups=WIDTH)
                normed = normed.transpose(1, 2)
            elif number == 1 and self.what == "flip":
                normed = normed.flip(1)
            mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            attended = layer.attention(normed, torch.zeros(ids.shape[1], 4, dtype=x.dtype), mask)
            if number == 1 and self.what == "cache":
                shown = (layer.attention.qkv(normed)[..., WIDTH:] * 2,)
            x = x + attended
            x = x + layer.mlp(layer.norm_2(x))
        return (self.inner.head(self.inner.norm(x)), *shown)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("mean", "reduces over the tokens"),
        ("cumsum", "not known to keep tokens apart"),
        ("convolution", "not known to keep tokens apart"),
        ("flip", "not known to keep tokens apart"),
    ],
)
def test_operations_between_tokens(what: str, words: str) -> None:
    ids = examples(Form(), batch=2, length=6)
    error = refusal(canonical(Wrapped(what), ids), RouteSpec((1,), HALF))
    assert error.code == "route.operation"
    assert words in str(error.got)
    assert "--route-layers" in str(error.todo)
    assert routed(canonical(Wrapped(what), ids), parts_of(RouteSpec((0,), HALF))).history  # the other layer can be


def test_a_value_that_is_read_from_outside() -> None:
    error = refusal(canonical(Wrapped("cache"), examples(Form(), batch=2, length=6)), RouteSpec((1,), HALF))
    assert error.code == "route.interior-read"
    assert "layers.1" in str(error.at) or "norm_1" in str(error.at)


def test_parts_for_another_width() -> None:
    spec = RouteSpec((1,), HALF)
    parts = parts_of(spec)
    parts.tensors["layers.1.router.weight"] = torch.ones(8)  # type: ignore[index]
    with pytest.raises(UsageError) as caught:
        RouteTokens(parts).run(canonical(build(FORMS["llama"]), examples(FORMS["llama"])))
    assert caught.value.code == "route.parts"
    assert caught.value.got == "layers.1.router.weight [8]"
