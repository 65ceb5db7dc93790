"""The routing kernels on torch tensors, as the operators of ``docs/routing_ops.md``: on a GPU or interpreted.

As in ``launch``, the interpreter is chosen by ``TRITON_INTERPRET=1`` in the environment before the first call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthwire.errors import UsageError
from depthwire.runtime.triton.routing_spec import RoutingSpec, budget_block, select_block

if TYPE_CHECKING:
    from torch import Tensor


def kernel_of(spec: RoutingSpec) -> Any:
    """Return the ``triton.jit`` function of a kernel."""
    from depthwire.runtime.triton.kernels import move, routed_attention, select, surprise

    return {
        "select": select.select_tokens,
        "budget": select.select_tokens_budget,
        "gather": move.gather_tokens,
        "scatter": move.scatter_tokens,
        "sums": surprise.surprise_sums,
        "rank": surprise.surprise_rank,
        "surprise": surprise.surprise_score,
        "attention": routed_attention.routed_attention,
        "slot_attention": routed_attention.routed_attention,
    }[spec.kind]


def constants_of(spec: RoutingSpec) -> dict[str, int | float | bool]:
    """Return the compile-time arguments of the kernel, in the order of its signature."""
    plan = spec.launch
    tile = {"TILE": plan.tile, "COLUMNS": plan.columns}
    if spec.attends:
        heads = {"KV_HEADS": spec.kv_heads, "GROUP": spec.group, "WIDTH": spec.width}
        lanes = max(16, 1 << (spec.width - 1).bit_length())
        return {**heads, "LANES": lanes, "ROWS": plan.tile, "KEYS": plan.columns, "SCALE": spec.scale}
    own: dict[str, dict[str, int | float | bool]] = {
        "select": {"BLOCK": spec.block, "WINDOW": spec.window},
        "budget": {"BLOCK": spec.block or spec.steps, "WHOLE": spec.block > 0},
        "gather": {"WORDS": spec.row_bytes // spec.word, **tile},
        "scatter": {"WORDS": spec.row_bytes // spec.word, **tile, "SLOTS": 64},
        "sums": {"WIDTH": spec.width, **tile},
        "rank": {"WINDOW": spec.window, **tile, "SCAN": 1024},
        "surprise": {
            "WIDTH": spec.width,
            "WINDOW": spec.window,
            **tile,
            "ROWS": min(plan.tile, 4096 // max(1, plan.columns)),
            "SCAN": 1024,
        },
    }
    return own[spec.kind]


def arguments_of(spec: RoutingSpec, values: dict[str, Any], absent: Any = None) -> dict[str, Any]:
    """Return the kernel's run-time arguments by its own names, in the order of its signature.

    Args:
        spec: The kernel.
        values: One value for every name in ``spec.inputs``, ``spec.outputs`` and ``spec.scalars``.
        absent: What stands for a pointer that this form does not have.
    """
    names = [*spec.inputs, *spec.outputs, *spec.scalars]
    if spec.kind == "slot_attention":
        names.insert(3, "index")
    return {name: values.get(name, absent) for name in names}


def blocks(spec: RoutingSpec, batch: int, tokens: int, slots: int) -> int:
    """Return the thread blocks of a launch; ``runtime/native/cuda`` computes the same."""
    plan = spec.launch
    if spec.attends:
        return batch * spec.kv_heads * -(-slots * spec.group // plan.tile)
    if plan.tile == 0:
        return batch
    return batch * -(-(slots if spec.kind == "gather" else tokens) // plan.tile)


def run(spec: RoutingSpec, tensors: dict[str, Tensor], batch: int, tokens: int, slots: int = 0) -> None:
    """Launch a kernel on its tensors, outputs included.

    Raises:
        UsageError: ``triton.bad-operands``: a tensor that is not contiguous, or of another dtype.
    """
    for name in (*spec.inputs, *spec.outputs):
        tensor, dtype = tensors[name], spec.dtype_of(name)
        if _name(tensor) != dtype or not tensor.is_contiguous():
            got = f"{tensor.dtype}{list(tensor.shape)}" + ("" if tensor.is_contiguous() else ", strided")
            raise UsageError(
                "triton.bad-operands",
                "These are not the operands of the kernel",
                at=name,
                want=f"contiguous torch.{dtype}",
                got=got,
                todo="Pass the operator's tensors, contiguous.",
            )
    grid = (blocks(spec, batch, tokens, slots),)
    if grid[0] == 0:
        return
    values: dict[str, Any] = {**tensors, "tokens": tokens, "slots": slots}
    plan = spec.launch
    kernel_of(spec)[grid](
        **arguments_of(spec, values), **constants_of(spec), num_warps=plan.warps, num_stages=plan.stages
    )


def select_tokens(score: Tensor, valid: Tensor, slots: int, window: int = 0) -> tuple[Tensor, Tensor]:
    """Compute ``SelectTokens`` of fp32 scores ``[B, T]``: index int64 and taken bool, ``[B, K]``."""
    import torch

    batch, tokens = score.shape
    spec = RoutingSpec("select", block=select_block((tokens - 1).bit_length(), window), window=window)
    index, taken = _slots(score, slots)
    bits = {"valid": valid.view(torch.int8), "taken": taken.view(torch.int8)}
    run(spec, {"score": score, "index": index, **bits}, batch, tokens, slots)
    return index, taken


def select_tokens_budget(
    score: Tensor,
    valid: Tensor,
    slots: int,
    *,
    threshold: Tensor,
    budget: Tensor,
    state: Tensor,
    spec: RoutingSpec | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``SelectTokensBudget`` of fp32 scores ``[B, T]``: index, taken ``[B, K]`` and the state ``[B, 2]``."""
    import torch

    batch, tokens = score.shape
    spec = spec or RoutingSpec("budget", block=budget_block((tokens - 1).bit_length()))
    index, taken = _slots(score, slots)
    state_out = torch.empty_like(state)
    bits = {"valid": valid.view(torch.int8), "taken": taken.view(torch.int8)}
    given = {"score": score, "threshold": threshold, "budget": budget, "state": state}
    run(spec, {**given, **bits, "index": index, "state_out": state_out}, batch, tokens, slots)
    return index, taken, state_out


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Compute ``GatherTokens``: ``[B, K, ...]`` of ``x [B, T, ...]``."""
    batch, slots = index.shape
    out = x.new_empty((batch, slots, *x.shape[2:]))
    if out.numel():
        spec = RoutingSpec("gather", row_bytes=out[0, 0].numel() * x.element_size())
        run(spec, {"x": _words(spec, x), "index": index, "out": _words(spec, out)}, batch, x.shape[1], slots)
    return out


def scatter_tokens(base: Tensor, index: Tensor, taken: Tensor, rows: Tensor, *, in_place: bool = False) -> Tensor:
    """Compute ``ScatterTokens`` into ``base [B, T, ...]``: into a copy, or into itself."""
    import torch

    batch, slots = index.shape
    out = base if in_place else torch.empty_like(base)
    if out.numel():
        spec = RoutingSpec("scatter", row_bytes=base[0, 0].numel() * base.element_size())
        moved = {name: _words(spec, each) for name, each in (("base", base), ("rows", rows), ("out", out))}
        given = {"index": index, "taken": taken.view(torch.int8)}
        run(spec, {**moved, **given}, batch, base.shape[1], slots)
    return out


def surprise_score(delta: Tensor, prior: Tensor, criteria: Tensor, valid: Tensor, window: int = 100) -> Tensor:
    """Compute ``SurpriseScore`` of fp32, fp16 or bf16 ``[B, T, d]``: the rank, fp32 ``[B, T]``."""
    import torch

    batch, tokens, width = delta.shape
    sums = torch.empty(batch, 2, tokens, device=delta.device)
    rank = torch.empty(batch, tokens, device=delta.device)
    bits = valid.view(torch.int8)
    spec = RoutingSpec("sums", width=width, dtype=_name(delta))
    run(spec, {"delta": delta, "prior": prior, "valid": bits, "sums": sums}, batch, tokens)
    spec = RoutingSpec("rank", window=window, dtype=_name(criteria))
    run(spec, {"sums": sums, "criteria": criteria, "valid": bits, "rank": rank}, batch, tokens)
    return rank


@dataclass(frozen=True)
class Attention:
    """The attention of a routed block.

    Attributes:
        scale: Factor on the logits.
        tensor_cores: Tiles for matrix instructions, for every GPU but those of 7.5.
    """

    scale: float
    tensor_cores: bool = True

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, index: Tensor | None = None) -> Tensor:
        """Attend from the slots.

        Args:
            query: ``[B, K, H, D]``, fp32, fp16 or bf16.
            key: ``[B, T, Hkv, D]``, where Hkv divides H; head h reads key head h // (H / Hkv).
            value: Like ``key``.
            kept: bool ``[B, T]``: the keys there are. Padding's, or untaken slots', are never read.
            index: int64 ``[B, K]``: the token of each slot, which sees the keys up to it. ``None``: the keys are the
                slots', and a slot sees those up to itself.

        Returns:
            ``[B, K, H, D]``, 0 where a query sees no key.
        """
        import torch

        batch, slots, heads, width = query.shape
        tokens, kv_heads = key.shape[1:3]
        spec = RoutingSpec(
            "slot_attention" if index is None else "attention",
            width=width,
            dtype=_name(query),
            kv_heads=kv_heads,
            group=heads // kv_heads,
            scale=self.scale,
            tensor_cores=self.tensor_cores,
        )
        out = torch.empty_like(query)
        tensors = {"query": query, "key": key, "value": value, "kept": kept.view(torch.int8), "out": out}
        run(spec, tensors if index is None else {**tensors, "index": index}, batch, tokens, slots)
        return out


def _slots(score: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    import torch

    shape = (score.shape[0], slots)
    return score.new_empty(shape, dtype=torch.int64), score.new_empty(shape, dtype=torch.bool)


def _words(spec: RoutingSpec, tensor: Tensor) -> Tensor:
    import torch

    return tensor.view(torch.uint8).reshape(-1).view({4: torch.int32, 2: torch.int16, 1: torch.int8}[spec.word])


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
