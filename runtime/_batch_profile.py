"""A graph of static shapes with its batch left open, so that an engine can serve every batch up to some size.

The batch is followed through the graph (``_batch_axes``); then the sizes that were captured with it are taken out: of
inputs and outputs, of the shapes that ``Reshape`` and ``Expand`` are given, and of constants that hold a row for each
element of the batch. Nothing else changes, and weights stay in their file. What cannot be followed is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthwire.errors import InternalError, UsageError
from depthwire.runtime._batch_axes import follow
from depthwire.runtime._batch_call import Call, Mark, NotFollowedError
from depthwire.runtime._onnx_shapes import read_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto, TensorProto

    from depthwire.runtime._onnx_shapes import Graph

BATCH = "batch"
"""Name of the open dimension in the inputs and outputs."""

STATES = "route_states"
_SIZE = "batch.size"


@dataclass(frozen=True)
class OpenBatch:
    """A graph whose batch is open.

    Attributes:
        model: The graph; weights in external files stay there.
        inputs: Inputs with a batch, with their captured shapes and the batch's axis.
        frozen: Names of nodes that were given a size which the captured graph had left open (the number of slots).
    """

    model: ModelProto
    inputs: Mapping[str, tuple[tuple[int, ...], int]]
    frozen: tuple[str, ...]

    def profile(self, largest: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Return least, usual and greatest shape of every input: batches of 1 to ``largest``, tuned for ``largest``."""
        return {
            name: tuple((*shape[:axis], size, *shape[axis + 1 :]) for size in (1, largest, largest))
            for name, (shape, axis) in self.inputs.items()
        }


def open_batch(path: Path, *, tables_are_inputs: bool = False) -> OpenBatch:
    """Return the graph of a file with its batch left open.

    Every input without a default whose first axis is as long as that of the first input has the batch there; the counts
    of running budgets (``route_states [n, B, 2]``) have it at axis 1.

    Args:
        path: An ONNX file of static shapes.
        tables_are_inputs: Keep thresholds, budgets and counts as inputs (without defaults); else they are constants.

    Raises:
        UsageError: ``build.batch-not-followed``: an operator mixes the rows of the batch, or nothing is known of it.
        BuildError: ``runtime.shapes``: the shapes of the graph are not all static.
    """
    return _Opener(path, tables_are_inputs=tables_are_inputs).run()


class _Opener:
    """Follows the batch through a graph and rewrites it on the way."""

    def __init__(self, path: Path, *, tables_are_inputs: bool) -> None:
        self.path = path
        self.graph = read_shapes(path)
        self.model = self.graph.model
        self.weights: dict[str, TensorProto] = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.tables_are_inputs = tables_are_inputs
        self.batch = 0
        self.marks: dict[str, Mark] = {}
        self.inputs: dict[str, tuple[tuple[int, ...], int]] = {}
        self.new_weights: dict[str, TensorProto] = {}
        self.nodes: list[NodeProto] = []
        self.made: set[str] = set()
        self.left: set[str] = set()
        self.frozen: list[str] = []

    def run(self) -> OpenBatch:
        """Follow, rewrite and check."""
        self._mark_inputs()
        self._open_tables()
        for node in self.graph.nodes:
            self._visit(node)
            self.nodes.append(node)
        graph = self.model.graph
        nodes = [*self.nodes]
        del graph.node[:]
        graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in used or tensor.name not in self.left]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *self.new_weights.values()])
        open_shapes(self.model, self.marks, self.graph, self.batch)
        check_shapes(self.model, self.marks, self.graph, self.batch)
        return OpenBatch(self.model, self.inputs, tuple(self.frozen))

    def _mark_inputs(self) -> None:
        given = [each.name for each in self.model.graph.input if each.name not in self.weights]
        if not given or not self.graph.shapes[given[0]]:
            raise self._refusal("the inputs", "the first input has no axis")
        self.batch = self.graph.shapes[given[0]][0]
        for name in given:
            shape = self.graph.shapes[name]
            if shape and shape[0] == self.batch:
                self._mark_input(name, 0)
        self._make("Shape", [given[0]], _SIZE, start=0, end=1)

    def _mark_input(self, name: str, axis: int) -> None:
        self.inputs[name] = self.graph.shapes[name], axis
        self.marks[name] = Mark(axis)

    def _open_tables(self) -> None:
        """Make the tables of running budgets inputs alone or constants alone, and give the counts the batch."""
        graph = self.model.graph
        tables = {each.name for each in graph.input if each.name in self.weights}
        if self.tables_are_inputs:
            kept = [tensor for tensor in graph.initializer if tensor.name not in tables]
            self.weights = {tensor.name: tensor for tensor in kept}  # their defaults are no constants any more
            del graph.initializer[:]
            graph.initializer.extend(kept)
            if STATES in tables:
                self._mark_input(STATES, 1)
            return
        inputs = [each for each in graph.input if each.name not in tables]
        del graph.input[:]
        graph.input.extend(inputs)
        if STATES in tables:
            row = self._row(STATES, 1)
            tensor = next(tensor for tensor in graph.initializer if tensor.name == STATES)
            graph.initializer.remove(tensor)
            self._make("Expand", [row, self._shape_of(1, 3)], STATES)
            self.marks[STATES] = Mark(1)

    def _visit(self, node: NodeProto) -> None:
        shapes, marks = self.graph.shapes, self.marks
        call = Call(
            node=node,
            batch=self.batch,
            shapes=tuple(shapes.get(name, ()) for name in node.input),
            marks=tuple(marks.get(name) for name in node.input),
            out=tuple(shapes[name] if name else () for name in node.output),
            constant=lambda position: self._constant(node.input[position]),
        )
        try:
            found = follow(call)
        except NotFollowedError as error:
            raise self._refusal(f"{node.name or node.output[0]} ({node.op_type})", str(error)) from error
        marks.update({name: mark for name, mark in zip(node.output, found, strict=True) if name and mark is not None})
        self.left.update(node.input[position] for position in (*call.rows, *call.spread))
        for position, axis in call.rows.items():
            node.input[position] = self._row(node.input[position], axis)
        for position, axis in call.spread.items():
            node.input[position] = self._spread(node.input[position], axis, len(call.shapes[position]))
        if call.target is not None:
            self.left.add(node.input[1])
            node.input[1] = self._integers(call.target)
            for attribute in [each for each in node.attribute if each.name == "allowzero"]:
                node.attribute.remove(attribute)
        if call.frozen:
            self.frozen.append(node.name)

    def _constant(self, name: str) -> NDArray[Any] | None:
        from onnx import numpy_helper

        tensor = self.new_weights.get(name) or self.weights.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor, str(self.path.parent))

    def _row(self, name: str, axis: int) -> str:
        """Return the first row of a constant whose rows along an axis are equal."""
        import numpy as np

        value = self._constant(name)
        assert value is not None  # noqa: S101 - its rows were compared
        return self._weight(f"{name}.row", np.ascontiguousarray(value.take([0], axis)))

    def _spread(self, name: str, axis: int, rank: int) -> str:
        """Return a value with its one row along an axis repeated for each element of the batch."""
        return self._make("Expand", [name, self._shape_of(axis, rank)], f"{name}.batch{axis}")

    def _shape_of(self, axis: int, rank: int) -> str:
        """Return a shape that is the batch's size at an axis, and one everywhere else."""
        parts = [*([self._integers([1] * axis)] if axis else []), _SIZE]
        parts += [self._integers([1] * (rank - axis - 1))] if rank > axis + 1 else []
        return _SIZE if rank == 1 else self._make("Concat", parts, f"{_SIZE}.{axis}.{rank}", axis=0)

    def _integers(self, values: list[int]) -> str:
        import numpy as np

        return self._weight("batch.ints." + ".".join(map(str, values)), np.array(values, np.int64))

    def _weight(self, name: str, value: NDArray[Any]) -> str:
        from onnx import numpy_helper

        self.new_weights.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def _make(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        if output not in self.made:
            self.made.add(output)
            self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def _refusal(self, at: str, got: str) -> UsageError:
        return UsageError(
            "build.batch-not-followed",
            "The batch of this graph cannot be left open",
            at=f"{self.path}: {at}",
            want="operators that compute every row of the batch by itself",
            got=got,
            todo="Leave --max-batch out: the engine then has the batch that the model was converted with. "
            "If it was converted with --batch above 1, a batch of 1 may be followed further.",
        )


def open_shapes(model: ModelProto, marks: Mapping[str, Mark], graph: Graph, batch: int) -> None:
    """Take the batch out of the shapes that the graph's inputs, outputs and values are described with."""
    for info in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        mark = marks.get(info.name)
        if mark is None:
            continue
        size = info.type.tensor_type.shape.dim[mark.axis]
        size.Clear()
        if mark.inner == 1 and graph.shapes[info.name][mark.axis] == batch:
            size.dim_param = BATCH


def check_shapes(model: ModelProto, marks: Mapping[str, Mark], graph: Graph, batch: int) -> None:
    """Let ONNX infer the shapes at another batch and compare them with what following the batch has promised.

    Raises:
        InternalError: ``build.batch-shapes``.
    """
    import onnx

    trial = onnx.ModelProto()
    trial.CopyFrom(model)
    values = (name for node in graph.nodes for name in node.output if name)
    del trial.graph.value_info[:]
    trial.graph.value_info.extend(onnx.ValueInfoProto(name=name) for name in values)
    for info in (*trial.graph.input, *trial.graph.output, *trial.graph.value_info):
        shape = list(graph.shapes[info.name])
        if info.name in marks:
            axis = marks[info.name].axis
            shape[axis] = shape[axis] // batch * (batch + 2)
        kind = onnx.helper.make_tensor_type_proto(graph.types[info.name], shape)
        info.type.CopyFrom(kind)
    try:
        onnx.shape_inference.infer_shapes(trial, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        lines = str(error).splitlines()
        raise InternalError(
            "build.batch-shapes",
            "Leaving the batch open gave a graph of other shapes than it should",
            at=lines[0],
            want=f"the shapes that were captured, with {batch + 2} in place of a batch of {batch}",
            got=f"{len(lines)} that differ",
            todo="Leave --max-batch out, and report this with the model.",
        ) from error
