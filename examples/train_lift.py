"""Train the queries of a lifted language model, and nothing else, on a text; then convert the result.

    python examples/train_lift.py .cache/models/smollm2-135m-instruct -o out/tuned.pt2
    depthwire convert out/tuned.pt2 --text tests/data/sotu-2000.txt -o out/tuned

The lift starts from zero queries, with which the model computes what it did before. ``--train queries+norms`` trains
the gains of the norms as well. ``norms`` and ``norms+bias`` leave the model plain: they are the fine-tunes with as
many parameters, to compare with (docs/training_the_lift.md). Runs with one seed see the same tokens in the same order.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

import depthwire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from depthwire.program import Program

QUERIES = "attn_res.query."
TRAINED = ("queries", "queries+norms", "norms", "norms+bias")
TEXT = Path(__file__).resolve().parent.parent / "tests" / "data" / "sotu-2000.txt"


@dataclass(frozen=True)
class Training:
    """How to train: everything but the model and the text."""

    steps: int
    lr: float
    query_lr: float
    seed: int = 0
    batch: int = 1
    bf16: bool = False


class Biased(nn.Module):
    """A norm with a bias behind it."""

    def __init__(self, norm: Any) -> None:
        """Start from the norm as it is: the bias is zero."""
        super().__init__()
        self.norm = norm
        self.bias = nn.Parameter(torch.zeros_like(norm.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``norm(x) + bias``, shaped as ``x``."""
        out: Tensor = self.norm(x) + self.bias
        return out


def capture(model: Path, train: str, attn_res: str, seq_len: int, batch: int = 1) -> Program:
    """Return the program to train: lifted with zero queries, plain, or plain with a zero bias behind each norm."""
    if train.startswith("queries"):
        return depthwire.rewrite(model, attn_res=attn_res, seq_len=seq_len, batch=batch)
    if train == "norms":
        return depthwire.rewrite(model, seq_len=seq_len, batch=batch)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    norms = [name for name, module in loaded.named_modules() if type(module).__name__.endswith("RMSNorm")]
    for name in norms:
        loaded.set_submodule(name, Biased(loaded.get_submodule(name)))
    program = depthwire.rewrite(loaded, seq_len=seq_len, batch=batch)
    return program.replace(source=dataclasses.replace(program.source, tokenizer=str(model)))


def choose(module: nn.Module, train: str) -> dict[str, nn.Parameter]:
    """Freeze all parameters but those to be trained, and return these by name."""
    chosen = {}
    for name, parameter in module.named_parameters():
        is_query = name.startswith(QUERIES)
        parameter.requires_grad_(("queries" in train and is_query) or ("norms" in train and "norm" in name))
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def tokens(model: Path, text: Path) -> Tensor:
    """Return a text as tokens ``[n]``, without special ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean negative log-likelihood per token of each row, in nats: ``[batch]``."""
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(1)


@torch.no_grad()
def held_out_losses(module: nn.Module, ids: Tensor, seq_len: int, batch: int = 1) -> Tensor:
    """Return the loss of each consecutive window of a text, fp32: ``[windows]``; a rest that fills none is left out."""
    windows = ids[: len(ids) // (seq_len * batch) * seq_len * batch].reshape(-1, batch, seq_len)
    if not len(windows):
        raise click.ClickException(f"the held-out text has {len(ids)} tokens, fewer than {seq_len * batch}")
    return torch.cat([loss_of(module(group), group) for group in windows])


def train_parameters(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    ids: Tensor,
    seq_len: int,
    how: Training,
    *,
    report: Callable[[float], None] = lambda _: None,
) -> list[float]:
    """Train in place on windows drawn at random, and return the loss of every step.

    Args:
        module: Takes tokens ``[batch, seq_len]``, returns logits.
        parameters: What to train, by name; the rest is frozen.
        ids: The text, ``[n]``.
        seq_len: Tokens per window.
        how: Steps, rates, seed. A logit is a sum over the whole width, so that a query takes much smaller steps than
            a gain does.
        report: Called with the loss after every step.
    """
    generator = torch.Generator().manual_seed(how.seed)
    rates = {name: how.query_lr if name.startswith(QUERIES) else how.lr for name in parameters}
    groups = [{"params": [parameter], "lr": rates[name]} for name, parameter in parameters.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)  # decay would pull the queries back to zero
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, how.steps))
    losses = []
    for _ in range(how.steps):
        starts = torch.randint(len(ids) - seq_len + 1, (how.batch,), generator=generator).tolist()
        rows = torch.stack([ids[start : start + seq_len] for start in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=how.bf16):
            logits = module(rows)
        loss = loss_of(logits, rows).mean()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        report(losses[-1])
    return losses


def rate(step: int, steps: int) -> float:
    """Return the factor on the learning rate: a linear warm-up over a tenth of the steps, then a cosine to zero."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def paired(before: Tensor, after: Tensor) -> dict[str, float | None]:
    """Return both means, the mean of the windows' differences and its standard error (of two windows or more)."""
    difference = (after - before).double()
    error = float(difference.std() / math.sqrt(len(difference))) if len(difference) > 1 else None
    means = {"before": float(before.double().mean()), "after": float(after.double().mean())}
    return {**means, "difference": float(difference.mean()), "standard_error": error}


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The .pt2 file to write.")
@click.option("--train", type=click.Choice(TRAINED), default="queries", show_default=True)
@click.option("--attn-res", default="block:8", show_default=True, help="full, block:N or block-layers:K.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), default=TEXT, help="What to train on.")
@click.option(
    "--held-out",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help="What to judge on; may be repeated. Without it the last quarter of the text is held out.",
)
@click.option("--steps", default=100, show_default=True)
@click.option("--lr", default=3e-3, show_default=True, help="Learning rate of gains and biases.")
@click.option("--query-lr", default=1e-4, show_default=True, help="Learning rate of queries.")
@click.option("--seq-len", default=256, show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--bf16", is_flag=True, help="Train with bf16 autocast; the held-out loss is fp32 all the same.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--convert", type=click.Path(path_type=Path), help="Convert the result into this directory and verify it."
)
def main(
    *,
    model: Path,
    out: Path,
    train: str,
    attn_res: str,
    text: Path,
    held_out: tuple[Path, ...],
    convert: Path | None,
    seq_len: int,
    **how: Any,
) -> None:
    """Train the lift of MODEL, a Hugging Face directory, and write it as a .pt2 file."""
    console, started = Console(stderr=True), time.perf_counter()
    if out.suffix != ".pt2":
        raise click.UsageError(f"-o takes the name of a .pt2 file, not {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    training = Training(**how)
    ids = tokens(model, text)
    judged = {str(path): tokens(model, path) for path in held_out}
    if not judged:
        cut = len(ids) * 3 // 4
        ids, judged = ids[:cut], {f"{text}, last quarter": ids[cut:]}
    if len(ids) < seq_len:
        raise click.ClickException(f"the text has {len(ids)} tokens, fewer than {seq_len}")

    program = capture(model, train, attn_res, seq_len, training.batch)
    module = program.module()
    parameters = choose(module, train)
    count = sum(parameter.numel() for parameter in parameters.values())
    console.print(f"{count:,} parameters to train; {len(ids):,} tokens of text")

    before = {name: held_out_losses(module, part, seq_len, training.batch) for name, part in judged.items()}
    columns = TextColumn("loss {task.fields[loss]:.3f}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=training.steps, loss=math.nan)
        losses = train_parameters(
            module, parameters, ids, seq_len, training, report=lambda loss: progress.update(task, advance=1, loss=loss)
        )
    after = {name: held_out_losses(module, part, seq_len, training.batch) for name, part in judged.items()}

    program.with_state(module.state_dict()).save(out)
    result = {
        "train": train,
        "attn_res": attn_res if "queries" in train else None,
        "parameters": count,
        **dataclasses.asdict(training),
        "seq_len": seq_len,
        "train_loss": [losses[0], losses[-1]],
        "held_out": {
            name: {"tokens": len(before[name]) * (seq_len - 1), **paired(before[name], after[name])} for name in judged
        },
        "seconds": round(time.perf_counter() - started, 1),
        "out": str(out),
    }
    click.echo(json.dumps(result))
    if convert is None:
        console.print(f"depthwire convert {out} -o {out.with_suffix('')}")
        return
    depthwire.convert(out, convert)  # raises VerificationError if ONNX Runtime computes something else
    console.print(f"{convert}: converted and verified")


if __name__ == "__main__":
    main()
