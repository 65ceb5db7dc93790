"""What TensorRT does with a plugin at run time, on the CPU: launch parameters for some shapes, and the launch.

Everything comes from ``plugins.json`` and the code beside it, nothing from the classes that wrote them: shapes of the
outputs, grid, integers, and the order of the parameters, which is bound to the names in the PTX's own ``.entry``. The
kernel of that name then runs in Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from depthwire.runtime.triton import launch as depth
from depthwire.runtime.triton import routing_launch as routing
from depthwire.runtime.triton.plugin_ptx import argument_name, entry_parameters
from depthwire.runtime.triton.routing_spec import RoutingSpec
from depthwire.runtime.triton.spec import KernelSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

DTYPES = {
    "FP32": torch.float32,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Launch:
    """A launch for fixed shapes.

    Attributes:
        kernel: What the index says of the kernel.
        grid: Thread blocks.
        arguments: The integers between inputs and outputs.
        outputs: Shape and dtype of each.
    """

    kernel: dict[str, Any]
    grid: int
    arguments: list[int]
    outputs: list[tuple[list[int], torch.dtype]]


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a folder, with the parameters of each kernel as its code declares them."""
    index: dict[str, Any] = json.loads((folder / "plugins.json").read_text())
    for kernel in index["kernels"].values():
        code = (folder / kernel["file"]).read_bytes()
        assert hashlib.sha256(code).hexdigest() == kernel["sha256"]
        if kernel["form"] == "ptx":
            symbol, names, _ = entry_parameters(code.decode())
            assert symbol == kernel["symbol"]
            kernel["parameters"] = list(names)
    return index


def launch_of(
    index: dict[str, Any], op_type: str, variant: int, shapes: Sequence[Sequence[int]], tactic: int = 1
) -> Launch:
    """Return the launch of a node whose inputs have these shapes."""
    operator = index["operators"][op_type]
    named = dict(zip(operator["inputs"], shapes, strict=True))
    chosen = operator["variants"][variant]
    plan = chosen["tactics"][tactic - 1]
    return Launch(
        kernel=index["kernels"][plan["kernel"]],
        grid=math.prod(_number(factor, named) for factor in plan["grid"]),
        arguments=[_number(extent, named) for extent in operator["arguments"].values()],
        outputs=[
            ([dim for extent in shape for dim in _dims(extent, named)], DTYPES[chosen["dtypes"][name]])
            for name, shape in operator["outputs"].items()
        ],
    )


def run(launch: Launch, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Launch a kernel in the interpreter on a node's inputs, contiguous, and return the node's outputs."""
    outputs = [_poisoned(shape, dtype) for shape, dtype in launch.outputs]
    # As TensorRT passes them: by position alone.
    passed = dict(zip(launch.kernel["parameters"], [*inputs, *launch.arguments, *outputs], strict=True))
    fields = dict(launch.kernel["spec"])
    spec = {"KernelSpec": KernelSpec, "RoutingSpec": RoutingSpec}[fields.pop("class")](**fields)
    assert launch.kernel["threads"] == 32 * spec.launch.warps
    if launch.grid:
        if isinstance(spec, RoutingSpec):
            values = {name: _pointer(passed[name], spec.dtype_of(name)) for name in (*spec.inputs, *spec.outputs)}
            values |= {name: passed[argument_name(name)] for name in spec.scalars}
            kernel, arguments = routing.kernel_of(spec), routing.arguments_of(spec, values)
            constants = routing.constants_of(spec)
        else:
            kernel, arguments = depth.kernel_of(spec), depth.arguments_of(spec, passed)
            constants = depth.constants_of(spec)
        kernel[launch.grid,](**arguments, **constants, num_warps=spec.launch.warps)
    return tuple(outputs)


def _number(factor: Any, shapes: Mapping[str, Sequence[int]]) -> int:
    return factor if isinstance(factor, int) else -(-math.prod(_dims(factor, shapes)) // factor["per"])


def _dims(extent: dict[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[int]:
    return list(shapes[extent["of"]])[slice(*extent["dims"])]


def _poisoned(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Return memory with what a kernel would not compute, so that elements that it leaves out are seen."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else 77 if dtype != torch.bool else 1).to(dtype)


def _pointer(tensor: Tensor, dtype: str) -> Tensor:
    """Return the same memory as the kernel's pointer has it: bits as bytes, and what is moved as words."""
    assert tensor.is_contiguous()
    wanted = getattr(torch, dtype)
    return tensor if tensor.dtype == wanted else tensor.reshape(-1).view(torch.uint8).view(wanted)
