"""Making a torch operator of a reference function: schema, checks, fake shapes and gradient.

The gradient recomputes: nothing of size n·d is kept between forward and backward.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch._library.custom_ops import CustomOpDef

    Shapes = Callable[[Mapping[str, Any]], Any]

SHAPES: dict[str, Callable[..., Any]] = {}
"""Operator -> what gives empty tensors like its results, without going through torch's dispatcher."""


def register(name: str, reference: Callable[..., Any], shapes: Shapes, *, widen: bool = True) -> CustomOpDef:
    """Register ``depthwire::name``, which computes what the reference does and has its gradient, twice differentiable.

    Args:
        name: The operator's name.
        reference: The executable specification; its annotated signature is the operator's schema.
        shapes: Takes the arguments by name, raises ValueError if they do not fit together, and returns empty tensors
            like the results.
        widen: Under autocast, take floating-point arguments in fp32.

    Integer and bool arguments and results take no part in the gradient.
    """
    signature = inspect.signature(reference)
    schema = torch.library.infer_schema(reference, mutates_args=())

    def named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def kernel(*args: Any, **kwargs: Any) -> Any:
        shapes(named(args, kwargs))
        return reference(*args, **kwargs)

    def fake(*args: Any, **kwargs: Any) -> Any:
        return shapes(named(args, kwargs))

    SHAPES[name] = fake
    op = torch.library.custom_op(f"depthwire::{name}", kernel, mutates_args=(), schema=schema)
    op.register_fake(fake)
    _register_gradient(op, reference)
    for device in ("cpu", "cuda") if widen else ():  # a bank holds an fp32 embedding beside sums in half precision
        op.register_autocast(device, torch.float32)
    op.__doc__ = reference.__doc__
    return op


def _register_gradient(op: CustomOpDef, reference: Callable[..., Any]) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
        leaves, ctx.structure = pytree.tree_flatten(tuple(inputs))
        ctx.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        ctx.others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)))

    def merged(ctx: Any, tensors: list[Any], others: list[Any]) -> tuple[Any, ...]:
        tensors_left, others_left = iter(tensors), iter(others)
        leaves = [next(tensors_left) if is_tensor else next(others_left) for is_tensor in ctx.is_tensor]
        return tuple(pytree.tree_unflatten(leaves, ctx.structure))

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()  # whoever wants a second derivative needs the gradient's own graph
        with torch.enable_grad():
            tensors = [_leaf(saved, again) for saved in ctx.saved_tensors]
            inputs = [tensor for tensor in tensors if tensor.requires_grad]
            out = reference(*merged(ctx, tensors, ctx.others))
            outputs = list(out) if isinstance(out, (tuple, list)) else [out]
            pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
            gradients = torch.autograd.grad(
                [output for output, _ in pairs],
                inputs,
                [grad for _, grad in pairs],
                create_graph=again,
                allow_unused=True,
            )
        by_input = iter(gradients)
        found = [next(by_input) if tensor.requires_grad else None for tensor in tensors]
        # The dispatcher drops arguments that equal their defaults, and wants no gradient for them.
        return merged(ctx, found, [None] * len(ctx.others))[: len(ctx.needs_input_grad)]

    op.register_autograd(backward, setup_context=setup_context)


def _leaf(saved: torch.Tensor, again: bool) -> torch.Tensor:
    """Return a tensor to differentiate by; integers and bools as they are."""
    if not saved.dtype.is_floating_point or (again and saved.requires_grad):
        return saved
    return saved.detach().requires_grad_()
