"""``GraphEditor``: the only way in which passes change a graph.

It works on a copy, copies provenance onto every node it makes, stamps the pass's name, recomputes ``meta["val"]`` with
fake tensors, and keeps the graph signature, the parameters and the constants in step with the placeholders.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx.node import map_arg

from depthwire.ops import SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from depthwire.program import Program

_PROVENANCE = ("nn_module_stack", "stack_trace", "torch_fn", "from_node")
STAMP = "depthwire.pass"


class GraphEditor:
    """A copy of a program's graph, open for changes; ``finish`` closes it into a new program.

    Attributes:
        graph: The copy. Read it freely; change it only through the editor.
    """

    def __init__(self, program: Program, pass_name: str) -> None:
        """Copy the graph (weights are shared, never copied)."""
        exported = program.exported
        self._program = program
        self._pass_name = pass_name
        self._source = exported
        self.graph = torch.fx.Graph()
        self._copies: dict[torch.fx.Node, torch.fx.Node] = {}
        output = self.graph.graph_copy(exported.graph, self._copies)
        self._originals = {duplicate: node for node, duplicate in self._copies.items()}
        for node, duplicate in self._copies.items():
            duplicate.name = node.name  # FX renames what is called like a builtin, such as an input named "input"
        old_output = next(iter(reversed(exported.graph.nodes)))
        new_output = self.graph.output(output)
        new_output.meta = dict(old_output.meta)
        self._input_specs: list[InputSpec] = copy.deepcopy(list(exported.graph_signature.input_specs))
        self._placeholders: list[torch.fx.Node] = [node for node in self.graph.nodes if node.op == "placeholder"]
        self._ends = _ends([spec.kind for spec in self._input_specs])
        self._state = dict(exported.state_dict)
        self._constants = dict(exported.constants)
        self._fake_mode = fake_mode_of(exported.graph)

    def copy_of(self, node: torch.fx.Node) -> torch.fx.Node:
        """Return the copy of a node of the original graph, or what has replaced it."""
        return self._copies[node]

    def call(
        self,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        before: torch.fx.Node,
        like: torch.fx.Node,
        name: str | None = None,
    ) -> torch.fx.Node:
        """Insert a call.

        Args:
            target: The operator.
            args: Positional arguments; nodes of ``graph`` or literals.
            kwargs: Keyword arguments.
            before: Where to insert.
            like: The node whose provenance the new one takes.
            name: Wanted node name; made unique by FX.
        """
        with self.graph.inserting_before(before):
            name = name or getattr(target, "_opname", None)
            node = self.graph.create_node("call_function", target, tuple(args), dict(kwargs or {}), name=name)
        self._stamp(node, like)
        node.meta["val"] = self.fake_value(node)
        return node

    def replace(self, old: torch.fx.Node, new: torch.fx.Node, *, keep_name: bool = False) -> None:
        """Let every user of ``old`` read ``new``; ``old`` disappears at ``finish`` if nothing else needs it.

        Args:
            old: The node that is replaced.
            new: What stands in its place.
            keep_name: Give ``new`` the name of ``old``: for a node that computes the same value in another way, so
                that values can be compared by name across the stages.
        """
        old.replace_all_uses_with(new)
        if old in self._originals:
            original = self._originals[new] = self._originals.pop(old)
            self._copies[original] = new
        if keep_name:
            name = old.name
            self.graph.erase_node(old)
            new.name = name

    def reroute(self, user: torch.fx.Node, old: torch.fx.Node, new: torch.fx.Node) -> None:
        """Let one user read ``new`` in place of ``old``."""
        user.replace_input_with(old, new)

    def set_arg(self, node: torch.fx.Node, index: int | str, value: Any) -> None:
        """Change one argument (by position, or by keyword) and recompute the node's value."""
        if isinstance(index, int):
            node.update_arg(index, value)
        else:
            node.update_kwarg(index, value)
        self._stamp(node, node)
        node.meta["val"] = self.fake_value(node)

    def refresh(self, node: torch.fx.Node) -> None:
        """Recompute the value of a node whose inputs have changed."""
        self._stamp(node, node)
        node.meta["val"] = self.fake_value(node)

    def retype(self, node: torch.fx.Node, tensor: torch.Tensor) -> None:
        """Store a weight or constant in another dtype.

        Args:
            node: Its placeholder; if several stand for one weight, each is to be retyped.
            tensor: The new values, of the same shape.
        """
        spec = next(spec for spec in self._input_specs if spec.arg.name == node.name)
        fqn, old = str(spec.target), value_of_spec(spec, self._state, self._constants)
        if old.shape != tensor.shape:
            raise ValueError(f"{fqn}: {list(tensor.shape)} does not fit {list(old.shape)}")
        if spec.kind is InputKind.PARAMETER:
            tensor = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        home = self._state if fqn in self._state else self._constants
        # Further names of a tied weight stay tied.
        tied = [name for name, other in home.items() if isinstance(other, torch.Tensor) and _same_memory(other, old)]
        home.update(dict.fromkeys(tied, tensor))
        node.meta["val"] = self._fake_mode.from_tensor(tensor, static_shapes=True)
        self._stamp(node, node)

    def add_parameter(self, fqn: str, tensor: torch.Tensor) -> torch.fx.Node:
        """Add a trainable parameter and return its placeholder."""
        self._state[fqn] = torch.nn.Parameter(tensor)
        return self._add_input(InputKind.PARAMETER, "p_", fqn, self._state[fqn])

    def set_parameter(self, fqn: str, tensor: torch.Tensor) -> None:
        """Replace the values of a parameter that this editor added; shape and dtype stay."""
        old = self._state[fqn]
        if old.shape != tensor.shape:
            raise ValueError(f"{fqn}: {list(tensor.shape)} does not fit {list(old.shape)}")
        self._state[fqn] = torch.nn.Parameter(tensor.to(old.dtype))

    def add_constant(self, fqn: str, tensor: torch.Tensor) -> torch.fx.Node:
        """Add a constant tensor and return its placeholder."""
        self._constants[fqn] = tensor
        return self._add_input(InputKind.CONSTANT_TENSOR, "c_", fqn, tensor)

    def drop_weight(self, node: torch.fx.Node) -> None:
        """Remove a parameter or buffer that nothing reads any more, under all of its names.

        Raises:
            ValueError: Something reads it.
        """
        if node.users:
            raise ValueError(f"{node.name} is read by {', '.join(user.name for user in node.users)}")
        position = self._placeholders.index(node)
        spec = self._input_specs.pop(position)
        del self._placeholders[position]
        self.graph.erase_node(node)
        for kind, end in self._ends.items():
            self._ends[kind] = end - (position < end)
        dropped = self._state.pop(str(spec.target))
        used = {str(other.target) for other in self._input_specs}
        for name, tensor in list(self._state.items()):
            if tensor is dropped and name not in used:
                del self._state[name]

    def free_constant_name(self, stem: str) -> str:
        """Return ``stem_N`` with the smallest N that no weight or constant has yet."""
        number = 0
        while not self.is_free(f"{stem}_{number}"):
            number += 1
        return f"{stem}_{number}"

    def is_free(self, fqn: str) -> bool:
        """Tell whether no weight or constant has a name yet."""
        return fqn not in self._constants and fqn not in self._state

    def fake_value(self, node: torch.fx.Node) -> Any:
        """Compute the shape and dtype of a node from those of its inputs."""
        return fake_call(node, self._fake_mode)

    def finish(self) -> Program:
        """Drop dead code, check the graph and return the new program."""
        self._remove_dead_code()
        self.graph.lint()
        signature = ExportGraphSignature(
            input_specs=self._input_specs,
            output_specs=copy.deepcopy(list(self._source.graph_signature.output_specs)),
        )
        self._sync_outputs(signature)
        exported = torch.export.ExportedProgram(
            root=self._source.graph_module,
            graph=self.graph,
            graph_signature=signature,
            state_dict=self._state,
            range_constraints=dict(self._source.range_constraints),
            module_call_graph=list(self._source.module_call_graph),
            example_inputs=self._source.example_inputs,
            constants=self._constants,
            verifiers=self._source.verifiers,
        )
        return self._program.replace(exported=exported)

    def _stamp(self, node: torch.fx.Node, like: torch.fx.Node) -> None:
        for key in _PROVENANCE:
            if key in like.meta:
                node.meta[key] = like.meta[key]
        node.meta["custom"] = {**(like.meta.get("custom") or {}), STAMP: self._pass_name}

    def _add_input(self, kind: InputKind, prefix: str, fqn: str, tensor: torch.Tensor) -> torch.fx.Node:
        """Parameters go behind the last parameter, constants before the first user input."""
        position = self._ends[kind]
        name = prefix + fqn.replace(".", "_")
        with self.graph.inserting_before(self._placeholder_at(position)):
            node = self.graph.placeholder(name)
        node.meta["val"] = self._fake_mode.from_tensor(tensor, static_shapes=True)
        node.meta["custom"] = {STAMP: self._pass_name}
        self._placeholders.insert(position, node)
        self._input_specs.insert(position, InputSpec(kind, TensorArgument(node.name), fqn, None))
        self._ends[InputKind.CONSTANT_TENSOR] += 1
        self._ends[InputKind.PARAMETER] += kind is InputKind.PARAMETER
        return node

    def _placeholder_at(self, position: int) -> torch.fx.Node:
        """Return the input at a position, or the node behind the last one."""
        if position < len(self._placeholders):
            return self._placeholders[position]
        after: torch.fx.Node = self._placeholders[-1].next if self._placeholders else next(iter(self.graph.nodes))
        return after

    def _sync_outputs(self, signature: ExportGraphSignature) -> None:
        output = next(iter(reversed(self.graph.nodes)))
        values = output.args[0]
        for spec, value in zip(signature.output_specs, values, strict=True):
            if isinstance(value, torch.fx.Node):
                spec.arg.name = value.name

    def _remove_dead_code(self) -> None:
        """Unlike FX's own, this keeps unused user inputs and drops unused weights that a pass left behind."""
        # Attention counts as random for its dropout; a program in eval mode draws nothing.
        self.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
        specs = dict(zip([n for n in self.graph.nodes if n.op == "placeholder"], self._input_specs, strict=True))
        for node, spec in specs.items():
            if spec.kind is InputKind.CONSTANT_TENSOR and not node.users:
                self.graph.erase_node(node)
                self._input_specs.remove(spec)
                self._constants.pop(str(spec.target), None)


def value_of_spec(spec: InputSpec, state: Mapping[str, Any], constants: Mapping[str, Any]) -> torch.Tensor:
    """Return the weight or constant that an input of the graph stands for."""
    tensor = state[str(spec.target)] if str(spec.target) in state else constants[str(spec.target)]
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{spec.target} is no tensor")
    return tensor


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _ends(kinds: list[InputKind]) -> dict[InputKind, int]:
    """Return how many inputs stand before the first that is no parameter, and before the first user input."""
    others = (index for index, kind in enumerate(kinds) if kind is not InputKind.PARAMETER)
    users = (index for index, kind in enumerate(kinds) if kind is InputKind.USER_INPUT)
    return {
        InputKind.PARAMETER: next(others, len(kinds)),
        InputKind.CONSTANT_TENSOR: next(users, len(kinds)),
    }


def fake_mode_of(graph: torch.fx.Graph) -> FakeTensorMode:
    """Return the fake-tensor mode that a graph's recorded values belong to."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_call(node: torch.fx.Node, mode: FakeTensorMode) -> Any:
    """Evaluate one call on the recorded values of its inputs."""

    def value_of(argument: torch.fx.Node) -> Any:
        return argument.meta["val"]

    args = map_arg(node.args, value_of)
    kwargs = map_arg(node.kwargs, value_of)
    # Our own operators have hundreds of arguments, over which the dispatcher would go several times.
    schema = getattr(node.target, "_schema", None)
    call = node.target if schema is None else SHAPES.get(schema.name.removeprefix("depthwire::"), node.target)
    with mode, torch.no_grad():
        return call(*args, **kwargs)  # type: ignore[operator]
