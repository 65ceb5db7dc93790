"""Rewrites an ONNX graph for an older parser: without functions, or operators that it lacks, in a lower operator set.

- Functions: each call is replaced by the function's body (``onnx.inliner``), under names of its own.
- Operators: each is replaced by the body that the ONNX standard itself gives it.
- Arithmetic on shapes, of which the standard's bodies are full, is done here: TensorRT wants axes to be constants.
- Operator set: the number is lowered where every node means the same in the lower set; the values do not change.

The caller proves the result: a bundle runs it in ONNX Runtime against the goldens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthwire.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

# Operators of which the sets 19 to 24 widened the types alone, or added attributes whose default is the old meaning.
_SAME_MEANING = frozenset(
    {
        "Cast",
        "CastLike",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "Cos",
        "DequantizeLinear",
        "Equal",
        "Flatten",
        "Identity",
        "If",
        "IsInf",
        "IsNaN",
        "Loop",
        "Pad",
        "QuantizeLinear",
        "ReduceMax",
        "ReduceMin",
        "Reshape",
        "Round",
        "Scan",
        "Shape",
        "Sin",
        "Size",
        "Softplus",
        "Squeeze",
        "TopK",
        "Transpose",
        "Unsqueeze",
    }
)


@dataclass(frozen=True)
class Lowered:
    """A graph for an older parser.

    Attributes:
        model: The graph.
        notes: What was done, and where the operator set is newer than the parser documents.
    """

    model: ModelProto
    notes: tuple[str, ...]


def lower(model: ModelProto, *, missing: Collection[str], expand_functions: bool, parser_opset: int | None) -> Lowered:
    """Return the graph in a form that a parser reads; the one given stays as it is.

    Args:
        model: The graph; its weights may lie outside.
        missing: Standard operators that the parser lacks.
        expand_functions: Whether it must see no function.
        parser_opset: Newest operator set that it documents, ``None`` where that is unknown.

    Raises:
        BuildError: ``bundle.operator``: it lacks an operator that cannot be spelled out.
    """
    import onnx
    from onnx import inliner

    notes: list[str] = []
    bodies = {function.name for function in model.functions if _kinds(function.node) & set(missing)}
    if model.functions and (expand_functions or bodies):
        notes.append(f"{len(model.functions)} functions put in place of their calls")
        model = inliner.inline_local_functions(model)
    absent = sorted(_kinds(model.graph.node) & set(missing))
    if absent:
        _require_bodies(model, absent)
        # The standard's bodies depend on the operands' types.
        typed = _describe_weights(onnx.shape_inference.infer_shapes(model, check_type=True, data_prop=True))
        model = inliner.inline_selected_functions(typed, [("", name) for name in absent], inline_schema_functions=True)
        notes.append(f"spelled out: {', '.join(absent)}")
    left = sorted(_kinds(model.graph.node) & set(missing))
    if left:
        raise _refused(left, "their own bodies use them")
    if notes:
        model = _fold_integers(model)
    if parser_opset is not None:
        notes += _lower_opset(model, parser_opset)
    return Lowered(model, tuple(notes))


def _describe_weights(model: ModelProto) -> ModelProto:
    """Give every initializer a ``value_info``, where alone the inliner looks for types; in place."""
    from onnx import helper

    known = {value.name for value in (*model.graph.input, *model.graph.value_info)}
    for tensor in model.graph.initializer:
        if tensor.name not in known:
            described = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            model.graph.value_info.append(described)
    return model


def _require_bodies(model: ModelProto, names: Iterable[str]) -> None:
    import onnx

    version = _opset(model)
    schemas: dict[str, Any] = {name: onnx.defs.get_schema(name, version) for name in names}
    without = [
        name for name, schema in schemas.items() if not (schema.has_function or schema.has_context_dependent_function)
    ]
    if without:
        raise _refused(without, "the standard gives them no body")


def _fold_integers(model: ModelProto) -> ModelProto:
    """Compute what integers and bits follow from static shapes and constants; no weight is touched."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedOpsetsPass
    from onnxscript import optimizer

    integers = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}
    folded = ir.from_proto(model)
    types = {value.name: value.type for node in folded.graph for value in node.outputs if value.type is not None}
    optimizer.fold_constants(
        folded,
        onnx_shape_inference=True,
        should_fold=lambda node: all(output.dtype in integers for output in node.outputs),
    )
    # Of an operator of ours whose schema is registered, as after an export in this process, onnx infers a shape and no
    # type, and forgets the one that was known.
    for value in (output for node in folded.graph for output in node.outputs):
        if value.type is None:
            value.type = types.get(value.name)
    RemoveUnusedOpsetsPass()(folded)
    return ir.to_proto(folded)


def _refused(names: Collection[str], why: str) -> BuildError:
    return BuildError(
        "bundle.operator",
        "The target's TensorRT lacks operators of the graph, and they cannot be spelled out",
        at=", ".join(names),
        want="operators that its parser reads, or that have a body of older ones",
        got=why,
        todo="Choose a newer TensorRT (--jetpack), or convert the model for this target.",
    )


def _lower_opset(model: ModelProto, wanted: int) -> Iterator[str]:
    """Lower the number of the standard operator set, in place, as far as the nodes let it; yield what was done."""
    import onnx

    current = _opset(model)
    if current <= wanted:
        return
    holding: dict[int, str] = {}
    every = [*_nodes(model.graph.node), *(node for f in model.functions for node in _nodes(f.node))]
    for node in every:
        least = next(version for version in range(wanted, current + 1) if _means_the_same(node, version, current))
        holding.setdefault(least, f"{node.op_type} ({node.name or node.output[0]})")
    reached = max(holding, default=wanted)
    for node in every:
        for attribute in _defaults_unknown_to(node, reached, current):
            node.attribute.remove(attribute)
    for imports in (model.opset_import, *(function.opset_import for function in model.functions)):
        for entry in imports:
            if entry.domain == "":
                entry.version = min(entry.version, reached)
    model.ir_version = min(
        model.ir_version, onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    )
    if reached < current:
        yield f"operator set {reached} instead of {current}"
    if reached > wanted:
        yield f"{holding[reached]} needs operator set {reached}; the parser documents {wanted}"


def _means_the_same(node: NodeProto, version: int, current: int) -> bool:
    import onnx

    if node.domain not in {"", "ai.onnx"}:
        return True
    new = onnx.defs.get_schema(node.op_type, current)
    if new.since_version <= version:
        return True
    try:
        old = onnx.defs.get_schema(node.op_type, version)
    except onnx.defs.SchemaError:  # it did not exist then
        return False
    given = {attribute.name for attribute in node.attribute} - set(old.attributes)
    spare = {attribute.name for attribute in _defaults_unknown_to(node, version, current)}
    return node.op_type in _SAME_MEANING and given <= spare and len(node.input) <= old.max_input


def _defaults_unknown_to(node: NodeProto, version: int, current: int) -> list[AttributeProto]:
    """Return the attributes that a lower set lacks and that say what is so without them."""
    import onnx

    if node.domain not in {"", "ai.onnx"} or node.op_type not in _SAME_MEANING:
        return []
    new, old = (onnx.defs.get_schema(node.op_type, number) for number in (current, version))
    return [
        attribute
        for attribute in node.attribute
        if attribute.name not in old.attributes and _is_default(attribute, new.attributes[attribute.name].default_value)
    ]


def _is_default(attribute: AttributeProto, default: AttributeProto) -> bool:
    from onnx import helper

    if not default.type or attribute.type != default.type or attribute.ref_attr_name:
        return False
    return bool(helper.get_attribute_value(attribute) == helper.get_attribute_value(default))


def _opset(model: ModelProto) -> int:
    return next(int(entry.version) for entry in model.opset_import if entry.domain in {"", "ai.onnx"})


def _kinds(nodes: Iterable[NodeProto]) -> set[str]:
    """Return the standard operators of some nodes and their subgraphs."""
    return {node.op_type for node in _nodes(nodes) if node.domain in {"", "ai.onnx"}}


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            graphs: list[GraphProto] = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
            for graph in graphs:
                yield from _nodes(graph.node)
