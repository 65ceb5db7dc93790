"""cast_precision: the bulk of a program in half precision, with fp32 islands where rounding would hurt.

Before::  x f32 → rms_norm → linear(W f32)        After::  x f16 → to f32 → rms_norm → to f16 → linear(W f16)

Strongly typed builders (TensorRT 11, TensorRT for RTX) take the dtypes of the graph as they stand, so precision is
decided here and nowhere else. Which operator runs in which dtype is ``passes/analysis/precision.py``'s; weights that
only half-precision operators read are stored in it. Inputs and outputs of the program keep their dtypes.

Masks are filled with the lowest finite fp32 value, which half precision does not hold: such a fill becomes the lowest
finite value of the low dtype, so that a row that is hidden entirely stays free of NaN.

Left alone: a program that computes in half precision already, and values of other dtypes than fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.export.graph_signature import InputKind
from torch.fx.node import map_arg

from depthwire.passes._base import Pass, PassResult
from depthwire.passes._edit import GraphEditor, value_of_spec
from depthwire.passes._match import CASTS, aten, is_call, is_float, value
from depthwire.passes.analysis.precision import assign, floats, takes_dtype

if TYPE_CHECKING:
    from depthwire.passes.analysis.precision import Assignment
    from depthwire.program import Program

LOW = {"fp16": torch.float16, "bf16": torch.bfloat16}
_HUGE = 1e30
"""Beyond this a finite constant is a mask's fill and no number."""


@dataclass(frozen=True)
class CastPrecision(Pass):
    """Compute in half precision.

    Attributes:
        dtype: The low dtype.
        logits: ``fp32`` keeps the products whose results are outputs in fp32; ``same`` computes them in ``dtype``.
        arithmetic: ``fp32`` rounds the weights alone and computes in fp32: a twin that any runtime can run, with the
            very weights of the program it stands for.
    """

    name: ClassVar[str] = "cast_precision"
    changes_dtypes: ClassVar[bool] = True

    dtype: Literal["fp16", "bf16"] = "fp16"
    logits: Literal["same", "fp32"] = "same"
    arithmetic: Literal["same", "fp32"] = "same"

    def run(self, program: Program) -> PassResult:
        """Cast what ``assign`` says."""
        if any(each.dtype in LOW.values() for node in program.exported.graph.nodes for each in floats(node)):
            return PassResult(program, 0)
        assignment = assign(program, wide_logits=self.logits == "fp32")
        if not assignment.low:
            return PassResult(program, 0)
        edit = GraphEditor(program, self.name)
        caster = _Caster(edit, program, assignment, LOW[self.dtype], twin=self.arithmetic == "fp32")
        changed = caster.run()
        if not changed:
            return PassResult(program, 0)
        kept = ", ".join(f"{reason} {count}" for reason, count in assignment.islands.items()) or "nothing"
        note = f"{len(assignment.low)} calls in {self.dtype}; kept in fp32: {kept}"
        return PassResult(edit.finish(), changed, notes=(note,))

    def ensures(self, program: Program) -> list[str]:
        """Tell which calls mix floating dtypes that must agree, and products that are not in the low dtype."""
        if self.arithmetic == "fp32":
            return []
        low = LOW[self.dtype]
        wrong = []
        for node in program.exported.graph.nodes:
            if is_call(node, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.linear.default):
                dtypes = {value(arg).dtype for arg in node.all_input_nodes if is_float(arg)}
                if len(dtypes) != 1 or (dtypes == {low}) != (value(node).dtype == low):
                    wrong.append(f"{node.name} multiplies {', '.join(sorted(map(str, dtypes)))}")
        return wrong


@dataclass
class _Caster:
    edit: GraphEditor
    program: Program
    assignment: Assignment
    low: torch.dtype
    twin: bool
    casts: dict[tuple[torch.fx.Node, torch.dtype], torch.fx.Node] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    rounded: dict[object, torch.Tensor] = field(default_factory=dict)
    touched: set[torch.fx.Node] = field(default_factory=set)

    def run(self) -> int:
        """Cast everything; return how many nodes are new or have another value."""
        nodes = list(self.edit.graph.nodes)
        self._store_weights(nodes)
        for node in nodes:
            if node.op == "call_function":
                self._cast_operands(node)
        self._restore_outputs(nodes[-1])
        return len(self.touched)

    def _is_low(self, node: torch.fx.Node) -> bool:
        return node.name in self.assignment.low

    def _store_weights(self, nodes: list[torch.fx.Node]) -> None:
        """Store in the low dtype what only low operators read; a table that is gathered from is cast behind it."""
        exported = self.program.exported
        placeholders = {node.name: node for node in nodes if node.op == "placeholder"}
        for spec in exported.graph_signature.input_specs:
            if spec.arg.name not in self.assignment.weights:
                # Kept in fp32 for somebody else: whoever computes in the low dtype reads it through a cast, which an
                # exporter folds into a second, rounded copy. So the twin rounds there too.
                self.shared |= set() if spec.kind is InputKind.USER_INPUT else {spec.arg.name}
                continue
            tensor = value_of_spec(spec, exported.state_dict, exported.constants)
            rounded = self._rounded(tensor, fill=spec.kind is not InputKind.PARAMETER)
            if not (self.twin and torch.equal(rounded, tensor)):
                self.edit.retype(placeholders[spec.arg.name], rounded)
                self.touched.add(placeholders[spec.arg.name])

    def _rounded(self, tensor: torch.Tensor, *, fill: bool) -> torch.Tensor:
        """Return a tensor in the low dtype; one that two names share is shared again."""
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if key not in self.rounded:
            wide = tensor.detach()
            if fill and bool(((wide.abs() > _HUGE) & wide.isfinite()).any()):
                finfo = torch.finfo(self.low)
                wide = torch.where(wide.isfinite(), wide.clamp(finfo.min, finfo.max), wide)
            narrow = wide.to(self.low)
            self.rounded[key] = narrow.float() if self.twin else narrow
        return self.rounded[key]

    def _cast_operands(self, node: torch.fx.Node) -> None:
        low = self._is_low(node)
        wanted = self.low if low and not self.twin else torch.float32

        def cast(arg: torch.fx.Node) -> torch.fx.Node:
            if not is_float(arg) or not takes_dtype(node, arg) or value(arg).dtype == torch.float64:
                return arg
            if self.twin and low and arg.name in self.shared:
                return self._cast(self._cast(arg, self.low, node), torch.float32, node)
            if value(arg).dtype == wanted:
                return arg
            return self._cast(arg, wanted, node)

        before = (node.args, node.kwargs)
        if low:
            node.args = tuple(self._number(node, index, arg) for index, arg in enumerate(node.args))
        gathered = low and is_call(node, aten.embedding.default) and self._table_is_wide(node)
        # What has no schema only takes an operand apart; a cast takes what there is.
        if not gathered and getattr(node.target, "_schema", None) is not None and not is_call(node, *CASTS):
            node.args, node.kwargs = map_arg(node.args, cast), map_arg(node.kwargs, cast)
        if (node.args, node.kwargs) != before or any(arg in self.touched for arg in node.all_input_nodes):
            self.edit.refresh(node)
            self.touched.add(node)
        if gathered and not self.twin:
            # The cast stands behind the table's rows: the table itself is read in fp32 by somebody else.
            behind = self._cast(node, self.low, node.next)
            node.replace_all_uses_with(behind, lambda user: user is not behind)

    def _table_is_wide(self, node: torch.fx.Node) -> bool:
        table = node.args[0]
        return isinstance(table, torch.fx.Node) and table.op == "placeholder" and value(table).dtype == torch.float32

    def _cast(self, arg: torch.fx.Node, dtype: torch.dtype, before: torch.fx.Node) -> torch.fx.Node:
        key = (arg, dtype)
        if key not in self.casts:
            # Behind the operand, so that every later user finds it; inputs of the graph come before all calls.
            place = before if arg.op == "placeholder" else arg.next
            while place.op == "placeholder":
                place = place.next
            name = f"{arg.name}_{str(dtype).removeprefix('torch.')}"
            like = arg if "nn_module_stack" in arg.meta else before
            made = self.edit.call(aten.to.dtype, (arg, dtype), before=place, like=like, name=name)
            self.touched.add(made)
            self.casts[key] = made
        return self.casts[key]

    def _number(self, node: torch.fx.Node, index: int, arg: Any) -> Any:
        """Return a number among the operands as the graph's constant will hold it: in the low dtype.

        torch would multiply by the exact number, an ONNX constant has the dtype of the tensor beside it. Arguments that
        are attributes of an operator (an epsilon, the scale of attention) are no operands.
        """
        if not isinstance(arg, float) or not math.isfinite(arg) or _is_attribute(node, index):
            return arg
        finfo = torch.finfo(self.low)
        inside = max(finfo.min, min(finfo.max, arg)) if abs(arg) > _HUGE else arg
        return float(torch.tensor(inside, dtype=torch.float64).to(self.low))

    def _restore_outputs(self, output: torch.fx.Node) -> None:
        names = set(self.program.output_nodes)
        before = {node.name: value(node).dtype for node in self.program.exported.graph.nodes if node.name in names}

        def restore(arg: torch.fx.Node) -> torch.fx.Node:
            wanted = before.get(arg.name)
            if wanted is None or not is_float(arg) or value(arg).dtype == wanted:
                return arg
            return self._cast(arg, wanted, output)

        output.args = map_arg(output.args, restore)


def _is_attribute(node: torch.fx.Node, index: int) -> bool:
    target: Any = node.target
    arguments = target._schema.arguments
    return index < len(arguments) and "float" in str(arguments[index].type)
