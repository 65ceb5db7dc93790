"""The torch side of the comparison: a Polygraphy runner for a program, and its intermediate values by name."""

from __future__ import annotations

import time
from collections import OrderedDict
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind, TensorArgument
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from depthwire.errors import BuildError, InternalError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch.fx import Graph, Node

    from depthwire.program import Program


class TorchExportedRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy has no types
    """Runs a captured program with torch, on the CPU and in the dtypes of its graph.

    Takes and returns numpy arrays (``ml_dtypes.bfloat16`` for bf16) by the program's input and output names. The module
    is built on activation and let go on deactivation; it shares its weights with the program.
    """

    def __init__(self, program: Program, *, name: str) -> None:
        """Hold the program under the name that the results go by."""
        super().__init__(name=name)
        self._program = program

    def activate_impl(self) -> None:
        """Build the module."""
        self._module = self._program.module()

    def deactivate_impl(self) -> None:
        """Let the module go."""
        del self._module

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return name, dtype and static shape of every input."""
        metadata = TensorMetadata()
        for name, value in _input_values(self._program).items():
            metadata.add(name, dtype=value.dtype, shape=[int(size) for size in value.shape])
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> OrderedDict[str, NDArray[Any]]:
        """Run once.

        Raises:
            BuildError: torch fails (``verify.torch-failed``).
        """
        program = self._program
        args, kwargs = pytree.tree_unflatten(_user_arguments(program, feed_dict), program.exported.call_spec.in_spec)
        start = time.perf_counter()
        try:
            with torch.no_grad():
                result = self._module(*args, **kwargs)
        except Exception as error:
            raise BuildError(
                "verify.torch-failed",
                "The captured program does not run in torch",
                at=f"{self.name} ({program.source.reference})",
                want="a forward pass with the given inputs",
                got=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
                todo="Check memory and the inputs' values (token ids inside the vocabulary); then capture again.",
            ) from error
        self.inference_time = time.perf_counter() - start
        return OrderedDict(zip(program.output_names, _output_arrays(program, result), strict=True))


def run_nodes(program: Program, inputs: Mapping[str, NDArray[Any]], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Run the graph of a program and return intermediate values.

    Only the ancestors of the named nodes are computed, and each value is freed after its last use.

    Args:
        program: The program.
        inputs: One array per user input, with the captured shape and dtype.
        names: FX node names whose values are tensors.

    Returns:
        One array per name, in the order of ``names``.

    Raises:
        UsageError: No node has that name, or its value is not a tensor (``verify.no-such-node``).
    """
    graph, wanted = program.exported.graph, dict.fromkeys(names)
    order = _ancestors(graph, wanted)
    last_uses = _last_uses(order)
    placeholders = placeholder_values(program, inputs)
    values: dict[Node, Any] = {}
    found: dict[str, NDArray[Any]] = {}
    with torch.no_grad():
        for node in order:
            values[node] = _evaluate(program, node, values, placeholders)
            if node.name in wanted:
                found[node.name] = _intermediate(node, values[node])
            for dead in last_uses[node]:
                del values[dead]
    return {name: found[name] for name in wanted}


def node_names(program: Program) -> frozenset[str]:
    """Return the names of all nodes whose value is one tensor."""
    nodes = program.exported.graph.nodes
    return frozenset(node.name for node in nodes if isinstance(node.meta.get("val"), torch.Tensor))


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a tensor as an array; bf16, which numpy lacks, as ``ml_dtypes.bfloat16``."""
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[Any] = tensor.numpy()
    return array


def to_tensor(array: NDArray[Any]) -> torch.Tensor:
    """Return a copy of an array as a tensor; the inverse of ``to_numpy``."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)


def _user_specs(program: Program) -> list[InputSpec]:
    return [spec for spec in program.exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]


def _input_values(program: Program) -> dict[str, torch.Tensor]:
    placeholders = {node.name: node for node in program.exported.graph.nodes if node.op == "placeholder"}
    names = [spec.arg.name for spec in _user_specs(program) if isinstance(spec.arg, TensorArgument)]
    return {name: placeholders[name].meta["val"] for name in names}


def _user_arguments(program: Program, inputs: Mapping[str, NDArray[Any]]) -> list[Any]:
    """One value per user input in the graph's order; arguments that were constants at capture keep their value."""
    arguments = (spec.arg for spec in _user_specs(program))
    return [a.value if isinstance(a, ConstantArgument) else to_tensor(inputs[a.name]) for a in arguments]


def _output_arrays(program: Program, result: object) -> list[NDArray[Any]]:
    specs = [s for s in program.exported.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    if len(tensors) != len(specs) or len(tensors) != len(program.output_names):
        raise InternalError(
            "verify.outputs",
            "The program's outputs are not what its signature says",
            at=program.source.reference,
            want=f"{len(program.output_names)} tensors: {', '.join(program.output_names)}",
            got=f"{len(tensors)} tensors from {len(specs)} outputs",
            todo="Report this with the command that captured the model.",
        )
    return [to_numpy(tensor) for tensor in tensors]


def placeholder_values(program: Program, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Return the value of every placeholder of the graph by name: weights, buffers, constants and the given inputs."""
    exported = program.exported
    values: dict[str, Any] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        # Non-persistent buffers and lifted constants lie in ``constants``; everything else in the state dict.
        pool = exported.state_dict if spec.target in exported.state_dict else exported.constants
        values[spec.arg.name] = pool[str(spec.target)]
    users = zip(_user_specs(program), _user_arguments(program, inputs), strict=True)
    return values | {spec.arg.name: value for spec, value in users}


def _ancestors(graph: Graph, wanted: Mapping[str, None]) -> list[Node]:
    """The wanted nodes and all they depend on, in graph order."""
    by_name = {node.name: node for node in graph.nodes}
    missing = [name for name in wanted if name not in by_name]
    if missing:
        raise _no_such_node(missing[0], "no node of that name")
    stack, needed = [by_name[name] for name in wanted], set[Any]()
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return [node for node in graph.nodes if node in needed]


def _last_uses(order: Sequence[Node]) -> dict[Node, list[Node]]:
    """For each node, the values that nothing after it needs; a node without a use dies at once."""
    dead: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    for node in reversed(order):
        dead[node] = [value for value in (node, *node.all_input_nodes) if value not in seen]
        seen.update(dead[node])
    return dead


def _evaluate(program: Program, node: Node, values: Mapping[Node, Any], placeholders: Mapping[str, Any]) -> Any:
    if node.op == "placeholder":
        return placeholders[node.name]
    if node.op == "get_attr":
        return attrgetter(str(node.target))(program.exported.graph_module)
    if node.op != "call_function" or not callable(node.target):
        raise InternalError(
            "verify.node-kind",
            "The graph holds a node that no exported program has",
            at=node.name,
            want="placeholder, get_attr or call_function",
            got=node.op,
            todo="Report this with the passes that ran.",
        )
    args = map_arg(node.args, values.__getitem__)
    kwargs = map_arg(node.kwargs, values.__getitem__)
    return node.target(*args, **kwargs)


def _intermediate(node: Node, value: object) -> NDArray[Any]:
    if not isinstance(value, torch.Tensor):
        raise _no_such_node(node.name, f"a {type(value).__name__}")
    return to_numpy(value)


def _no_such_node(name: str, got: str) -> UsageError:
    return UsageError(
        "verify.no-such-node",
        "The program has no such tensor",
        at=name,
        want="the name of an FX node whose value is one tensor",
        got=got,
        todo="See 'depthwire inspect' for the names.",
    )
