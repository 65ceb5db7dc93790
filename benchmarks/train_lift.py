"""What training the queries of a lifted model gains on held-out text, against fine-tunes with as many parameters.

Every way of training (``--ways``) sees the same tokens of the same text in the same order, with the same optimiser and
number of steps (``examples/train_lift.py``). Its learning rate is the one of three with the lowest loss on the
validation text after ``--probe-steps`` (``--rates`` for gains and biases, ``--query-rates`` for queries, both by
position for both); then it trains from the start for ``--steps``.

Prints, for each way and held-out text, ``held_out_loss`` in nats per token, the loss of every window, and
``held_out_difference`` from the untouched model and from the fine-tune with as many parameters: the mean over windows
read by both, with its standard error. The texts are those of ``tools/fetch_texts.py``.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from examples.train_lift import Training, capture, choose, held_out_losses, paired, tokens, train_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("block:8 queries", "plain norms", "block:8 queries+norms", "plain norms+bias", "full queries")
PAIRS = (
    ("block:8 queries", "plain norms"),
    ("full queries", "plain norms"),
    ("block:8 queries+norms", "plain norms+bias"),
    ("block:8 queries+norms", "plain norms"),
)


def log(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def candidates(train: str, options: argparse.Namespace) -> list[Training]:
    """Return the trainings to choose from: one for each rate, or pair of rates, of what is trained."""
    gains, queries = "norms" in train, "queries" in train
    return [
        Training(1, lr if gains else 0.0, query_lr if queries else 0.0, options.seed, bf16=options.bf16)
        for lr, query_lr in zip(options.rates, options.query_rates, strict=True)
    ]


def choose_rates(
    way: str,
    module: nn.Module,
    parameters: dict[str, nn.Parameter],
    texts: dict[str, Tensor],
    options: argparse.Namespace,
) -> Training:
    """Return the training with the lowest validation loss after a few steps; the parameters are left as found."""
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    losses: dict[Training, float] = {}
    for how in candidates(way.split()[1], options):
        short = replace(how, steps=options.probe_steps)
        train_parameters(module, parameters, texts["train"], options.seq_len, short)
        losses[how] = float(held_out_losses(module, texts["validation"], options.seq_len).mean())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
        log(figure="validation_loss", way=way, value=round(losses[how], 5), **asdict(short))
    return replace(min(losses, key=lambda how: losses[how]), steps=options.steps)


def train_way(way: str, texts: dict[str, Tensor], options: argparse.Namespace) -> dict[str, Tensor]:
    """Train one way and return its loss on every window of each held-out text."""
    form, train = way.split()
    started = time.process_time()
    module = capture(options.model, train, form, options.seq_len).module()
    parameters = choose(module, train)
    count = sum(parameter.numel() for parameter in parameters.values())
    how = choose_rates(way, module, parameters, texts, options)
    losses = train_parameters(module, parameters, texts["train"], options.seq_len, how)
    tenth = max(1, len(losses) // 10)
    log(
        figure="trained",
        way=way,
        parameters=count,
        **asdict(how),
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        cpu_seconds=round(time.process_time() - started),
    )
    return judge(way, module, texts, options)


def judge(way: str, module: nn.Module, texts: dict[str, Tensor], options: argparse.Namespace) -> dict[str, Tensor]:
    """Return and print the loss on every window of each held-out text."""
    losses = {name: held_out_losses(module, texts[name], options.seq_len) for name in options.judged}
    for name, values in losses.items():
        log(figure="held_out_loss", way=way, text=name, value=round(float(values.mean()), 5), n=len(values))
        log(figure="window_losses", way=way, text=name, value=[round(value, 6) for value in values.tolist()])
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "models" / "smollm2-135m-instruct")
    parser.add_argument("--texts", type=Path, default=ROOT / ".cache" / "texts")
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--rates", nargs="+", type=float, default=(1e-3, 3e-3, 1e-2))
    parser.add_argument("--query-rates", nargs="+", type=float, default=(3e-5, 1e-4, 3e-4))
    parser.add_argument("--probe-steps", type=int, default=20)
    parser.add_argument("--steps", type=int, default=72)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=20, help="of each held-out text")
    parser.add_argument("--validation-windows", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="train with bf16 autocast; losses are fp32 all the same")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.judged = ("sotu-held-out", "moby-dick")
    torch.set_num_threads(options.threads)

    def spread(name: str, windows: int) -> Tensor:
        """Take windows from all over a text: as many, at equal distances."""
        ids = tokens(options.model, options.texts / f"{name}.txt")
        rows = ids[: len(ids) // options.seq_len * options.seq_len].reshape(-1, options.seq_len)
        return rows[torch.linspace(0, len(rows) - 1, min(windows, len(rows))).long()].flatten()

    texts = {
        "train": tokens(options.model, options.texts / "sotu-train.txt"),
        "validation": spread("sotu-validation", options.validation_windows),
        **{name: spread(name, options.windows) for name in options.judged},
    }
    plain = capture(options.model, "norms", "", options.seq_len).module()
    results = {"plain": judge("plain", plain, texts, options)}
    value = float(held_out_losses(plain, texts["validation"], options.seq_len).mean())
    log(figure="validation_loss", way="plain", value=value)
    del plain
    for way in options.ways:
        results[way] = train_way(way, texts, options)
        for name in options.judged:
            compare(name, way, "plain", results)
    for way, other in PAIRS:
        if way in results and other in results:
            for name in options.judged:
                compare(name, way, other, results)


def compare(name: str, way: str, other: str, results: dict[str, dict[str, Tensor]]) -> None:
    """Print how one way's loss on a text differs from another's, window by window."""
    figures = paired(results[other][name], results[way][name])
    figures = {key: None if value is None else round(value, 5) for key, value in figures.items()}
    won = int((results[way][name] < results[other][name]).sum())
    count = len(results[way][name])
    log(figure="held_out_difference", text=name, way=way, against=other, n=count, won=won, **figures)


if __name__ == "__main__":
    main()
