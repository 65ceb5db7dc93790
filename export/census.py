"""Counts the dtypes of a translated graph, and checks that they are the ones that were asked for.

A builder that quietly made fp32 of a float16 request is the oldest trap of deployment. Builders of strongly typed
networks take the graph at its word, so it is the graph that must be looked at.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from depthwire.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

    from depthwire.program import Program

_PRODUCTS = ("MatMul", "Gemm", "Attention", "Conv", "ConvTranspose", "Einsum")
_DTYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
_STORED = {"int8": "INT8", "int4-weights": "INT4"}


def census(model: ir.Model) -> dict[str, int]:
    """Return how many values of the main graph have which dtype, inputs and weights included."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [value for node in model.graph for value in node.outputs if value.name]
    found = Counter("unknown" if value.dtype is None else value.dtype.name.lower() for value in values)
    return dict(found.most_common())


def check_census(model: ir.Model, *, asked: str, rest: str, wide_products: int) -> None:
    """Check that a graph computes in the dtypes that were asked for.

    Args:
        model: The translated graph.
        asked: ``fp16``, ``bf16``, ``int8`` or ``int4-weights``.
        rest: Dtype of what is not quantised: ``fp32``, ``fp16`` or ``bf16``.
        wide_products: Products that may be fp32: those of scores, and of the logits where that was asked for.

    Raises:
        ExportError: ``export.precision``: a product in another dtype, a value without one, or no quantised weight.
    """
    if _untyped(model):
        # What translations put between an operator's operands and its result; their types follow from their inputs.
        from onnx_ir.passes.common import ShapeInferencePass

        ShapeInferencePass()(model)
    if untyped := _untyped(model):
        raise _refused(str(untyped[0]), "a dtype for every value", f"{len(untyped)} values without one")
    wrong = [node for node in model.graph if node.op_type in _PRODUCTS and _dtype(node.inputs[0]) != _DTYPES[rest]]
    wide = [node for node in wrong if _dtype(node.inputs[0]) == "FLOAT"]
    if len(wide) < len(wrong) or len(wide) > wide_products:
        raise _refused(
            str(wrong[-1].name),
            f"products in {_DTYPES[rest]}, {wide_products} of them in FLOAT",
            f"{len(wide)} in FLOAT, {len(wrong) - len(wide)} in others",
        )
    stored = _STORED.get(asked)
    held = {_dtype(value) for value in model.graph.initializers.values()}
    if stored is not None and stored not in held:
        raise _refused("initializers", f"weights stored as {stored}", ", ".join(sorted(held)))


def check_scales(model: ir.Model, program: Program) -> None:
    """Check that a graph rounds the inputs of its layers where the program does, with the same scales.

    Raises:
        ExportError: ``export.precision``.
    """
    exported = program.exported
    values = {**exported.constants, **exported.state_dict}
    held = {spec.arg.name: values.get(str(spec.target)) for spec in exported.graph_signature.input_specs}
    wanted: Counter[float] = Counter()
    for node in exported.graph.nodes:
        if getattr(getattr(node.target, "_schema", None), "name", "") == "depthwire::quantize":
            scale: Any = held[str(node.args[1])]
            wanted[float(scale)] += 1
    found: Counter[float] = Counter()
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and node.inputs[1] is not None:
            tensor = node.inputs[1].const_value
            found[float("nan") if tensor is None else float(tensor.numpy())] += 1
            users = [use.node for use in node.outputs[0].uses()]
            if any(user.op_type != "DequantizeLinear" or user.inputs[1] is not node.inputs[1] for user in users):
                raise _refused(str(node.name), "one scale to round by and to multiply with", "another")
    if wanted != found:
        other = (wanted - found) + (found - wanted)
        raise _refused(
            "QuantizeLinear", f"{sum(wanted.values())} roundings", f"{sum(found.values())}, {len(other)} scales differ"
        )


def weight_sizes(model: ir.Model) -> tuple[int, int]:
    """Return the stored bytes of the weights, embeddings apart: (all others, what is gathered from by row)."""
    tables = {node.inputs[0] for node in model.graph if node.op_type == "Gather" and node.domain == ""}
    sizes = {v: v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None}
    embedding = sum(size for value, size in sizes.items() if value in tables)
    return sum(sizes.values()) - embedding, embedding


def _untyped(model: ir.Model) -> list[str]:
    return [str(value.name) for node in model.graph for value in node.outputs if value.name and value.dtype is None]


def _dtype(value: ir.Value | None) -> str:
    return "" if value is None or value.dtype is None else value.dtype.name


def _refused(at: str, want: str, got: str) -> ExportError:
    return ExportError(
        "export.precision",
        "The written graph does not have the precision that was asked for",
        at=at,
        want=want,
        got=got,
        todo="Report this with the model's configuration.",
    )
