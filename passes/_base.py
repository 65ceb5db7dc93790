"""What a pass is: a frozen value with a name, options, and one method from program to result.

A pass file holds, in this order: a docstring (before → after, the algebra, what it refuses and why), its options, the
match, the rewrite. Names start with a verb of a closed list, so that the file list reads like a table of contents.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from depthwire.program import Program

VERBS = (
    "analyze",
    "canonicalize",
    "lift",
    "recognize",
    "fuse",
    "schedule",
    "route",
    "remove",
    "legalize",
    "cast",
    "quantize",
)


@dataclass(frozen=True)
class Decline:
    """Why an anchor that matched was left alone. Falsy, so that ``if not match`` reads naturally.

    Attributes:
        code: Stable identifier, ``pass.reason``; tests refuse on it.
        at: Module path and node.
        want: What the pass needs there.
        got: What it found.
    """

    code: str
    at: str
    want: str
    got: str

    def __bool__(self) -> bool:
        return False

    def as_dict(self) -> dict[str, str]:
        """Return the decline as a JSON-ready mapping."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PassResult:
    """The new program, how many places were rewritten, the places that were declined, and what was weighed.

    Attributes:
        program: The rewritten program.
        rewrites: Places rewritten; 0 means that the program is as it was.
        declines: Why the others were left alone.
        notes: What a pass that chooses had to choose from, a line each; ``depthwire explain`` prints them.
    """

    program: Program
    rewrites: int
    declines: tuple[Decline, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a program. Subclasses are frozen dataclasses whose fields are the options."""

    name: ClassVar[str]
    # Parameters or constants may be added only by passes that say so; user inputs and outputs never change.
    adds_parameters: ClassVar[bool] = False
    adds_constants: ClassVar[bool] = False
    # Weights keep their dtypes unless a pass is there to change them.
    changes_dtypes: ClassVar[bool] = False

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Return the rewritten program; the given one is not touched."""

    def ensures(self, program: Program) -> list[str]:  # noqa: ARG002
        """Return what is wrong with the *result*, an empty list if the pass's promise holds."""
        return []

    def options(self) -> Mapping[str, object]:
        """Return the options as they go into the manifest."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def module_path(node: torch.fx.Node) -> str:
    """Return the path of the innermost module that a node came from, such as ``model.layers.0.mlp``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return str(list(stack.values())[-1][0])


def where(node: torch.fx.Node) -> str:
    """Return ``module.path (node)`` for messages."""
    path = module_path(node)
    return f"{path} ({node.name})" if path else node.name
