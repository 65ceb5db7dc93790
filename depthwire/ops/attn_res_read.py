"""``depthwire::attn_res_read``: softmax attention over depth.

For every token independently, with sources v_1 … v_n (earlier outputs of the network) and one query u::

    r_i = 1 / sqrt(mean_d(v_i²) + eps)          inverse root mean square of a source
    s_i = scale · (u · v_i) · r_i               logit: the query against the normalised source
    p   = softmax_i(s)                          over the n sources
    out = Σ_i p_i v_i                           the sources themselves are mixed, un-normalised

This is the read of Attention Residuals (arXiv 2603.15031, section 3), whose key norm's gain is folded into ``u``.
The arithmetic is fp32 whatever the dtype of the sources (fp64 for fp64 sources); the result has their dtype.
With u = 0 the result is the mean of the sources.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 - torch reads the annotations to make the schema

import torch
from torch import Tensor

_SCHEMA_NAME = "depthwire::attn_res_read"


def attn_res_read_reference(query: Tensor, sources: Sequence[Tensor], eps: float, scale: float) -> Tensor:
    """Compute the read with plain torch operations; the executable specification of every other body.

    Args:
        query: ``[d]``, any floating dtype.
        sources: n tensors ``[..., d]`` of one shape and dtype, n >= 1.
        eps: Added to the mean square.
        scale: Factor on the logits.

    Returns:
        ``[..., d]`` in the dtype of the sources.
    """
    compute = torch.float64 if sources[0].dtype == torch.float64 else torch.float32
    values = torch.stack([source.to(compute) for source in sources])
    rstd = torch.rsqrt(values.square().mean(-1) + eps)
    logits = (values * query.to(compute)).sum(-1) * rstd * scale
    weights = torch.softmax(logits, dim=0)
    return (weights.unsqueeze(-1) * values).sum(0).to(sources[0].dtype)


@torch.library.custom_op(_SCHEMA_NAME, mutates_args=())
def attn_res_read(query: Tensor, sources: Sequence[Tensor], eps: float, scale: float) -> Tensor:
    """Mix the sources by softmax attention over depth; see the module's docstring for the formula.

    Args:
        query: ``[d]``, any floating dtype.
        sources: n tensors ``[..., d]`` of one shape and dtype, n >= 1.
        eps: Added to the mean square.
        scale: Factor on the logits.

    Returns:
        ``[..., d]`` in the dtype of the sources. Differentiable with respect to the query and every source.

    Raises:
        ValueError: No source, sources of different shapes or dtypes, or a query that is not ``[d]``.
    """
    _check(query, sources)
    return attn_res_read_reference(query, sources, eps, scale)


@attn_res_read.register_fake
def _(query: Tensor, sources: Sequence[Tensor], eps: float, scale: float) -> Tensor:  # noqa: ARG001
    _check(query, sources)
    return torch.empty_like(sources[0], memory_format=torch.contiguous_format)


def _check(query: Tensor, sources: Sequence[Tensor]) -> None:
    if not sources:
        raise ValueError("attn_res_read: at least one source is needed")
    first = sources[0]
    for index, source in enumerate(sources):
        if source.shape != first.shape or source.dtype != first.dtype:
            raise ValueError(
                f"attn_res_read: source {index} is {source.dtype}{list(source.shape)}, "
                f"source 0 is {first.dtype}{list(first.shape)}; all must agree"
            )
    if not first.dtype.is_floating_point:
        raise ValueError(f"attn_res_read: sources must be floating point, not {first.dtype}")
    if not first.dim() or query.shape != first.shape[-1:]:
        raise ValueError(f"attn_res_read: query must be {list(first.shape[-1:])}, not {list(query.shape)}")
    if not query.dtype.is_floating_point:
        raise ValueError(f"attn_res_read: the query must be floating point, not {query.dtype}")


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Sequence[Tensor], float, float],
    output: Tensor,  # noqa: ARG001
) -> None:
    query, sources, eps, scale = inputs
    ctx.save_for_backward(query, *sources)
    ctx.eps, ctx.scale = eps, scale  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor | None, list[Tensor | None], None, None]:
    """Recompute the read under autograd: nothing of size n·d is kept between forward and backward."""
    saved: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
    again = torch.is_grad_enabled()  # whoever wants a second derivative needs the gradient's own graph
    with torch.enable_grad():
        leaves = [t if again and t.requires_grad else t.detach().requires_grad_() for t in saved]
        out = attn_res_read_reference(leaves[0], leaves[1:], ctx.eps, ctx.scale)  # type: ignore[attr-defined]
        grads = torch.autograd.grad(out, leaves, grad, create_graph=again)
    return grads[0], list(grads[1:]), None, None


attn_res_read.register_autograd(_backward, setup_context=_setup_context)
