"""Every routed graph parses and builds with TensorRT-RTX."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from depthwire.artifact import MODEL, Artifact
from depthwire.errors import BuildError, UsageError
from depthwire.export.to_onnx import to_onnx
from depthwire.passes.standard import standard_pipeline
from depthwire.program import Program, Source
from depthwire.route import RouteSpec
from depthwire.route_parts import draw_parts
from depthwire.runtime import _build_process as process
from depthwire.runtime._route_network import network_model, refuse_wide_selections
from depthwire.runtime._route_profile import SLOTS, profiled_model
from depthwire.runtime.target import load_target
from depthwire.runtime.tensorrt_rtx import build
from depthwire.runtime.tolerances import tolerance
from tests.export.tiny import VOCABULARY, WIDTH, TinyDecoder
from tests.routed_tiny import BATCH, TOKENS, feed, routed, write_routed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="the builder itself is under test: pip install 'depthwire[rtx]'",
)


def built(folder: Path) -> process.BuildResult:
    request = process.BuildRequest(str(folder / MODEL), str(folder / "out.engine"), ("SM86",))
    log = folder / "log.txt"
    return process.spawn(request, log=log, kept_log=log, estimated_seconds=1.0)


# Every score, gate, unit, rule, fallback and kind of keys once.
CASES: list[dict[str, Any]] = [
    {},
    {"score": "mod", "gate": "score", "unit": "attention", "rule": "top-k"},
    {"score": "surprise", "gate": "surprise", "unit": "mlp", "fallback": "swiglu"},
    {"score": "timescale", "gate": "sigmoid", "rule": "top-k", "window": 8, "fallback": "linear"},
    {"keys_values": "all", "split": True},  # of a joint product of queries, keys and values the builder makes nothing
]


@pytest.mark.parametrize("options", CASES, ids=lambda case: "-".join(map(str, case.values())) or "default")
def test_a_routed_graph_builds(options: dict[str, Any], tmp_path: Path) -> None:
    ir.save(to_onnx(routed(target="decomposed", **options)), tmp_path / MODEL)
    result = built(tmp_path)
    assert result.bytes > 10_000
    assert result.layers["MATRIX_MULTIPLY"] >= 4 * 4  # four layers' linear ones


class Sublayer(nn.Module):
    """A pre-norm MLP: without attention 16,384 tokens stay small."""

    def __init__(self) -> None:
        super().__init__()
        layer: Any = TinyDecoder(1).layers[0]
        self.norm, self.mlp = layer.mlp_norm, layer.mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.mlp(self.norm(x))
        return out


class LongModel(nn.Module):
    """Two sublayers behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Sublayer() for _ in range(2))
        self.norm = TinyDecoder(1).norm

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.norm(x)
        return out


def long_graph(folder: Path, **options: Any) -> None:
    example = torch.zeros(1, 16_384, dtype=torch.int64)
    exported = torch.export.export(LongModel().eval(), (example,)).run_decompositions({})
    program = Program(exported, Source("module", "LongModel"), {"input_ids": example}, ("hidden",))
    spec = RouteSpec((0,), (Fraction(1, 2),), unit="mlp", **options)
    pipeline = standard_pipeline(attn_res=None, route=draw_parts(spec, WIDTH, 0), schedule="auto")
    ir.save(to_onnx(pipeline.run(program)), folder / MODEL)


@pytest.mark.parametrize("options", [{"rule": "budget"}, {"rule": "top-k", "window": 4096}], ids=["budget", "windows"])
def test_sixteen_thousand_tokens_build(options: dict[str, Any], tmp_path: Path) -> None:
    long_graph(tmp_path, **options)
    refuse_wide_selections(tmp_path / MODEL)
    assert built(tmp_path).bytes > 10_000


def test_more_slots_than_topk_returns_are_refused_before_the_build(tmp_path: Path) -> None:
    long_graph(tmp_path, rule="top-k")
    with pytest.raises(BuildError) as raised:
        refuse_wide_selections(tmp_path / MODEL)
    assert raised.value.code == "build.too-many-slots"
    assert raised.value.got == "8192 of 16384"
    with pytest.raises(BuildError) as refused:  # the limit is the builder's own
        built(tmp_path)
    assert "3840" in str(refused.value)


def test_thresholds_are_constants_of_an_engine_unless_asked_for(tmp_path: Path) -> None:
    import tensorrt_rtx as trt

    artifact = write_routed(tmp_path / "out", target="decomposed")
    tables = {"route_thresholds": (2,), "route_budgets": (2, 3), "route_states": (2, BATCH, 2)}
    for asked in (False, True):
        log = trt.Logger(trt.Logger.ERROR)
        network = trt.Builder(log).create_network(0)
        with network_model(artifact, route_inputs=asked) as (model, _):
            assert trt.OnnxParser(network, log).parse_from_file(str(model))
        found = {network.get_input(n).name: tuple(network.get_input(n).shape) for n in range(network.num_inputs)}
        found.pop("input_ids")
        assert found == (tables if asked else {})
    assert [path.name for path in artifact.root.iterdir() if path.name.startswith(".")] == []
    info = build(artifact, load_target("rtx"), compute_capabilities=["SM86"], route_inputs=True)
    assert any("inputs of the engine" in note for note in info.notes)
    Artifact.load(artifact.root)


def test_there_must_be_thresholds_to_ask_for(tmp_path: Path) -> None:
    artifact = write_routed(tmp_path / "out", target="decomposed", rule="top-k")
    with pytest.raises(UsageError) as raised:
        build(artifact, load_target("rtx"), compute_capabilities=["SM86"], route_inputs=True)
    assert raised.value.code == "build.no-route-inputs"
    assert onnx.load(str(artifact.model), load_external_data=False).graph.input[0].name == "input_ids"


SHARES = (Fraction(1, 8), Fraction(3, 4), Fraction(1))


@pytest.mark.parametrize("rule", ["budget", "top-k"])
def test_one_network_computes_what_the_graph_of_each_capacity_computes(rule: str, tmp_path: Path) -> None:
    artifact = write_routed(tmp_path / "out", SHARES, target="decomposed", rule=rule)
    model, slots = profiled_model(artifact)
    assert slots == ((3, 9, 13, 16) if rule == "budget" else (2, 8, 12, 16))
    (artifact.root / "one.onnx").write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    one, *each = (
        onnxruntime.InferenceSession(str(artifact.root / name), options, providers=["CPUExecutionProvider"])
        for name in ("one.onnx", MODEL, "model.c12.5.onnx", "model.c75.onnx", "model.c100.onnx")
    )
    for share, session in zip((Fraction(1, 2), *SHARES), each, strict=True):
        k = int(share * TOKENS) + (rule == "budget")
        tables = {
            "route_thresholds": np.full(2, 0.1, np.float32),
            "route_budgets": np.array([[share.numerator, share.denominator, 1]] * 2),
            "route_states": np.zeros((2, BATCH, 2), np.int64),
        }
        given = {**feed(), **(tables if rule == "budget" else {})}
        expected = session.run(None, given)[0]
        found = one.run(None, {**given, SLOTS: np.arange(min(k, TOKENS))})[0]
        assert np.abs(found - expected).max() <= tolerance("float32", "logits").allowed(float(np.abs(expected).max()))


def test_one_engine_serves_every_capacity(tmp_path: Path) -> None:
    artifact = write_routed(tmp_path / "out", SHARES, target="decomposed")
    info = build(artifact, load_target("rtx"), compute_capabilities=["SM86"], all_capacities=True)
    assert f"{SLOTS} of 3 to 16: its length is K." in info.notes
    assert info.bytes > 10_000


def test_graphs_that_differ_in_more_than_k_do_not_fit_into_one(tmp_path: Path) -> None:
    alone = write_routed(tmp_path / "alone", target="decomposed")
    several = write_routed(tmp_path / "several", SHARES[:1], target="decomposed")
    wide = onnx.load(str(several.model), load_external_data=False)
    next(node for node in wide.graph.node if node.op_type == "Softmax").op_type = "LogSoftmax"
    several.model.write_bytes(wide.SerializeToString())
    for artifact, got in ((alone, "1 graphs"), (several, "graphs with different operators")):
        with pytest.raises(UsageError) as raised:
            profiled_model(artifact)
        assert (raised.value.code, raised.value.got) == ("build.one-capacity", got)
