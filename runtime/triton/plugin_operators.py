"""What TensorRT must know of each custom operator: operands, shapes, dtypes, the launch, and what it passes besides.

Extents are written with the dimensions of a node's inputs, so that one plugin serves every shape: TensorRT evaluates
them for the shapes of a profile, and again at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from depthwire.errors import BuildError
from depthwire.runtime.triton.bundle import operators_of, read_kernel, untyped
from depthwire.runtime.triton.plugin_ptx import argument_name
from depthwire.runtime.triton.routing_bundle import is_routing, plugin_kernel
from depthwire.runtime.triton.spec import KernelSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnx import ModelProto, NodeProto

    from depthwire.runtime.triton.compile import Spec
    from depthwire.runtime.triton.routing_spec import RoutingSpec

NAMESPACE: Final = "depthwire"
"""Of the plugins: the domain of the operators."""

DTYPES: Final[dict[int, str]] = {
    1: "FP32",
    3: "INT8",
    6: "INT32",
    7: "INT64",
    9: "BOOL",
    10: "FP16",
    16: "BF16",
}
"""TensorRT's names of ONNX's element types; others it does not pass to a plugin."""

_TRT: Final = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int64": "INT64", "int8": "BOOL"}


@dataclass(frozen=True)
class Extent:
    """A product of dimensions of one input, or in a shape those dimensions themselves.

    Attributes:
        of: The input.
        start: First dimension.
        stop: The one behind the last, negative from the end; ``None`` for all.
        per: What the product is divided by, rounded up.
    """

    of: str
    start: int = 0
    stop: int | None = None
    per: int = 1

    def as_json(self) -> dict[str, Any]:
        """Return it as the plugin module reads it."""
        return {"of": self.of, "dims": [self.start, self.stop], "per": self.per}


Product = tuple["int | Extent", ...]


@dataclass(frozen=True)
class Operator:
    """One kernel at the dtypes of one node: what a plugin's variant is.

    Attributes:
        op_type: Name in the ONNX file and of the plugin.
        spec: The kernel.
        inputs: The node's inputs in their order.
        arguments: Integers that TensorRT passes behind the inputs, by their name among the kernel's parameters.
        outputs: Shapes of the node's outputs, in their order.
        dtypes: TensorRT's name of each input's and output's dtype.
        grid: Thread blocks.
    """

    op_type: str
    spec: Spec
    inputs: tuple[str, ...]
    arguments: dict[str, Extent]
    outputs: dict[str, tuple[Extent, ...]]
    dtypes: dict[str, str]
    grid: Product

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all that TensorRT passes to the kernel, in its order."""
        return (*self.inputs, *self.arguments, *self.outputs)

    @property
    def identity(self) -> tuple[str, ...]:
        """What two nodes must share to be one variant."""
        return (self.op_type, self.spec.key, *self.dtypes.values())


def plugin_operators(model: ModelProto) -> list[tuple[NodeProto, Operator]]:
    """Return the custom operators of a file, node by node.

    Raises:
        BuildError: ``triton.untyped``; ``plugin.dtype`` for an operand whose dtype TensorRT does not pass to a plugin.
        UsageError: ``triton.bad-spec`` for an operator of which there is no kernel.
    """
    nodes, types = operators_of(model)
    return [(node, operator_of(node, types)) for node in nodes]


def operator_of(node: NodeProto, types: Mapping[str, tuple[int, tuple[int, ...]]]) -> Operator:
    """Return the operator of a node; errors as ``plugin_operators``."""
    if is_routing(node.op_type):
        spec = plugin_kernel(node, types)
        if spec is None:
            raise untyped(node, types)
        return _routing(node, spec, types)
    return depth_operator(read_kernel(node, types))


def variants_of(operators: Sequence[Operator]) -> dict[str, list[Operator]]:
    """Return the different operators by their name, in their order: a node's place in the list is its variant."""
    found: dict[str, dict[tuple[str, ...], Operator]] = {}
    for operator in operators:
        found.setdefault(operator.op_type, {}).setdefault(operator.identity, operator)
    return {name: list(variants.values()) for name, variants in found.items()}


def depth_operator(spec: KernelSpec) -> Operator:
    """Return the operator of a depth-attention kernel."""
    # A merge without sources of its own has the shape of the inter-block result, whose first dimension is queries.
    like, lead = ("source_0", 0) if spec.count else ("inter_out", 1)
    outputs: dict[str, tuple[Extent, ...]] = dict.fromkeys(spec.outputs, (Extent(like, lead),))
    if spec.kind == "inter":
        queries = Extent("queries", 0, 1)
        outputs = {"out": (queries, Extent(like)), "lse": (queries, Extent(like, 0, -1))}
    return Operator(
        op_type=spec.op_type,
        spec=spec,
        inputs=spec.inputs,
        arguments={},
        outputs=outputs,
        dtypes={name: _TRT[spec.dtype_of(name)] for name in (*spec.inputs, *spec.outputs)},
        grid=(Extent(like, lead, -1), spec.launch.programs),
    )


def tactics_of(operator: Operator) -> list[Operator]:
    """Return an operator and the other ways to launch it, among which TensorRT chooses by timing them."""
    if isinstance(operator.spec, KernelSpec):
        return [depth_operator(spec) for spec in operator.spec.alternatives]
    return [operator]


def _routing(node: NodeProto, spec: RoutingSpec, types: Mapping[str, tuple[int, tuple[int, ...]]]) -> Operator:
    selects = spec.kind in ("select", "budget")
    inputs = (*spec.inputs, "slots") if selects else spec.inputs
    dtypes = {name: _TRT.get(spec.dtype_of(name), "") for name in (*inputs, *spec.outputs)}
    if selects:
        batch, tokens, slots = Extent("score", 0, 1), Extent("score", 1, 2), Extent("slots", 0, 1)
        outputs: dict[str, tuple[Extent, ...]] = dict.fromkeys(spec.outputs, (batch, slots))
        outputs |= {"state_out": (Extent("state"),)} if spec.kind == "budget" else {}
        grid: Product = (batch,)
        dtypes["slots"] = "INT64"
    else:
        base = {"gather": "x", "scatter": "base", "surprise": "delta"}[spec.kind]
        batch, tokens, slots = Extent(base, 0, 1), Extent(base, 1, 2), Extent("index", 1, 2)
        shapes: dict[str, tuple[Extent, ...]] = {
            "gather": (batch, slots, Extent(base, 2)),
            "scatter": (Extent(base),),
            "surprise": (batch, tokens),
        }
        outputs = dict.fromkeys(spec.outputs, shapes[spec.kind])
        split = slots if spec.kind == "gather" else tokens
        grid = (batch, Extent(split.of, split.start, split.stop, per=spec.launch.tile))
    if spec.kind in ("gather", "scatter"):
        moved = _dtype(node, types[node.input[0]][0])
        dtypes |= dict.fromkeys({"x", "base", "rows", "out"} & set(dtypes), moved)
    extents = {"tokens": tokens, "slots": slots}
    return Operator(
        op_type=node.op_type,
        spec=spec,
        inputs=inputs,
        arguments={argument_name(name): extents[name] for name in spec.scalars},
        outputs=outputs,
        dtypes=dtypes,
        grid=grid,
    )


def _dtype(node: NodeProto, element: int) -> str:
    if element not in DTYPES:
        raise BuildError(
            "plugin.dtype",
            "TensorRT does not pass this dtype to a plugin",
            at=node.name or node.output[0],
            want=f"one of {', '.join(DTYPES.values())}",
            got=f"ONNX element type {element}",
            todo="Convert the model with --precision fp32, fp16 or bf16.",
        )
    return DTYPES[element]
