"""What the user may ask of the capture stage, checked once, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from depthwire.errors import UsageError

TASKS = ("causal-lm", "encoder", "vision")
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

ExampleInputs = Mapping[str, Tensor] | tuple[Tensor, ...]


@dataclass(frozen=True)
class CaptureOptions:
    """The keyword arguments of ``capture``; see there for their meaning."""

    batch: int = 1
    seq_len: int | None = None
    task: str | None = None
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    image_size: int | None = None
    example_inputs: ExampleInputs | None = None
    checkpoint_map: str | None = None
    padding: bool = False

    def check(self) -> None:
        """Refuse values that cannot be meant whatever the source is.

        Raises:
            UsageError: A size below 1, an unknown task or dtype, or example inputs that are not tensors.
        """
        for name in ("batch", "seq_len", "image_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UsageError("capture.size", f"{name} must be at least 1", at=name, want=">= 1", got=str(size))
        for name, choices in (("task", TASKS), ("dtype", tuple(DTYPES))):
            choice = getattr(self, name)
            if choice is not None and choice not in choices:
                raise UsageError(
                    f"capture.{name}",
                    f"unknown {name}",
                    at=name,
                    want=", ".join(choices),
                    got=repr(choice),
                )
        self._check_example_inputs()

    def _check_example_inputs(self) -> None:
        given = self.example_inputs
        if given is None:
            return
        kind = type(given).__name__
        if not isinstance(given, (Mapping, tuple)) or not given:
            raise UsageError(
                "capture.example-inputs",
                "example inputs must be a non-empty mapping from names to tensors, or a tuple of tensors",
                at="example_inputs",
                want="Mapping[str, Tensor] or tuple[Tensor, ...]",
                got=f"an empty {kind}" if isinstance(given, (Mapping, tuple)) else kind,
                todo="Name one tensor for each required parameter of forward.",
            )
        items = given.items() if isinstance(given, Mapping) else enumerate(given)
        for name, value in items:
            if not isinstance(value, Tensor):
                raise UsageError(
                    "capture.example-inputs",
                    "every example input must be a tensor",
                    at=f"example_inputs[{name!r}]",
                    want="torch.Tensor",
                    got=type(value).__name__,
                    todo="Bind values that are not tensors in a wrapping module, so that forward takes tensors only.",
                )

    def refuse(self, what: str, names: tuple[str, ...], why: str) -> None:
        """Refuse options that would have no effect on this kind of source.

        Args:
            what: The kind of source, as it reads in the message: ``a .pt2 file``.
            names: Fields that the kind does not know.
            why: Why not, and what to do.

        Raises:
            UsageError: One of the fields differs from its default.
        """
        defaults = CaptureOptions()
        for name in names:
            value = getattr(self, name)
            if value is not getattr(defaults, name) and value != getattr(defaults, name):
                shown = "given" if name == "example_inputs" else repr(value)
                raise UsageError(
                    "capture.option-without-effect",
                    f"{name} has no effect on {what}",
                    at=name,
                    want="the option left out",
                    got=shown,
                    todo=why,
                )
