"""Thresholds, budgets and counts of a running budget as inputs of the ONNX graph that have defaults.

An initialiser that is listed among the graph's inputs is its default: a caller that gives nothing gets it, one that
gives a value runs with that one, call by call, and no optimisation may fold it. Parsers of TensorRT take it for a
constant.

    route_thresholds  [n]        least score of a candidate, per routed unit in the order of the graph
    route_budgets     [n, 3]     numerator, denominator and margin
    route_states      [n, B, 2]  tokens seen and taken before this call's; zeros at the start of a sequence
    route_states_out  [n, B, 2]  the same behind this call's, if the graph is to carry it
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from depthwire.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

_TABLES = {"route.thresholds": "route_thresholds", "route.budgets": "route_budgets", "route.states": "route_states"}
STATES_OUT = "route_states_out"
_BUDGET = "SelectTokensBudget_"


def add_route_inputs(model: ir.Model) -> None:
    """Let the tables that the routing pass made be given by the caller. A graph without them stays as it is.

    To be called before anything is folded.
    """
    for name, public in _TABLES.items():
        value = model.graph.initializers.pop(name, None)
        if value is None:
            continue
        tensor = value.const_value
        assert tensor is not None  # noqa: S101 - an initialiser
        value.name = public
        # Of an own type, not the exporter's: three small arrays that are written with the graph.
        value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=public)
        model.graph.initializers[public] = value
        model.graph.inputs.append(value)


def add_states_out(model: ir.Model) -> None:
    """Return the counts behind the last token, so that the next chunk can start with them.

    Raises:
        UsageError: ``route.carry``: nothing is routed by a running budget.
    """
    states = [node.outputs[2] for node in model.graph if node.op_type.startswith(_BUDGET)]
    if not states:
        raise UsageError(
            "route.carry",
            "There is no count to carry from one chunk to the next",
            at="--route-carry",
            want="layers routed by a running budget",
            got="none",
            todo="Leave --route-carry out, or route with --route-rule budget.",
        )
    axis = ir.Value(name="route_states_axis", const_value=ir.tensor([0], name="route_states_axis"))
    axis.shape, axis.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
    model.graph.initializers["route_states_axis"] = axis
    rows = [_node("Unsqueeze", [state, axis], f"{STATES_OUT}_{number}") for number, state in enumerate(states)]
    joined = _node("Concat", [row.outputs[0] for row in rows], STATES_OUT, axis=0)
    shape = states[0].shape
    assert shape is not None  # noqa: S101 - graphs are static
    result = joined.outputs[0]
    result.shape, result.type = ir.Shape([len(states), *shape.dims]), ir.TensorType(ir.DataType.INT64)
    for row in rows:
        row.outputs[0].shape, row.outputs[0].type = ir.Shape([1, *shape.dims]), ir.TensorType(ir.DataType.INT64)
    model.graph.extend([*rows, joined])
    model.graph.outputs.append(result)


def _node(kind: str, operands: Sequence[ir.Value], name: str, **attributes: int) -> ir.Node:
    node = ir.node(kind, list(operands), attributes=attributes, name=name)
    node.outputs[0].name = name
    return node
