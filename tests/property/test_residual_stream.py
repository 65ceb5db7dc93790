from __future__ import annotations

import warnings
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from depthwire.passes.analysis.residual_stream import ResidualStream, find_residual_stream
from depthwire.passes.standard import canonical_pipeline
from tests.passes.parity import node_values
from tests.property.strategies import fixed, specs
from tests.zoo import Spec, Transformer, captured, inputs, truth

if TYPE_CHECKING:
    from torch import Tensor

    from depthwire.program import Program


def eager_states(model: Transformer, ids: Tensor) -> list[Tensor]:
    """The stream's values x_0, x_1, …, one more than there are sublayers."""
    x = model.embedding(ids)
    states = [x]
    for layer in model.blocks():
        for step, norm in zip(layer.steps(), (layer.norm_3, layer.norm_4), strict=False):
            x = layer.write(x, layer.branches(step, x))
            states.append(x)
            if model.spec.placement == "post" and norm is not None:
                x = norm(x)
    return states


def check_structure(spec: Spec, model: Transformer, program: Program) -> ResidualStream:
    """The analysis finds what the spec put there; its values are those of the eager model."""
    expected = truth(spec)
    stream = find_residual_stream(program)
    assert tuple(sublayer.kind for sublayer in stream.sublayers) == expected.kinds
    assert tuple(sublayer.module for sublayer in stream.sublayers) == expected.modules
    assert tuple(len(state.norms) for state in stream.states) == expected.norms
    found = {(item.code, item.at.partition(" (")[0]) for item in stream.breaks}
    assert found == expected.breaks
    assert stream.streams == 1

    ids = inputs(seed=7)
    values = node_values(program, ids)
    with torch.no_grad():
        states = eager_states(model, ids)
    for state, value in zip(stream.states, states, strict=True):
        torch.testing.assert_close(values[state.node.name].reshape(value.shape), value, rtol=0, atol=1e-11)
    return stream


def check_sum(spec: Spec, stream: ResidualStream, program: Program) -> None:
    """Every state is the state before, scaled, plus what was written in between."""
    values = node_values(program, inputs(seed=3))
    for (before, after), sublayer in zip(pairwise(stream.states), stream.sublayers, strict=True):
        state = values[before.node.name]
        for write in sublayer.writes:
            state = state.reshape(values[write.branch.name].shape) * write.skip_scale
            state = state + write.alpha * values[write.branch.name]
        torch.testing.assert_close(values[after.node.name], state, rtol=0, atol=1e-11)
    # A write of two branches at once has no one factor: each branch has its own inside.
    joined = spec.block != "sequential" and spec.order in ("x+(a+m)", "(m+a)+x")
    scale = 0.5 if spec.branch_scale == "alpha" or (spec.branch_scale == "float" and not joined) else 1.0
    assert all(write.scale == scale for sublayer in stream.sublayers for write in sublayer.writes)


def functional(program: Program) -> Program:
    """The program as torch functionalises it, with other operators for copies, casts and reshapes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        return program.replace(exported=program.exported.run_decompositions({}))


@fixed(20)
@example(
    spec=Spec(norm="rms-hf", block="parallel-two", multiplier=4.0, mlp="swiglu", hidden=16, dropout=0.1),
    form="exported",
)
@given(spec=specs(), form=st.sampled_from(["exported", "functional", "canonical"]))
def test_the_analysis_finds_what_is_there(spec: Spec, form: str) -> None:
    model, program = captured(spec)
    if form == "functional":
        program = functional(program)
    if form == "canonical":
        program = canonical_pipeline().run(program)
    stream = check_structure(spec, model, program)
    if spec.placement in ("pre", "sandwich"):
        check_sum(spec, stream, program)
