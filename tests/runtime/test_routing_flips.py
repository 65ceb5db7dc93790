"""A token that two graphs route differently is named, with its score."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from depthwire.artifact import MODEL, Artifact
from depthwire.runtime.routing_flips import routing_flips
from depthwire.runtime.torch_exported import run_nodes
from depthwire.runtime.verify import verify
from tests.routed_tiny import ids, routed, write_routed

if TYPE_CHECKING:
    from pathlib import Path

THRESHOLDS = "route_thresholds"


def with_threshold(artifact: Artifact, unit: int, threshold: float) -> Artifact:
    """Change one threshold in the file, as another runtime's rounding would."""
    path = artifact.root / MODEL
    model = onnx.load(str(path), load_external_data=False)
    table = next(tensor for tensor in model.graph.initializer if tensor.name == THRESHOLDS)
    values = numpy_helper.to_array(table).copy()
    values[unit] = threshold
    table.CopyFrom(numpy_helper.from_array(values, THRESHOLDS))
    onnx.save(model, str(path))
    artifact.add_file(MODEL)
    artifact.write_manifest()
    return Artifact.load(artifact.root)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return write_routed(tmp_path / "routed")


def test_equal_graphs_route_alike(artifact: Artifact) -> None:
    assert routing_flips(artifact, routed(), {"input_ids": ids().numpy()}) == []


def test_a_flip_is_named_with_its_score(artifact: Artifact) -> None:
    program, feeds = routed(), {"input_ids": ids().numpy()}
    select = next(node for node in program.exported.graph.nodes if "select_tokens" in str(node.target))
    taken, index = (next(user.name for user in select.users if user.args[1] == part) for part in (1, 0))
    values = run_nodes(program, feeds, [str(select.args[0]), taken, index])
    scores, bits = values[str(select.args[0])], np.zeros(values[str(select.args[0])].shape, dtype=bool)
    np.put_along_axis(bits, values[index], values[taken], axis=1)
    lowest, second = np.sort(scores[bits])[:2]
    sequence, token = (int(place[0]) for place in np.nonzero(bits & (scores == lowest)))
    flips = routing_flips(with_threshold(artifact, 0, float(lowest + second) / 2), program, feeds)
    first = [flip for flip in flips if flip.unit == 0]
    assert (sequence, token) in {(flip.sequence, flip.token) for flip in first}
    own = next(flip for flip in first if (flip.sequence, flip.token) == (sequence, token))
    assert own.score == float(scores[sequence, token])


def test_the_verdict_says_where_the_routing_differs(artifact: Artifact) -> None:
    program = routed()
    changed = with_threshold(artifact, 1, 0.3)
    report = verify(changed, original=program, rewritten=program, windows=[{"input_ids": ids().numpy()}])
    assert not report.passed
    assert [pair.expected for pair in report.comparisons] == ["routed", "rewritten", "routed"]
    assert report.first_divergence is not None
    assert {flip.unit for flip in report.first_divergence.flips} == {1}
    assert "token" in report.first_divergence.note
    assert report.as_dict()["first_divergence"]["flips"][0]["unit"] == 1
