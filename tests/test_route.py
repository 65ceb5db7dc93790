"""The specification of a routing and the file of its learned parts."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from depthwire.errors import UsageError
from depthwire.route import MAX_DENOMINATOR, RouteSpec, parse_capacity, parse_layers
from depthwire.route_parts import METADATA, RouteParts, draw_parts, part_shapes, weights_sha256

if TYPE_CHECKING:
    from pathlib import Path

HALF = Fraction(1, 2)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (0.5, HALF),
        ("50%", HALF),
        ("1/3", Fraction(1, 3)),
        (1, Fraction(1)),
        ("12.5%", Fraction(1, 8)),
        (1e-9, Fraction(1, MAX_DENOMINATOR)),
    ],
)
def test_capacities(text: object, want: Fraction) -> None:
    assert parse_capacity(text) == want


@pytest.mark.parametrize("text", [0, 1.5, "nan", float("nan"), "inf", -0.5, "", "half", "1/0", "0%", "101%", None])
def test_capacities_that_cannot_be(text: object) -> None:
    with pytest.raises(UsageError) as caught:
        parse_capacity(text)
    assert caught.value.code == "route.capacity"
    assert caught.value.got == str(text).strip()


@given(
    st.fractions(min_value=Fraction(1, 1000), max_value=1, max_denominator=1000),
    st.integers(2, 5000),
    st.integers(0, 5),
)
def test_slots_hold_all_that_a_budget_grants(capacity: Fraction, tokens: int, margin: int) -> None:
    spec = RouteSpec((0,), (capacity,), margin=margin)
    granted = min(tokens, capacity.numerator * tokens // capacity.denominator + margin)
    assert granted <= spec.slots(0, tokens) <= tokens
    assert spec.slots(0, tokens) == max(1, granted)
    assert RouteSpec((0,), (capacity,), rule="top-k").slots(0, tokens) == max(
        1, tokens * capacity.numerator // capacity.denominator
    )


def test_slots_of_windows() -> None:
    assert RouteSpec((0,), (Fraction(3, 8),), rule="top-k", window=4).slots(0, 12) == 3
    assert RouteSpec((0, 2), (HALF, Fraction(1, 4)), rule="top-k").slots(2, 12) == 3


@pytest.mark.parametrize(
    ("text", "count", "want"),
    [
        ("9,11,13", None, (9, 11, 13)),
        ("3-5", None, (3, 4, 5)),
        ("8-20:4", None, (8, 12, 16, 20)),
        ("5, 2-3,3", None, (2, 3, 5)),
        ("every:2", 6, (1, 3, 5)),
        ("all", 3, (0, 1, 2)),
        ("0", 1, (0,)),
    ],
)
def test_layers(text: str, count: int | None, want: tuple[int, ...]) -> None:
    assert parse_layers(text, count) == want


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 4),
        ("a", 4),
        ("1-", 4),
        ("3-1", 4),
        ("4", 4),
        ("-1", 4),
        ("every:0", 4),
        ("every:9", 4),
        ("all", None),
        ("1;2", 4),
    ],
)
def test_layers_that_cannot_be(text: str, count: int | None) -> None:
    with pytest.raises(UsageError) as caught:
        parse_layers(text, count)
    assert caught.value.code == "route.layers"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"capacity": (HALF, HALF)}, "route.capacity"),
        ({"layers": (2, 1)}, "route.layers"),
        ({"layers": (1, 1)}, "route.layers"),
        ({"layers": (-1,)}, "route.layers"),
        ({"gate": "surprise"}, "route.options"),
        ({"window": 4}, "route.options"),
        ({"margin": -1}, "route.options"),
        ({"rule": "top-k", "window": -4}, "route.options"),
        ({"surprise_window": 0}, "route.options"),
    ],
)
def test_specifications_that_contradict_themselves(options: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as caught:
        RouteSpec(**{"layers": (1, 2, 3), "capacity": (HALF,), **options})
    assert caught.value.code == code


SPECS = [
    RouteSpec((1, 3), (HALF,)),
    RouteSpec(
        (0, 2), (HALF, Fraction(1, 3)), unit="attention", keys_values="all", rule="top-k", window=8, score="timescale"
    ),
    RouteSpec((2,), (HALF,), score="surprise", gate="surprise", fallback="swiglu", margin=0, surprise_window=7),
    RouteSpec((5,), (HALF,), score="mod", gate="sigmoid", fallback="linear", unit="mlp"),
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_specification_survives_json(spec: RouteSpec) -> None:
    assert RouteSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


@pytest.mark.parametrize(("name", "value"), [("depth", 3), ("layers", None)])
def test_a_specification_of_another_version(name: str, value: object) -> None:
    values = SPECS[0].as_dict()
    values = {key: item for key, item in values.items() if key != name} | ({} if value is None else {name: value})
    with pytest.raises(UsageError, match="fields that are unknown, or lacks some"):
        RouteSpec.from_dict(values)


@pytest.mark.parametrize("spec", SPECS)
def test_parts_survive_their_file(spec: RouteSpec, tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    parts = draw_parts(spec, 32, seed=1)
    parts.check(32)
    parts.save(path)
    back = RouteParts.load(path)
    assert back.spec == spec
    assert back.model_sha256 is None
    back.check(32)
    assert {name: tuple(t.shape) for name, t in back.tensors.items()} == part_shapes(spec, 32)
    assert all(torch.equal(parts.tensors[name], tensor) for name, tensor in back.tensors.items())


def test_draws_repeat() -> None:
    one, two, other = (weights_sha256(draw_parts(SPECS[2], 32, seed).tensors) for seed in (3, 3, 4))
    assert one == two != other


def test_a_prior_may_have_another_width() -> None:
    parts = draw_parts(SPECS[2], 32, seed=1)
    stem = "layers.2.fallback"
    wide = {f"{stem}.gate": torch.ones(48, 32), f"{stem}.up": torch.ones(48, 32), f"{stem}.down": torch.ones(32, 48)}
    RouteParts(parts.spec, {**parts.tensors, **wide}).check(32)
    with pytest.raises(UsageError, match=r"route.parts"):
        RouteParts(parts.spec, {**parts.tensors, **wide, f"{stem}.up": torch.ones(40, 32)}).check(32)


def _tampered(path: Path, change: Any) -> None:
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    head = json.loads(metadata[METADATA])
    change(head, tensors)
    save_file(tensors, str(path), metadata={METADATA: json.dumps(head)})


def _weight(_: Any, tensors: Any) -> None:
    tensors["layers.1.router.weight"][3] += 1e-7


def _name(_: Any, tensors: Any) -> None:
    tensors["layers.3.router.other"] = tensors.pop("layers.3.router.weight")


def _format(head: Any, _: Any) -> None:
    head["format"] = 2


@pytest.mark.parametrize("change", [_weight, _name, _format])
def test_a_changed_file_is_refused(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    draw_parts(SPECS[0], 32, seed=1).save(path)
    RouteParts.load(path)
    _tampered(path, change)
    with pytest.raises(UsageError) as caught:
        RouteParts.load(path)
    assert caught.value.code == "route.file"
    assert caught.value.at == str(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    text, plain, odd = (tmp_path / f"{name}.safetensors" for name in ("text", "plain", "odd"))
    text.write_text("no tensors", encoding="utf-8")
    save_file({"a": torch.ones(1)}, str(plain))
    save_file({"a": torch.ones(1)}, str(odd), metadata={METADATA: "{"})
    for path in (text, plain, odd, tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(UsageError) as caught:
            RouteParts.load(path)
        assert caught.value.code == "route.file"


@pytest.mark.parametrize(
    ("name", "tensor", "got"),
    [
        ("layers.1.router.weight", torch.ones(31), "layers.1.router.weight [31]"),
        ("layers.1.router.weight", None, "layers.1.router.weight missing"),
        ("layers.1.router.weight", torch.ones(32).half(), "layers.1.router.weight torch.float16"),
        ("layers.1.router.weight", torch.full((32,), torch.nan), "layers.1.router.weight not finite"),
        ("layers.1.threshold", torch.tensor(torch.nan), "layers.1.threshold not finite"),
        ("layers.7.threshold", torch.tensor(0.0), "layers.7.threshold left over"),
    ],
)
def test_parts_that_do_not_fit(name: str, tensor: torch.Tensor | None, got: str) -> None:
    parts = draw_parts(SPECS[0], 32, seed=1)
    tensors = {key: value for key, value in parts.tensors.items() if key != name} | (
        {} if tensor is None else {name: tensor}
    )
    with pytest.raises(UsageError) as caught:
        RouteParts(parts.spec, tensors).check(32)
    assert caught.value.code == "route.parts"
    assert caught.value.got == got


def test_a_threshold_may_be_infinite() -> None:
    parts = draw_parts(SPECS[0], 32, seed=1)
    RouteParts(parts.spec, {**parts.tensors, "layers.1.threshold": torch.tensor(-torch.inf)}).check(32)


def test_parts_belong_to_a_model() -> None:
    weights = {"a": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.bfloat16)}
    fitted = RouteParts(SPECS[0], {}, weights_sha256(weights))
    fitted.check_model(dict(reversed(weights.items())))
    for other in ({**weights, "a": torch.ones(4)}, {**weights, "b": torch.ones(3)}, {"a": weights["a"]}):
        with pytest.raises(UsageError) as caught:
            fitted.check_model(other)
        assert caught.value.code == "route.other-model"
    RouteParts(SPECS[0], {}).check_model({})  # drawn parts belong to none
