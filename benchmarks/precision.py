"""What each precision costs and saves on SmolLM2-135M: quality on real text, bytes of weights, bytes of the engine.

    python -m benchmarks.precision [--forms lifted routed] [--precisions fp16 bf16 int8 int4-weights] [--no-build]

``lifted`` is Block AttnRes with 8 blocks; ``routed`` computes three quarters of the tokens in the MLP of one layer,
``routed-two`` half of them in two, by untrained routers. Every conversion verifies its file. Quality is measured on
four windows of 512 tokens of the State of the Union address of 2000, calibrated on the next eight. Agreement is with
the fp32 model of the same form.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir

import depthwire
from benchmarks._report import report
from depthwire.export.census import weight_sizes

MODEL = Path(".cache/models/smollm2-135m-instruct")
TEXT = Path("tests/data/sotu-2000.txt")
FORMS: dict[str, dict[str, Any]] = {
    "lifted": {"attn_res": "block:8"},
    "routed": {"route_seed": 0, "route_layers": "20", "capacity": "0.75", "route_unit": "mlp"},
    "routed-two": {"route_seed": 0, "route_layers": "18,22", "capacity": "0.5", "route_unit": "mlp"},
}
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4-weights"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--no-build", action="store_true", help="leave the engines out")
    arguments = parser.parse_args()
    for form in arguments.forms:
        base = _converted(form, "fp32", build=not arguments.no_build)
        for precision in arguments.precisions:
            found = _converted(form, precision, build=not arguments.no_build)
            for name, value in found.items():
                sized = name.endswith("_bytes")
                shown = value / base[name] if sized else value
                unit = "decisions" if name.startswith("routing") else "ratio"
                report(f"{form}_{precision}_{name}", shown, unit, f"fp32, {form}", 4 if not sized else 1)


def _converted(form: str, precision: Precision, *, build: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="depthwire-precision-") as folder:
        result = depthwire.convert(
            str(MODEL),
            Path(folder) / "out",
            **FORMS[form],
            precision=precision,
            seq_len=512,
            text=TEXT,
            windows=4,
            target="rtx",
            compute_capabilities=["SM86"],
            build=build,
        )
        info, engine = result.artifact.manifest.precision, result.engine
        found: dict[str, float] = {} if engine is None else {"engine_bytes": engine.bytes}
        weights, embedding = weight_sizes(onnx_ir.load(result.artifact.model))
        found |= {"weight_bytes": weights, "embedding_bytes": embedding}
        if info is None:
            return found
        quality = info.quality["steps"][-1] if "steps" in info.quality else info.quality
        found |= {name: quality[name] for name in ("top1_agreement", "perplexity_increase")}
        flips = quality.get("routing_flips")
        return found | ({} if flips is None else {"routing_flips": flips["count"], "routing_decisions": flips["of"]})


if __name__ == "__main__":
    main()
