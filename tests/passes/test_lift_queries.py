"""Trained queries: files that fit and files that do not, and a lifted program on its way through training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from depthwire.errors import DepthwireError, PassError, UsageError
from depthwire.ir_text import to_text
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.lift_attn_res import READ, LiftAttnRes
from depthwire.passes.partition import Partition
from depthwire.passes.queries import QUERY_PREFIX, load_queries
from depthwire.passes.standard import canonical_pipeline
from tests.passes.parity import FP64, error, run
from tests.property.test_lift import attn_res
from tests.zoo import WIDTH, Spec, build, captured, inputs, program_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from depthwire.program import Program

READS = [1, 2, 3, 4]


def queries(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {f"{QUERY_PREFIX}{k}": torch.randn(WIDTH, generator=generator).to(dtype) for k in READS}


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path / "queries.safetensors")
    return path / "queries.safetensors"


def lift(program: Program, file: Path | None = None, partition: str = "full") -> Program:
    step = LiftAttnRes(Partition.parse(partition), queries=file)
    return Pipeline((*canonical_pipeline().passes, step)).run(program)


@pytest.mark.parametrize("partition", ["full", "block:3"])
def test_trained_queries_give_what_the_reference_gives(tmp_path: Path, partition: str) -> None:
    model, program = captured(Spec(norm="rms-hf"))
    file = saved(tmp_path, queries())
    lifted = lift(program, file, partition)
    by_read = {int(key.removeprefix(QUERY_PREFIX)): value for key, value in queries().items()}
    ids = inputs(seed=8)
    with torch.no_grad():
        expected = attn_res(model, ids, partition, by_read, "eps")
    assert error(run(lifted, ids), expected) <= FP64
    assert error(run(lifted, ids), run(program, ids)) > 1e-3
    assert lifted.history[-1].options["queries"] == str(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_queries_are_kept_in_fp32_or_wider(tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = load_queries(saved(tmp_path, queries(dtype)), READS, WIDTH)
    assert sorted(loaded) == READS
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for index, tensor in loaded.items():
        assert torch.equal(tensor, queries(dtype)[f"{QUERY_PREFIX}{index}"].to(wide))


def test_queries_of_a_narrow_model_are_fp32_parameters(tmp_path: Path) -> None:
    program = program_of(build(Spec(), dtype=torch.bfloat16), inputs())
    state = lift(program, saved(tmp_path, queries(torch.bfloat16))).exported.state_dict
    assert {state[key].dtype for key in queries()} == {torch.float32}


def refused(tmp_path: Path, tensors: dict[str, Tensor]) -> DepthwireError:
    with pytest.raises(PassError) as caught:
        load_queries(saved(tmp_path, tensors), READS, WIDTH)
    assert caught.value.exit_code == 4
    assert str(tmp_path) in str(caught.value.at)
    return caught.value


def test_a_missing_query(tmp_path: Path) -> None:
    given = queries()
    del given[f"{QUERY_PREFIX}2"], given[f"{QUERY_PREFIX}4"]
    error = refused(tmp_path, given)
    assert error.code == "queries.missing-key"
    assert error.got == "no attn_res.query.2, attn_res.query.4"
    assert error.want == "4 queries, attn_res.query.1 … attn_res.query.4"


@pytest.mark.parametrize("name", ["attn_res.query.0", "attn_res.query.10", "norm.weight"])
def test_an_extra_tensor(tmp_path: Path, name: str) -> None:
    error = refused(tmp_path, {**queries(), name: torch.zeros(WIDTH)})
    assert error.code == "queries.extra-key"
    assert error.got == name


@pytest.mark.parametrize(
    "tensor", [torch.zeros(WIDTH + 1), torch.zeros(1, WIDTH), torch.zeros(()), torch.zeros(WIDTH, dtype=torch.int32)]
)
def test_a_query_of_another_shape(tmp_path: Path, tensor: Tensor) -> None:
    error = refused(tmp_path, {**queries(), f"{QUERY_PREFIX}3": tensor})
    assert error.code == "queries.shape"
    assert error.want == f"floating point [{WIDTH}]"
    assert error.got == f"{tensor.dtype} {list(tensor.shape)}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_query_that_is_not_finite(tmp_path: Path, value: float) -> None:
    broken = torch.zeros(WIDTH)
    broken[3] = value
    error = refused(tmp_path, {**queries(), f"{QUERY_PREFIX}3": broken})
    assert error.code == "queries.not-finite"
    assert error.got == f"1 of {WIDTH} values are not finite"


@pytest.mark.parametrize("content", [None, b"", b"not a safetensors file", b"\x08\0\0\0\0\0\0\0{broken}"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "queries.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_queries(path, READS, WIDTH)
    assert caught.value.code == "queries.unreadable"
    assert caught.value.at == str(path)


def test_queries_of_another_partition_do_not_fit(tmp_path: Path) -> None:
    _, program = captured(Spec(layers=3))
    with pytest.raises(PassError) as caught:
        lift(program, saved(tmp_path, queries()))
    assert caught.value.code == "queries.missing-key"


def train(module: torch.nn.Module, parameters: Sequence[Tensor], steps: int) -> list[float]:
    """A few steps of gradient descent towards the next token."""
    optimizer = torch.optim.SGD(parameters, lr=0.02)
    losses = []
    for _ in range(steps):
        ids = inputs(seed=1)
        logits = module(ids)[0]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("what", ["queries", "everything"])
def test_a_lifted_program_is_trainable(tmp_path: Path, what: str) -> None:
    _, program = captured(Spec(tied=True))
    lifted = lift(program)
    module = lifted.module()
    named = dict(module.named_parameters())
    keys = [key for key in named if key.startswith(QUERY_PREFIX)]
    assert keys == [f"{QUERY_PREFIX}{index}" for index in READS]
    assert all(torch.count_nonzero(named[key]) == 0 for key in keys)
    # Copies, so that other tests find the shared weights as they were.
    for parameter in named.values():
        parameter.data = parameter.data.clone()
    trained = [named[key] for key in keys] if what == "queries" else list(named.values())
    losses = train(module, trained, 6)
    assert losses[-1] < losses[0] - 1e-3
    gradients = [named[key].grad for key in keys]
    assert all(gradient is not None and float(gradient.abs().max()) > 0 for gradient in gradients)

    tuned = lifted.with_state(module.state_dict())
    ids = inputs(seed=6)
    with torch.no_grad():
        expected = [*module(ids)]
    assert error(run(tuned, ids), expected) <= 1e-14
    assert error(run(tuned, ids), run(program, ids)) > 1e-4

    tuned.save(tmp_path / "tuned.pt2")
    loaded = torch.export.load(str(tmp_path / "tuned.pt2"))
    assert to_text(loaded, content=True) == to_text(tuned.exported, content=True)
    again = dict(loaded.module().named_parameters())
    assert all(isinstance(again[key], torch.nn.Parameter) and again[key].requires_grad for key in keys)

    file = saved(tmp_path, {key: named[key].detach().clone() for key in keys})
    if what == "queries":
        assert error(run(lift(program, file), ids), expected) <= 1e-14


def test_a_fine_tuned_module_exports_again() -> None:
    _, program = captured(Spec())
    module = lift(program, partition="block:2").module()
    exported = torch.export.export(module, (inputs(),), strict=False)
    reads = [node for node in exported.graph.nodes if node.target is READ]
    assert len(reads) == 4
    ids = inputs(seed=3)
    with torch.no_grad():
        assert torch.equal(exported.module()(ids)[0], module(ids)[0])
    again = program_of(module, inputs())
    with pytest.raises(PassError) as caught:
        LiftAttnRes().run(again)
    assert caught.value.code == "attn-res.already-lifted"
