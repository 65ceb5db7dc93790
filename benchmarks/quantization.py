"""What int8 and int4 weights cost a language model in quality, and what they save in bytes.

The model runs in torch with the quantised weights and inputs, everything else in fp32, on the first windows of a text;
it is calibrated on later ones. The plain model, without a lift: the reads are not quantised, and the others see the
same layers.

Prints ``perplexity`` (and its increase over fp32) and ``weight_bytes_ratio``, the linear weights with their scales
against fp32, embeddings apart.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from benchmarks._report import common_arguments, report
from depthwire.export.capture import capture
from depthwire.export.inputs import text_windows
from depthwire.passes._pipeline import Pipeline
from depthwire.passes.analysis.observe import observe
from depthwire.passes.analysis.quantization import BLOCK, EIGHT_BIT_SHARE, calibrate
from depthwire.passes.quantize_linear import QuantizeLinear
from depthwire.passes.standard import standard_pipeline

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from depthwire.passes.analysis.quantization import Kind
    from depthwire.program import Program

KINDS: tuple[Kind, ...] = ("int8", "int4-weights")


def nll(program: Program, windows: Sequence[Mapping[str, Tensor]]) -> float:
    """Return the mean negative log-likelihood of the windows' own tokens, in nats."""
    total, tokens = 0.0, 0
    for window in windows:
        logits, ids = observe(program, window)[0], window["input_ids"]
        losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        total, tokens = total + float(losses), tokens + ids[:, 1:].numel()
    return total / tokens


def main() -> None:
    parser = common_arguments(__doc__, runs=1)
    parser.add_argument("--text", type=Path, default=Path("tests/data/sotu-2000.txt"))
    parser.add_argument("--windows", type=int, default=4, help="windows that are compared")
    parser.add_argument("--calibration-windows", type=int, default=8, help="windows behind them")
    parser.add_argument("--block-size", type=int, default=BLOCK, help="of int4-weights")
    parser.add_argument("--eight-bit-share", type=float, default=EIGHT_BIT_SHARE, help="of int4-weights")
    arguments = parser.parse_args()
    program = standard_pipeline(attn_res=None).run(capture(arguments.model, seq_len=arguments.seq_len))
    count = arguments.windows + arguments.calibration_windows
    inputs = [
        {name: torch.from_numpy(array) for name, array in window.items()}
        for window in text_windows(program, arguments.text, count=count)
    ]
    compared, later = inputs[: arguments.windows], inputs[arguments.windows :]
    plain = nll(program, compared)
    how = (
        f"{arguments.model.name}, {len(compared)} windows of {arguments.seq_len}, calibrated on {len(later)} later ones"
    )
    report("perplexity", math.exp(plain), "perplexity", f"fp32, {how}", 1)
    for kind in KINDS:
        plan = calibrate(
            program, later, kind, block_size=arguments.block_size, eight_bit_share=arguments.eight_bit_share
        )
        lost = nll(Pipeline((QuantizeLinear(plan),)).run(program), compared)
        report("perplexity", math.exp(lost), "perplexity", f"{plan}, {how}", 1)
        report("perplexity_increase", math.expm1(lost - plain), "ratio", f"{kind} against fp32, {how}", 1)
        report("weight_bytes_ratio", plan.nbytes / plan.float_nbytes, "ratio", f"{kind} against fp32", 1)


if __name__ == "__main__":
    main()
