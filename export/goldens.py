"""Goldens: example inputs and what the *original* model answers to them, so that a device can prove an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from depthwire.program import Program

    Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Goldens:
    """Windows of inputs and the outputs that belong to them, by name, in order."""

    inputs: Sequence[Arrays]
    outputs: Sequence[Arrays]

    def save(self, path: Path) -> None:
        """Write ``input.<name>`` and ``output.<name>``, each with a leading axis over windows, as safetensors."""
        from safetensors.torch import save_file

        save_file(self._tensors(), path)

    def _tensors(self) -> dict[str, Any]:
        import numpy as np
        import torch

        tensors = {}
        for prefix, windows in (("input", self.inputs), ("output", self.outputs)):
            for name in windows[0]:
                parts = [window[name] for window in windows]
                # One window is the usual case; its logits need no second copy.
                stacked = parts[0][np.newaxis] if len(parts) == 1 else np.stack(parts)
                tensors[f"{prefix}.{name}"] = torch.from_numpy(np.ascontiguousarray(stacked))
        return tensors


def make_goldens(program: Program, windows: Sequence[Arrays]) -> Goldens:
    """Run the original program on every window.

    Args:
        program: The captured program, before any pass.
        windows: Inputs by name.

    Returns:
        Inputs and outputs; bf16 outputs are widened to fp32, which numpy lacks a dtype for.
    """
    outputs = [_run(program, window) for window in windows]
    return Goldens(list(windows), outputs)


def _run(program: Program, window: Arrays) -> dict[str, NDArray[Any]]:
    import torch

    from depthwire.passes.analysis.observe import observe

    values = observe(program, {name: torch.from_numpy(array) for name, array in window.items()})
    return {name: _numpy(value) for name, value in zip(program.output_names, values, strict=True)}


def _numpy(tensor: Any) -> NDArray[Any]:
    import torch

    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: NDArray[Any] = wide.detach().cpu().numpy()
    return array
