"""What the device judges by, on real outputs of the graph that travels (from ONNX Runtime), right and sabotaged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest

from depthwire.runtime._judge import Judged, output_kinds
from depthwire.runtime.deploy.judge import judge_routing, judge_window
from depthwire.runtime.deploy.manifest import RoutingUnit, read_bundle
from depthwire.runtime.deploy.steps import describe, explain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from depthwire.artifact import Artifact
    from depthwire.runtime.deploy.manifest import Model

Arrays = dict[str, Any]
TASK = "causal-lm"


def read(bundle: Path, model: Model, side: str, window: int = 0) -> Arrays:
    folder = bundle / model.goldens
    return {path.stem[len(side) + 1 :]: np.load(path)[window] for path in folder.glob(f"{side}.*.npy")}


@pytest.fixture(scope="module")
def case(rtx_bundle: Path) -> tuple[Model, Arrays, Arrays, Arrays]:
    """Model, inputs, goldens, and what ONNX Runtime computes with the bundle's own graph."""
    model = read_bundle(rtx_bundle).models[0]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(rtx_bundle / model.file), options)
    feed, expected = read(rtx_bundle, model, "input"), read(rtx_bundle, model, "output")
    actual = dict(zip(expected, session.run(list(expected), feed), strict=True))
    return model, feed, expected, actual


def judged(case: tuple[Model, Arrays, Arrays, Arrays], task: str | None = TASK, **changes: Any) -> dict[str, Any]:
    model, feed, expected, actual = case
    return judge_window(model, task, expected, {**actual, **changes}, feed)


def test_right_outputs_pass_with_all_their_numbers(case: tuple[Model, Arrays, Arrays, Arrays]) -> None:
    window = judged(case)
    (output,) = window["outputs"]
    assert window["passed"]
    assert output["max_abs"] <= output["allowed"] == pytest.approx(2e-5 * output["max_expected"])
    assert window["top1"]["logits"]["flips"] == 0
    assert window["nll"]["tokens"] == 2 * 15
    assert window["routing"] == {"units": 2, "flips": 0, "problems": [], "listed": []}
    assert "0 routing flips in 2 units" in describe(window)


def test_the_device_judges_as_verify_does(
    case: tuple[Model, Arrays, Arrays, Arrays], routed_artifact: Artifact
) -> None:
    model, feed, expected, actual = case
    manifest = routed_artifact.manifest
    for change in (0.0, 1e-3):
        named = {"logits": expected["logits"]}, {"logits": actual["logits"] + np.float32(change)}
        home = Judged()
        home.add([named[0]], [named[1]], [feed], output_kinds(manifest), manifest)
        theirs, ours = home.windows[0].as_dict(), judge_window(model, TASK, expected, {**actual, **named[1]}, feed)
        assert {key: ours[key] for key in theirs} == theirs


def _scaled(logits: Any) -> Any:
    return logits * np.float32(1.001)


def _one_nan(logits: Any) -> Any:
    changed = logits.copy()
    changed[0, 3, 5] = np.nan
    return changed


def _one_token(logits: Any) -> Any:
    changed = logits.copy()
    changed[0, 0, 0] = logits.max() + 1
    return changed


@pytest.mark.parametrize(
    ("sabotage", "words"),
    [
        (_scaled, "max|d|"),
        (_one_nan, "not finite"),
        (_one_token, "1 beyond"),
        (np.zeros_like, "max|d|"),
        (lambda logits: logits.astype(np.float16), "dtype float32 was expected, found float16"),
        (lambda logits: logits[:, :-1], "shape"),
        (lambda logits: np.roll(logits, 1, axis=1), "beyond"),
        (lambda logits: -logits, "beyond"),
    ],
)
def test_sabotaged_outputs_fail(
    case: tuple[Model, Arrays, Arrays, Arrays], sabotage: Callable[[Any], Any], words: str
) -> None:
    window = judged(case, logits=sabotage(case[3]["logits"]))
    assert not window["passed"]
    assert words in describe(window)
    assert words in explain({"engine": "model.engine", "windows": [judged(case), window]})


def test_an_output_that_is_missing_fails(case: tuple[Model, Arrays, Arrays, Arrays]) -> None:
    model, feed, expected, actual = case
    kept = {name: array for name, array in actual.items() if name != "logits"}
    window = judge_window(model, TASK, expected, kept, feed)
    assert not window["passed"]
    assert "missing" in describe(window)


def test_a_flip_is_a_flip(case: tuple[Model, Arrays, Arrays, Arrays]) -> None:
    """Two tokens change places: reported with unit and position; whether it passes is the values' question."""
    model, _, expected, actual = case
    unit = model.routing[1]
    index = actual[unit.index].copy()
    slots = np.flatnonzero(actual[unit.taken][1])
    free = next(token for token in range(unit.tokens) if token not in index[1, slots])
    lost, index[1, slots[-1]] = int(index[1, slots[-1]]), free
    window = judged(case, **{unit.index: index})
    assert window["passed"]
    assert window["routing"]["flips"] == 2
    assert {
        (flip["module"], flip["unit"], flip["sequence"], flip["token"], flip["selected"])
        for flip in window["routing"]["listed"]
    } == {
        (unit.module, 1, 1, free, False),
        (unit.module, 1, 1, lost, True),
    }
    # The values that follow from it are not excused.
    both = judged(case, **{unit.index: index, "logits": _scaled(actual["logits"])})
    assert not both["passed"]
    assert "2 routing flips" in describe(both)
    del expected


def test_the_order_of_the_slots_does_not_matter() -> None:
    unit = RoutingUnit("layer", 1, 6, "i", "t")
    left = {"i": np.array([[1, 4, 0]]), "t": np.array([[True, True, False]])}
    right = {"i": np.array([[4, 1, 5]]), "t": np.array([[True, True, False]])}
    assert judge_routing([unit], left, right) == ([], [])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"i": np.array([[1, 9]]), "t": np.array([[True, True]])}, "tokens 1 to 9 of 6"),
        ({"i": np.array([[-1, 2]]), "t": np.array([[True, True]])}, "tokens -1 to 2 of 6"),
        ({"i": np.array([[1, 2]]), "t": np.array([[True]])}, "bits"),
        ({"i": np.array([[1, 2]])}, "'t'"),
        ({"i": np.array([[1, 2], [3, 4]]), "t": np.ones((2, 2), bool)}, "2 sequences instead of 1"),
    ],
)
def test_selections_that_make_no_sense(arrays: Arrays, words: str) -> None:
    unit = RoutingUnit("layer", 1, 6, "i", "t")
    sound = {"i": np.array([[1, 4]]), "t": np.array([[True, True]])}
    flips, problems = judge_routing([unit], sound, arrays)
    assert flips == []
    assert words in problems[0]


def test_selections_that_cannot_be_compared_fail(case: tuple[Model, Arrays, Arrays, Arrays]) -> None:
    unit = case[0].routing[0]
    window = judged(case, **{unit.index: case[3][unit.index] + 1000})
    assert not window["passed"]
    assert unit.module in describe(window)


def test_a_likelihood_that_cannot_be_computed_is_said(case: tuple[Model, Arrays, Arrays, Arrays]) -> None:
    assert judged(case, task=None)["nll"] is None
    model, _, expected, actual = case
    window = judge_window(model, TASK, expected, actual, {"input_ids": np.full((2, 16), 10_000)})
    assert window["nll"] is None
    assert "NLL not computed" in window["notes"][0]
