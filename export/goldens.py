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
    import torch

    with torch.no_grad():
        outputs = [_run(program, window) for window in windows]
    return Goldens(list(windows), outputs)


def _run(program: Program, window: Arrays) -> dict[str, NDArray[Any]]:
    """Interpret the graph and let go of every weight after its last use: one layer is resident at a time."""
    import torch

    from depthwire._mapped import release

    exported = program.exported
    weights = {**exported.constants, **exported.state_dict}
    specs = exported.graph_signature.input_specs
    feeds = [torch.from_numpy(window[s.arg.name]) if s.target is None else weights[s.target] for s in specs]

    class Streaming(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            for used in self.user_to_last_uses.get(n, []):
                if used.op == "placeholder" and isinstance(self.env.get(used), torch.Tensor):
                    release(self.env[used])
            return result

    results = Streaming(exported.graph_module).run(*feeds)
    values = results if isinstance(results, (tuple, list)) else (results,)
    kept = [value for value in values if value is not None]
    return {name: _numpy(value) for name, value in zip(program.output_names, kept, strict=True)}


def _numpy(tensor: Any) -> NDArray[Any]:
    import torch

    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: NDArray[Any] = wide.detach().cpu().numpy()
    return array
