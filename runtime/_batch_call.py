"""One node of a graph whose batch is followed: what is known of its operands, and what has to change in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from onnx import NodeProto

    from depthwire.runtime._onnx_shapes import Shape

    Rule = Callable[["Call"], "Mark | Marks | None"]


class NotFollowedError(Exception):
    """An operator that does not keep the rows of the batch apart, or that has no rule; its text says why."""


@dataclass(frozen=True)
class Mark:
    """Where the batch is in a value: ``axis``, of which each element of the batch takes ``inner`` neighbours.

    ``inner`` is 1 for an axis of its own, T where ``[B, T, d]`` was flattened to ``[B·T, d]``.
    """

    axis: int
    inner: int = 1


Marks = tuple[Mark | None, ...]


@dataclass
class Call:
    """One node with what is known of its operands, and, filled in by its rule, what has to change in it.

    Attributes:
        node: The node.
        batch: B of the captured graph.
        shapes: Of its operands; ``()`` for an absent one.
        marks: Of its operands.
        out: Shapes of its results.
        constant: Reads an operand that is known, by its position.
        spread: Operands without a batch that must get one: position -> axis.
        rows: Operands that hold one row for each element of the batch, all equal: position -> axis. One is left.
        target: New second operand (a shape).
        frozen: Whether the new shape holds sizes that the captured one had left open.
    """

    node: NodeProto
    batch: int
    shapes: tuple[Shape, ...]
    marks: Marks
    out: tuple[Shape, ...]
    constant: Callable[[int], NDArray[Any] | None]
    spread: dict[int, int] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    target: list[int] | None = None
    frozen: bool = False

    def refuse(self, why: str) -> NotFollowedError:
        """Return the error to raise."""
        return NotFollowedError(why)

    def own_axis(self, position: int = 0) -> int:
        """Return the axis of a marked operand that is the batch's alone."""
        mark = self.marks[position]
        if mark is None or mark.inner != 1 or self.shapes[position][mark.axis] != self.batch:
            raise self.refuse(f"operand {position} has the batch together with other axes")
        return mark.axis

    def known(self, position: int) -> list[int]:
        """Return an operand that must be known, as a list of integers."""
        value = self.constant(position) if position < len(self.shapes) else None
        if value is None:
            raise self.refuse(f"operand {position} is not a constant")
        return [int(item) for item in value.reshape(-1)]

    def need(self, position: int, axis: int) -> None:
        """Give an operand the batch at an axis of its own, or check that it has it there."""
        if self.marks[position] is not None:
            if self.own_axis(position) != axis:
                raise self.refuse(f"operand {position} has the batch at axis {self.own_axis(position)}, not at {axis}")
            return
        self.single(position, axis)
        self.spread[position] = axis

    def single(self, position: int, axis: int) -> None:
        """Let an operand without a batch have one row at an axis, and leave one of it where it has B equal ones."""
        size = self.shapes[position][axis]
        if size == 1:
            return
        value = self.constant(position)
        if size != self.batch or value is None or not bool((value == value.take([0], axis)).all()):
            raise self.refuse(f"operand {position}, which no input decides, has {size} elements along the batch")
        self.rows[position] = axis
