r"""Prefill of Depthwire's plain export against the same checkpoint built by onnxruntime-genai, in ONNX Runtime.

The other side is made beforehand, by onnxruntime-genai 0.18.0; ``pip install --no-deps`` leaves the installed ONNX
Runtime as it is:

    pip install --no-deps --target out/genai-site onnxruntime-genai==0.18.0
    PYTHONPATH=out/genai-site python -m onnxruntime_genai.models.builder \
        -i .cache/models/smollm2-135m-instruct -o out/genai -p fp32 -e cpu -c out/genai-cache
    python -m benchmarks.genai_prefill --genai out/genai

Both files run as plain ONNX Runtime sessions with every optimisation, in turn, on the same token ids, and are asked
for their logits alone. Both multiply the hidden state of every position by the vocabulary matrix. What differs: the
builder's graph has dynamic shapes and an attention mask (here all ones), and its GroupQueryAttention appends to a KV
cache (empty before, ``seq_len`` long after: a prefill); ours is for one length and writes no cache.

The logits are compared first; the script fails if they lie further apart than the table of tolerances grants.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import depthwire
from benchmarks._latency import open_session, ratio, timed
from benchmarks._report import common_arguments, report
from depthwire.runtime.tolerances import tolerance

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray


def feeds_of(session: onnxruntime.InferenceSession, ids: NDArray[np.int64], head_size: int) -> dict[str, NDArray[Any]]:
    """Return the inputs of a prefill of ``ids`` ``[batch, length]``: every position attended, every cache empty.

    Args:
        session: Of either side.
        ids: Token ids.
        head_size: Width of one head of a cache ``[batch, heads, past, head_size]``; the graph names the heads alone.

    Raises:
        SystemExit: An input that a prefill does not know.
    """
    feeds: dict[str, NDArray[Any]] = {}
    for item in session.get_inputs():
        if item.name == "input_ids":
            feeds[item.name] = ids
        elif item.name == "attention_mask":
            feeds[item.name] = np.ones_like(ids)
        elif item.name == "position_ids":
            feeds[item.name] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
        elif item.name.startswith("past_key_values."):
            feeds[item.name] = np.zeros((len(ids), item.shape[1], 0, head_size), np.float32)
        else:
            raise SystemExit(f"{item.name}: not an input of a prefill")
    return feeds


def agreed(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Return the largest difference of two sets of logits, relative to the largest of theirs.

    Raises:
        SystemExit: Shapes differ, or the values differ by more than the table of tolerances grants.
    """
    if ours.shape != theirs.shape:
        raise SystemExit(f"logits of shapes {ours.shape} and {theirs.shape}")
    largest = float(np.abs(theirs).max())
    difference = float(np.abs(ours - theirs).max())
    if not difference <= tolerance("float32", "logits").allowed(largest):
        raise SystemExit(f"logits differ by {difference:g}, the largest is {largest:g}")
    return difference / largest


def main() -> None:
    parser = common_arguments(__doc__, runs=21)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--genai", type=Path, required=True, help="folder that the builder wrote, fp32 for the CPU")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    length, runs = arguments.seq_len, arguments.runs
    config = json.loads((arguments.genai / "genai_config.json").read_text())["model"]
    ids = np.random.default_rng(0).integers(0, min(1000, config["vocab_size"]), (1, length))
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "plain"
        depthwire.export(arguments.model, folder, seq_len=length)
        sessions = {
            "plain": open_session(folder / "model.onnx", arguments.threads),
            "genai": open_session(arguments.genai / config["decoder"]["filename"], arguments.threads),
        }
        head_size = config["decoder"]["head_size"]
        calls = {
            name: partial(session.run, ["logits"], feeds_of(session, ids, head_size))
            for name, session in sessions.items()
        }
        difference = agreed(calls["plain"]()[0], calls["genai"]()[0])
        seconds = timed(calls, runs)
    how = f"{arguments.model.name}, length {length}, ORT CPU, {arguments.threads} threads"
    report("logits_difference", difference * 1e6, "ppm", f"of the largest logit, {how}", 1)
    for name, found in seconds.items():
        report(f"{name}_latency", float(np.median(found)), "s", how, runs)
    value, upper = ratio(seconds["plain"], seconds["genai"])
    report(f"plain_over_genai_t{length}", value, "ratio", f"{how}; 95 % upper bound {upper:.4f}", runs)


if __name__ == "__main__":
    main()
