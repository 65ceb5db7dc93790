"""Routing a trained model: SmolLM2-135M's own weights, its first layers where lengths make all of them slow.

The tolerance is that of fp32 hidden states; sets of selected tokens must be the same without any.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, get_args

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from depthwire.export.capture import capture
from depthwire.export.to_onnx import to_onnx
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.routing_ops import SELECT, SELECT_BUDGET
from depthwire.passes.route_tokens import RouteTokens
from depthwire.passes.standard import canonical_pipeline, standard_pipeline
from depthwire.route import KeysValues, RouteSpec
from depthwire.route_parts import RouteParts, draw_parts
from depthwire.runtime.tolerances import tolerance
from tests.e2e.conftest import TEXT

if TYPE_CHECKING:
    from pathlib import Path

    from depthwire.program import Program

pytestmark = pytest.mark.xdist_group("smollm2")

WIDTH, LAYERS, VALID = 576, 3, 300
HALF = Fraction(1, 2)


@pytest.fixture(scope="module")
def model(smollm2_dir: Path) -> Any:
    """The first layers and the final norm, without the head."""
    from transformers import AutoModel

    found = AutoModel.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    found.layers = found.layers[:LAYERS]
    found.config.num_hidden_layers = LAYERS
    found.config.use_cache = False
    return found


@pytest.fixture(scope="module")
def text(smollm2_dir: Path) -> Tensor:
    """Real text, one long row of token ids."""
    from transformers import AutoTokenizer

    found: Tensor = AutoTokenizer.from_pretrained(smollm2_dir)(
        TEXT.read_text(encoding="utf-8")[:12000], return_tensors="pt"
    )["input_ids"]
    return found


@dataclass(frozen=True)
class Bucket:
    """A routed program of one length and batch, in torch and in ONNX Runtime."""

    program: Program
    session: onnxruntime.InferenceSession
    selects: list[tuple[str, str]]

    def run(self, ids: Tensor, mask: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """Return states ``[B, T, d]`` and, for each routed layer, which tokens are selected ``[B, T]``; twice."""
        recorder = _Recorder(self.program)
        names = [name for pair in self.selects for name in pair]
        states, *values = self.session.run(
            [self.session.get_outputs()[0].name, *names], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        )
        pairs = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(values[::2], values[1::2], strict=True)]
        return [recorder(ids, mask), (torch.from_numpy(states), [_bits(*pair, ids.shape) for pair in pairs])]


class _Recorder:
    """The program, and what its selections were."""

    def __init__(self, program: Program) -> None:
        self._module = program.module()
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen = self._seen

        class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                if func in (SELECT, SELECT_BUDGET):
                    seen.append(out[:2])
                return out

        with Watch():  # type: ignore[no-untyped-call]
            states = _first(self._module, ids, mask)
        return states, [_bits(index, taken, ids.shape) for index, taken in seen]


def _first(module: Any, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out = module(*inputs)
    found: Tensor = out if isinstance(out, Tensor) else next(iter(out.values()))
    return found


def _states(program: Program, *inputs: Tensor) -> Tensor:
    return _first(program.module(), *inputs)


def _bits(index: Tensor, taken: Tensor, shape: torch.Size) -> Tensor:
    """Return which tokens are selected, ``[B, T]``."""
    return torch.zeros(shape, dtype=torch.bool).scatter(1, index, taken)


def captured(model: Any, batch: int, length: int) -> Program:
    ones = torch.ones(batch, length, dtype=torch.int64)
    return capture(model, example_inputs={"input_ids": ones, "attention_mask": ones.clone()})


def bucket(model: Any, batch: int, length: int, parts: RouteParts) -> Bucket:
    program = standard_pipeline(attn_res=None, route=parts).run(captured(model, batch, length))
    onnx_model = to_onnx(program)
    nodes = [node for node in onnx_model.graph if node.op_type.startswith("SelectTokens")]
    selects = [(str(node.outputs[0].name), str(node.outputs[1].name)) for node in nodes]
    proto = ir.to_proto(onnx_model)
    proto.graph.output.extend(type(proto.graph.output[0])(name=name) for pair in selects for name in pair)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Bucket(program, session, selects)


def parts_of(**options: Any) -> RouteParts:
    return draw_parts(RouteSpec((1, 2), (HALF,), **options), WIDTH, seed=1)


def padded(row: Tensor, length: int, side: str) -> tuple[Tensor, Tensor]:
    gap = length - row.shape[0]
    sides = (gap, 0) if side == "left" else (0, gap)
    pad = torch.nn.functional.pad
    return pad(row, sides, value=2), pad(torch.ones_like(row), sides)


def batch_of(*rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.stack([ids for ids, _ in rows]), torch.stack([mask for _, mask in rows])


def check(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance("float32", "hidden").allowed(float(want.abs().max()))


def check_rows(found: tuple[Tensor, list[Tensor]], mask: Tensor, rows: list[int], want: Any) -> None:
    """Compare a sequence, wherever it lies in a batch, with itself alone."""
    states, selected = found
    for row in rows:
        valid = mask[row].bool()
        check(states[row, valid], want[0][0])
        for bits, wanted in zip(selected, want[1], strict=True):
            assert torch.equal(bits[row, valid], wanted[0])
            assert not bits[row, ~valid].any()


@pytest.fixture(scope="module")
def alone(model: Any, text: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
    """The sequence by itself, without padding."""
    ids = text[:, :VALID]
    found = bucket(model, 1, VALID, parts_of()).run(ids, torch.ones_like(ids))
    check(found[0][0], found[1][0])
    assert len(found[0][1]) == 2
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(ours, theirs)
        assert 0 < int(ours.sum()) <= VALID // 2 + 1
    return found


def test_one_function_in_a_ragged_batch(model: Any, text: Tensor, alone: list[Any]) -> None:
    row = text[0, :VALID]
    filled = bucket(model, 3, 512, parts_of())
    ids, mask = batch_of(padded(row, 512, "left"), padded(row, 512, "right"), padded(text[0, 700:1212], 512, "left"))
    found = filled.run(ids, mask)
    for side, want in zip(found, alone, strict=True):
        check_rows(side, mask, [0, 1], want)

    # The rows in another order, one with another text from token 200 on: nothing of the future leaks, nor of a row.
    changed = ids.clone()
    changed[1, 200:VALID] = text[0, 1300 : 1300 + VALID - 200]
    order = torch.tensor([2, 0, 1])
    kept = mask.bool()
    kept[1, 200:] = False
    for (states, selected), (before, chosen) in zip(filled.run(changed[order], mask[order]), found, strict=True):
        check(states[kept[order]], before[order][kept[order]])
        for one, other in zip(selected, chosen, strict=True):
            assert torch.equal(one[kept[order]], other[order][kept[order]])
        assert not torch.equal(states[2, 200:VALID], before[1, 200:VALID])


@pytest.mark.parametrize(("length", "side"), [(1024, "left"), (2048, "right")])
def test_one_function_in_every_bucket(model: Any, text: Tensor, alone: list[Any], length: int, side: str) -> None:
    ids, mask = batch_of(padded(text[0, :VALID], length, side))
    for found, want in zip(bucket(model, 1, length, parts_of()).run(ids, mask), alone, strict=True):
        check_rows(found, mask, [0], want)


@pytest.mark.parametrize("equal", [False, True])
def test_exactly_k_tokens_are_selected(model: Any, text: Tensor, equal: bool) -> None:
    parts = parts_of(rule="top-k", score="mod")
    if equal:
        parts = dataclasses.replace(parts, tensors={name: torch.zeros_like(t) for name, t in parts.tensors.items()})
    length = 128
    ids, mask = batch_of(padded(text[0, :100], length, "left"), padded(text[0, 300:400], length, "right"))
    program = Pipeline((*canonical_pipeline().passes, RouteTokens(parts))).run(captured(model, 2, length))
    _, selected = _Recorder(program)(ids, mask)
    for bits in selected:
        assert bits.sum(1).tolist() == [length // 2] * 2
        assert not (bits & ~mask.bool()).any()
        if equal:
            assert bits[0, 28 : 28 + 64].all()
            assert bits[1, :64].all()


def test_all_tokens_are_the_dense_model(smollm2_dir: Path, text: Tensor) -> None:
    program = canonical_pipeline().run(capture(smollm2_dir, seq_len=32, batch=2, padding=True, dtype="fp32"))
    ids, mask = batch_of(padded(text[0, :32], 32, "left"), padded(text[0, 300:325], 32, "left"))
    valid = mask.bool()
    want = _states(program, ids, mask)[valid]
    for keys_values in get_args(KeysValues):
        drawn = draw_parts(RouteSpec(tuple(range(30)), (Fraction(1),), keys_values=keys_values), WIDTH, seed=0)
        every = {name: torch.full_like(t, -torch.inf) for name, t in drawn.tensors.items() if "threshold" in name}
        parts = dataclasses.replace(drawn, tensors={**drawn.tensors, **every})
        got = _states(Pipeline((RouteTokens(parts),)).run(program), ids, mask)[valid]
        assert float((got - want).abs().max()) <= tolerance("float32", "logits").allowed(float(want.abs().max()))
        assert torch.equal(got.argmax(-1), want.argmax(-1))
