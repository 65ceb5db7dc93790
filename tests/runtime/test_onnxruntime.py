"""Sessions over an artefact, and values from inside the graph."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from depthwire.artifact import MODEL, WEIGHTS, Artifact
from depthwire.errors import BuildError, UsageError
from depthwire.runtime import onnxruntime as module
from depthwire.runtime.compare import compare
from depthwire.runtime.onnxruntime import run_session, session_from_artifact, value_names
from depthwire.runtime.torch_exported import run_nodes
from tests.runtime.helpers import Case, build_case

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case(tmp_path_factory.mktemp("tiny"))


def names_of(artifact: Artifact, **options: object) -> list[str]:
    session = session_from_artifact(artifact, **options)  # type: ignore[arg-type]
    return [output.name for output in session.get_outputs()]


def test_a_session_runs_the_artefact(case: Case) -> None:
    outputs = run_session(session_from_artifact(case.artifact), case.windows[0])
    expected = run_nodes(case.original, case.windows[0], ["linear_16"])
    assert compare({"logits": expected["linear_16"]}, outputs, default="logits")


def test_extra_outputs_come_after_the_graphs_own(case: Case) -> None:
    assert names_of(case.artifact, extra_outputs=["linear_9", "logits", "layer_norm", "linear_9"]) == [
        "logits",
        "linear_9",
        "layer_norm",
    ]


def test_values_inside_the_graph_are_the_programs(case: Case) -> None:
    wanted = [checkpoint.value for checkpoint in case.artifact.manifest.checkpoints]
    session = session_from_artifact(case.artifact, extra_outputs=wanted)
    found = run_session(session, case.windows[1])
    del found["logits"]
    assert compare(run_nodes(case.rewritten, case.windows[1], wanted), found, default="layer")


def test_values_without_a_recorded_type_can_be_had(case: Case, tmp_path: Path) -> None:
    artifact = case.copy_to(tmp_path / "a").artifact
    model = onnx.load(str(artifact.model), load_external_data=False)
    del model.graph.value_info[:]
    onnx.save(model, str(artifact.model))
    found = run_session(session_from_artifact(artifact, extra_outputs=["linear_9"]), case.windows[0])
    assert compare(run_nodes(case.rewritten, case.windows[0], ["linear_9"]), {"linear_9": found["linear_9"]})


def test_the_weights_file_is_used_where_it_lies(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy with more outputs has no folder of its own; neither file may be written, copied or looked for here."""
    monkeypatch.chdir(tmp_path)
    root = Path(os.path.relpath(case.artifact.root, tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in case.artifact.root.iterdir() if path.is_file()}
    relative = Artifact(root, case.artifact.manifest)
    run_session(session_from_artifact(relative, extra_outputs=["linear_9"]), case.windows[0])
    run_session(session_from_artifact(relative), case.windows[0])
    after = {path.name: path.stat().st_mtime_ns for path in case.artifact.root.iterdir() if path.is_file()}
    assert after == before
    assert list(tmp_path.iterdir()) == []


def test_without_its_weights_a_model_is_refused(case: Case, tmp_path: Path) -> None:
    artifact = case.copy_to(tmp_path / "a").artifact
    artifact.path(WEIGHTS).unlink()
    for extra in ([], ["linear_9"]):
        with pytest.raises(BuildError) as caught:
            session_from_artifact(artifact, extra_outputs=extra)
        assert caught.value.code == "runtime.session"


@pytest.mark.parametrize("names", [["linear_99"], ["input_ids"], ["linear_9", ""]])
def test_what_no_node_computes_cannot_be_an_output(case: Case, names: Sequence[str]) -> None:
    with pytest.raises(UsageError) as caught:
        session_from_artifact(case.artifact, extra_outputs=names)
    assert caught.value.code == "runtime.no-such-value"


def test_value_names_are_what_nodes_compute(case: Case) -> None:
    names = value_names(case.artifact)
    assert {"logits", "layer_norm_8", "linear_15"} <= names
    assert not {"input_ids", "head.weight", ""} & names


def test_a_provider_that_is_not_there_is_an_error_not_a_fallback(case: Case) -> None:
    with pytest.raises(BuildError) as caught:
        session_from_artifact(case.artifact, providers=("NoSuchExecutionProvider",))
    assert caught.value.code == "runtime.no-provider"
    assert caught.value.want == "NoSuchExecutionProvider"


def test_threads_are_bounded_by_what_the_process_may_use(case: Case) -> None:
    assert session_from_artifact(case.artifact, threads=1).get_session_options().intra_op_num_threads == 1
    automatic = session_from_artifact(case.artifact).get_session_options().intra_op_num_threads
    assert automatic == len(os.sched_getaffinity(0))


def test_mapped_weights_compute_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(session: object) -> str:
        options = session.get_session_options()  # type: ignore[attr-defined]
        value: str = options.get_session_config_entry("session.disable_prepacking")
        return value

    plain = session_from_artifact(case.artifact)
    with pytest.raises(RuntimeError):
        entry(plain)
    mapped = session_from_artifact(case.artifact, map_weights=True)
    assert entry(mapped) == "1"
    assert compare(run_session(plain, case.windows[0]), run_session(mapped, case.windows[0]), default="logits")
    monkeypatch.setattr(module, "COPY_LIMIT", -1)  # as a model larger than the limit
    assert entry(session_from_artifact(case.artifact)) == "1"
    with pytest.raises(RuntimeError):
        entry(session_from_artifact(case.artifact, map_weights=False))


def test_inputs_that_do_not_fit_are_our_error(case: Case) -> None:
    with pytest.raises(BuildError) as caught:
        run_session(session_from_artifact(case.artifact), {"input_ids": np.zeros((1, 3), np.int64)})
    assert caught.value.code == "runtime.run"


def test_a_graph_the_runtime_lacks_kernels_for_is_refused(case: Case, tmp_path: Path) -> None:
    bf16 = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [2, 2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "g", bf16[:1], bf16[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / MODEL)
    with pytest.raises(BuildError) as caught:
        session_from_artifact(Artifact(tmp_path, case.artifact.manifest))
    assert caught.value.code == "runtime.session"
    assert "bfloat16" in (caught.value.todo or "")
