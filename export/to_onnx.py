"""A program in, an ONNX model out: translation, clean-up, function bodies, checks.

The clean-up is onnxscript's and onnx-ir's own passes, without the pattern rewriter, which looks for
patterns that the program's own passes have dealt with. Value names stay the FX node names.
"""

from __future__ import annotations

import ast
import copy
import logging
import operator
from typing import TYPE_CHECKING

from depthwire._logs import logs_disabled
from depthwire.errors import ExportError
from depthwire.export._route_inputs import add_route_inputs, add_states_out
from depthwire.export._torch_onnx import Translator
from depthwire.export.ops import DOMAIN, OPERATORS
from depthwire.export.ops._base import VERSION
from depthwire.export.translations import translations
from depthwire.passes._match import is_call

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

    from depthwire.program import Program

MINIMUM_OPSET = 23  # RMSNormalization as one operator


def to_onnx(program: Program, *, opset: int = MINIMUM_OPSET, carry: bool = False) -> ir.Model:
    """Translate a program to an ONNX model with custom ops and their function bodies.

    Args:
        program: A program that has been through the standard passes.
        opset: ONNX opset, 23 or newer.
        carry: Return the counts of running budgets as one more output (``export/_route_inputs.py``).

    Returns:
        The model; its weights still point at the program's tensors.

    Raises:
        ExportError: The opset is too old, or an operator has no translation.
        UsageError: There are no counts to return.
    """
    import depthwire.ops  # noqa: F401 - registers the operators

    if opset < MINIMUM_OPSET:
        raise ExportError(
            "export.opset",
            "The opset is too old",
            at="--opset",
            want=f"{MINIMUM_OPSET} or newer (RMSNormalization)",
            got=str(opset),
            todo=f"Use --opset {MINIMUM_OPSET}.",
        )
    own = {custom.torch_op: custom.translation() for custom in OPERATORS}
    translator = Translator(opset, {**translations(), **own})
    exported = translator.decompose_missing(program.exported)
    if exported is program.exported:
        exported = copy.copy(exported)
    model = translator.translate(exported)
    _name_results(model, exported)
    _set_opset(model, opset)
    _name_interface(model, program)
    add_route_inputs(model)
    if carry:
        add_states_out(model)
    _clean(model)
    _attach_bodies(model, opset)
    _label(model)
    return model


def _name_results(model: ir.Model, exported: ExportedProgram) -> None:
    """Name the results of operators with several after the nodes that take them out, as all other values are named."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    for node in exported.graph.nodes:
        if is_call(node, operator.getitem):
            value = values.get(f"{node.args[0].name}__{node.args[1]}")
            if value is not None:
                value.name = node.name


def _set_opset(model: ir.Model, opset: int) -> None:
    """Raise the model's opset: most translations are written for opset 18, and newer operators sit among them."""
    from onnxscript import version_converter

    with logs_disabled(logging.WARNING):
        # No fallback to onnx's C++ converter: it would serialise the model with its weights.
        version_converter.convert_version(model, opset, fallback=False)
    model.graph.opset_imports[""] = opset


def _name_interface(model: ir.Model, program: Program) -> None:
    """Give inputs and outputs the program's names (an output that is an input as well keeps the input's)."""
    for value, name in zip(model.graph.outputs, program.output_names, strict=True):
        if not value.is_graph_input():
            value.name = name


def _clean(model: ir.Model) -> None:
    """Fold what is constant, remove what is unused, and store linear weights as the products read them."""
    from onnx_ir.passes import Sequential
    from onnx_ir.passes import common as passes
    from onnxscript import optimizer

    from depthwire.export._attention_heads import AttentionHeads
    from depthwire.export._quantized_weights import PackInt4, TransposeQuantized
    from depthwire.export._transpose_weights import TransposeWeights

    with logs_disabled(logging.WARNING):
        # First, because folding would copy every transposed weight and name it val_101.
        Sequential(TransposeWeights(), PackInt4(), TransposeQuantized())(model)
        optimizer.fold_constants(model, onnx_shape_inference=False, should_fold=_should_fold)
        Sequential(
            passes.IdentityEliminationPass(),
            passes.RemoveUnusedNodesPass(),
            passes.CommonSubexpressionEliminationPass(),
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            AttentionHeads(),
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedOpsetsPass(),
        )(model)
    _merge_folded(model)


def _should_fold(node: ir.Node) -> bool | None:
    """Keep the transpose of a tied weight in the graph (folding would store the weight twice); default elsewhere."""
    weight = node.inputs[0] if node.op_type == "Transpose" else None
    return False if weight is not None and weight.is_initializer() else None


def _merge_folded(model: ir.Model) -> None:
    """Let equal constants that folding made (shapes, axes) share one initializer.

    Weights are left alone, equal or not: sixty zero queries are sixty parameters.
    """
    import onnx_ir as ir

    known: dict[object, ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        # The exporter's tensor for a weight is a subclass.
        if type(tensor) is not ir.Tensor or value.is_graph_output() or value.is_graph_input():
            continue
        first = known.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)
            del model.graph.initializers[name]


def _attach_bodies(model: ir.Model, opset: int) -> None:
    """Attach one function body per custom operator in use: the file then runs in any conforming runtime."""
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_identifier() in model.functions:
            continue
        custom = next(custom for custom in OPERATORS if custom.handles(node.op_type))
        function = custom.body(node, opset=opset)
        model.functions[function.identifier()] = function
        model.graph.opset_imports[DOMAIN] = VERSION


_MODULE = "pkg.torch.onnx.name_scopes"
_MODULE_KEY = "depthwire.module"


def _label(model: ir.Model) -> None:
    """Name every node after its first output and leave, of the exporter's metadata, its module path.

    Profilers and viewers then show FX names; stack traces, which hold the paths of the machine, do not travel.
    """
    seen: set[str] = set()
    for node in model.graph:
        stem = node.outputs[0].name or node.op_type
        name, number = stem, 1
        while name in seen:
            name, number = f"{stem}_{number}", number + 1
        seen.add(name)
        node.name = name
        scopes = node.metadata_props.get(_MODULE)
        node.metadata_props.clear()
        if scopes is not None:
            path = [scope for scope in ast.literal_eval(scopes) if scope]
            if len(path) > 1:
                node.metadata_props[_MODULE_KEY] = path[-2]
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
