"""Calling a kernel on torch tensors: on a GPU, or in Triton's interpreter on the CPU.

The interpreter is chosen by ``TRITON_INTERPRET=1`` in the environment before the first call, for the whole process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthwire.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from depthwire.runtime.triton.spec import KernelSpec


def kernel_of(spec: KernelSpec) -> Any:
    """Return the ``triton.jit`` function that computes an operator."""
    if spec.kind == "inter":
        from depthwire.runtime.triton.kernels.inter import attn_res_inter

        return attn_res_inter
    if spec.kind == "merge":
        from depthwire.runtime.triton.kernels.merge import attn_res_merge

        return attn_res_merge
    from depthwire.runtime.triton.kernels.read import attn_res_read

    return attn_res_read


def constants_of(spec: KernelSpec) -> dict[str, int | float | bool]:
    """Return the compile-time arguments of the kernel, in the order of its signature."""
    launch = spec.launch
    shape = {"COUNT": spec.count, "WIDTH": spec.width, "BLOCK": launch.block}
    if spec.kind == "inter":
        tail = {"QUERIES": spec.queries, "SHARE": launch.share, "PROGRAMS": launch.programs}
        own = {"GROUPS": launch.groups, "ALIGNED": spec.aligned, "EPS": spec.eps, "SCALE": spec.scale}
        return {**shape, **own, **tail}
    tiles = {"TILE": launch.tile, "GROUPS": launch.groups, "ALIGNED": spec.aligned}
    floats = {"EPS": spec.eps, "SCALE": spec.scale, "LAST_BIAS": spec.last_bias, "NORM_EPS": spec.norm_eps}
    last = {"INDEX": spec.index} if spec.kind == "merge" else {"UNIT": spec.unit}
    return {**shape, **tiles, **floats, **last}


def arguments_of(spec: KernelSpec, values: dict[str, Any], absent: Any = None) -> dict[str, Any]:
    """Return the kernel's run-time arguments by its own names, in the order of its signature.

    Args:
        spec: The operator.
        values: One value for every name in ``spec.inputs`` and ``spec.outputs``.
        absent: What stands for an operand that this form does not have.
    """
    sources = tuple(values[name] for name in spec.inputs if name.startswith("source_"))
    if spec.kind == "inter":
        return {"queries": values["queries"], "sources": sources, "out": values["out"], "lse": values["lse"]}
    inter = {name: values[name] for name in ("inter_out", "inter_lse")} if spec.kind == "merge" else {}
    return {
        "query": values["query"],
        "norm_weight": values.get("norm_weight", absent),
        **inter,
        "sources": sources,
        "delta": values.get("delta", absent),
        "out": values["out"],
        "total": values.get("sum", absent),
    }


def launch(spec: KernelSpec, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Compute an operator.

    Args:
        spec: The operator.
        inputs: The tensors of ``spec.inputs``, all on one device and contiguous; sources ``[..., d]`` of one shape.

    Returns:
        The tensors of ``spec.outputs``.

    Raises:
        UsageError: ``triton.bad-operands``: another number of tensors, or one of another dtype, shape or layout.
    """
    import torch

    values = dict(zip(spec.inputs, inputs, strict=False))
    like = values.get("source_0", values["inter_out"][0] if "inter_out" in values else None)
    if len(inputs) != len(spec.inputs) or like is None:
        raise _refused("the inputs", f"{len(spec.inputs)} tensors", f"{len(inputs)}")
    rows = like.shape[:-1]
    for name, tensor in values.items():
        want = _shape(spec, name, rows, tensor)
        dtype = spec.dtype_of(name)
        if tuple(tensor.shape) != want or tensor.dtype != getattr(torch, dtype) or not tensor.is_contiguous():
            got = f"{tensor.dtype}{list(tensor.shape)}" + ("" if tensor.is_contiguous() else ", strided")
            raise _refused(name, f"contiguous torch.{dtype}{list(want)}", got)
    for name in spec.outputs:
        stacked = (spec.queries, *rows) if spec.kind == "inter" else tuple(rows)
        shape = stacked if name == "lse" else (*stacked, spec.width)
        values[name] = torch.empty(shape, dtype=getattr(torch, spec.dtype_of(name)), device=like.device)
    grid = (like.numel() // spec.width * spec.launch.programs,)
    if grid[0]:
        run = kernel_of(spec)[grid]
        run(**arguments_of(spec, values), **constants_of(spec), num_warps=spec.launch.warps)
    return tuple(values[name] for name in spec.outputs)


def _shape(spec: KernelSpec, name: str, rows: Sequence[int], tensor: Tensor) -> tuple[int, ...]:
    if name in ("query", "norm_weight"):
        return (spec.width,)
    if name == "queries":
        return (spec.queries, spec.width)
    if name in ("inter_out", "inter_lse"):
        # The number of queries is the tensor's own; it only has to hold the row that is read.
        stacked = (max(tensor.shape[0] if tensor.dim() else 0, spec.index + 1), *rows)
        return stacked if name == "inter_lse" else (*stacked, spec.width)
    return (*rows, spec.width)


def _refused(at: str, want: str, got: str) -> UsageError:
    return UsageError(
        "triton.bad-operands",
        "These are not the operands of the kernel",
        at=at,
        want=want,
        got=got,
        todo="Pass the tensors of spec.inputs, contiguous and in their order.",
    )
