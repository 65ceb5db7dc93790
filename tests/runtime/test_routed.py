"""Capacity and thresholds chosen call by call, over one weights file."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from depthwire.artifact import MODEL, WEIGHTS, Artifact
from depthwire.errors import ExportError, UsageError
from depthwire.runtime.routed import RoutedModel
from depthwire.runtime.tolerances import tolerance
from tests.routed_tiny import BATCH, ROUTED, TOKENS, captured, feed, routed, write_routed

if TYPE_CHECKING:
    from pathlib import Path

SHARES = tuple(Fraction(n, 8) for n in (1, 2, 6, 8))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("routed") / "out"
    write_routed(root, SHARES, carry=True)
    return Artifact.load(root)


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> RoutedModel:
    return RoutedModel(artifact, threads=1)


def expected(**options: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = routed(**options).module()(torch.from_numpy(feed()["input_ids"]))
    return out


def assert_close(actual: Any, wanted: torch.Tensor) -> None:
    difference = float((torch.from_numpy(actual) - wanted).abs().max())
    assert difference <= tolerance("float32", "logits").allowed(float(wanted.abs().max()))


def test_graphs_share_one_weights_file_and_the_manifest_names_them(artifact: Artifact) -> None:
    route = artifact.manifest.route
    assert route is not None
    assert [graph.file for graph in route.graphs] == [
        MODEL,
        "model.c12.5.onnx",
        "model.c25.onnx",
        "model.c75.onnx",
        "model.c100.onnx",
    ]
    assert [graph.capacity for graph in route.graphs] == ["1/2", "1/8", "1/4", "3/4", "1"]
    slots = [[unit.slots for unit in graph.units] for graph in route.graphs]
    assert slots == [[9, 9], [3, 3], [5, 5], [13, 13], [16, 16]]
    assert {graph.file for graph in route.graphs} <= set(artifact.manifest.files)
    assert [info.name for info in artifact.manifest.inputs] == ["input_ids"]
    assert [info.name for info in artifact.manifest.outputs] == ["logits"]
    assert [info.name for info in route.inputs] == ["route_thresholds", "route_budgets", "route_states"]
    assert route.states_out == "route_states_out"
    weights = sum(tensor.nbytes for tensor in routed().exported.state_dict.values())
    pages = 4096 * len(routed().exported.state_dict)  # every tensor starts on a page of its own
    # One graph's weights, and small tables of five graphs.
    assert artifact.path(WEIGHTS).stat().st_size < weights + 1.5 * pages


@pytest.mark.parametrize("capacity", [None, "12.5%", 0.25, "3/4", 1])
def test_every_capacity_computes_what_its_program_computes(model: RoutedModel, capacity: Any) -> None:
    result = model.run(feed(), capacity=capacity)
    share = (
        Fraction(1, 2)
        if capacity is None
        else Fraction(str(capacity).rstrip("%")) / (100 if str(capacity).endswith("%") else 1)
    )
    assert_close(result.outputs["logits"], expected(capacity=(share,)))
    assert set(result.outputs) == {"logits"}
    assert result.work.capacity == share
    slots = min(TOKENS, int(share * TOKENS) + 1)
    for unit, layer, bits in zip(result.work.units, ROUTED, result.taken, strict=True):
        assert (unit.layer, unit.tokens, unit.computed) == (layer, TOKENS, slots)
        assert unit.taken == tuple(bits.sum(axis=1))
        assert bits.shape == (BATCH, slots)
    assert result.states is not None
    assert result.states[:, :, 0].tolist() == [[TOKENS] * BATCH] * 2
    assert [tuple(row) for row in result.states[:, :, 1]] == [unit.taken for unit in result.work.units]


def test_with_all_capacity_and_no_threshold_it_is_the_dense_model(model: RoutedModel) -> None:
    result = model.run(feed(), capacity=1, thresholds=-np.inf)
    assert [unit.taken for unit in result.work.units] == [(TOKENS,) * BATCH] * 2
    with torch.no_grad():
        dense = captured().module()(torch.from_numpy(feed()["input_ids"]))
    assert_close(result.outputs["logits"], dense)
    assert model.account(1).total.ratio > 1  # the routers' own work
    ratios = [model.account(share).total.ratio for share in model.capacities]
    assert ratios == sorted(ratios)


def test_tables_are_given_call_by_call(model: RoutedModel) -> None:
    first = [model.run(feed(), thresholds=value).work.units[0].taken for value in (-np.inf, 0.4, np.inf)]
    assert first[0] == (TOKENS // 2 + 1,) * BATCH
    assert first[2] == (0,) * BATCH
    assert sum(first[0]) > sum(first[1]) > 0
    only = model.run(feed(), thresholds=[-np.inf, np.inf]).work.units
    assert (sum(only[0].taken), sum(only[1].taken)) == (2 * (TOKENS // 2 + 1), 0)
    tight = model.run(feed(), thresholds=-np.inf, budgets=[1, 8, 0]).work.units
    assert [unit.taken for unit in tight] == [(TOKENS // 8,) * BATCH] * 2
    before = model.run(feed(), thresholds=-np.inf, budgets=[1, 8, 0], states=np.array([[[4, 0]] * BATCH] * 2))
    assert before.work.units[0].taken == ((TOKENS + 4) // 8,) * BATCH
    assert before.states is not None
    assert before.states[0, 0].tolist() == [TOKENS + 4, (TOKENS + 4) // 8]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"capacity": 0.3}, "runtime.no-capacity"),
        ({"capacity": 1.5}, "route.capacity"),
        ({"thresholds": [0.0] * 3}, "runtime.route-input"),
        ({"thresholds": float("nan")}, "runtime.route-input"),
        ({"budgets": [1.0, 2.0, 1.0]}, "runtime.route-input"),
        ({"states": np.zeros((2, 2), np.int64)}, "runtime.route-input"),
    ],
)
def test_what_does_not_fit_is_refused(model: RoutedModel, arguments: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as raised:
        model.run(feed(), **arguments)
    assert raised.value.code == code


def test_only_what_is_asked_for_is_opened(artifact: Artifact) -> None:
    some = RoutedModel(artifact, capacities=["25%"], threads=1)
    assert some.capacities == (Fraction(1, 4),)
    for wrong in (None, 1):
        with pytest.raises(UsageError) as raised:
            some.run(feed(), capacity=wrong)
        assert raised.value.code == "runtime.no-capacity"


def test_a_selection_of_the_best_takes_no_thresholds(tmp_path: Path) -> None:
    top_k = RoutedModel(write_routed(tmp_path / "out", rule="top-k"), threads=1)
    result = top_k.run(feed())
    assert result.states is None
    assert [unit.taken for unit in result.work.units] == [(TOKENS // 2,) * BATCH] * 2
    with pytest.raises(UsageError) as raised:
        top_k.run(feed(), thresholds=0.0)
    assert raised.value.code == "runtime.route-input"


def test_an_artefact_that_is_not_routed_is_refused(artifact: Artifact) -> None:
    plain = Artifact(artifact.root, artifact.manifest.model_copy(update={"route": None}))
    with pytest.raises(UsageError) as raised:
        RoutedModel(plain)
    assert raised.value.code == "runtime.not-routed"


def test_a_graph_that_was_changed_is_noticed(tmp_path: Path) -> None:
    artifact = write_routed(tmp_path / "out", (Fraction(1, 4),))
    with artifact.path("model.c25.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ExportError) as raised:
        Artifact.load(artifact.root)
    assert raised.value.code == "artifact.hash-mismatch"
