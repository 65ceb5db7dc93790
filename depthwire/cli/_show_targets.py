"""Targets as people read them: one row each, and everything about one."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from depthwire.cli._show import pairs_table, rows_table
from depthwire.reporters import megabytes
from depthwire.runtime.target import Precision

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from depthwire.runtime.target import Target

_TRIED = {"run": "run", "built": "built, not run", "nothing": "not run"}
_FORMS = {
    "function": "function bodies",
    "plugin": "plugins or function bodies",
    "kernels": "kernels or function bodies",
}


def show_targets(targets: Sequence[Target]) -> Table:
    """Return one row per target; only compute capabilities are broken into lines."""
    from rich.table import Table
    from rich.text import Text

    every = get_args(Precision)
    table = Table(caption=f"all precisions: {', '.join(every)}", caption_justify="left")
    for name in ("target", "SM", "memory", "builder (JetPack)", "built", "ops", "precisions", "tried"):
        wide = name == "SM"
        table.add_column(name, no_wrap=not wide, min_width=8 if wide else None, overflow="fold")
    for target in targets:
        lacks = [name for name in every if name not in target.precisions]
        cells = (
            target.name,
            " ".join(name.removeprefix("SM") for name in target.compute_capabilities),
            _memory(target).removesuffix(" shared"),
            _builder(target) + (f" ({target.jetpack})" if target.jetpack else ""),
            _built(target),
            target.custom_ops,
            f"not {', '.join(lacks)}" if lacks else "all",
            _TRIED[target.tried].removesuffix(", not run"),
        )
        table.add_row(*map(Text, cells))
    return table


def show_target(target: Target) -> Iterator[RenderableType]:
    """Yield everything that is known of one target."""
    yield pairs_table(
        [
            ("target", target.name),
            ("also", ", ".join(target.aliases)),
            ("hardware", target.title),
            ("compute capabilities", ", ".join(target.compute_capabilities)),
            ("built for by default", _default(target)),
            ("memory", _memory(target)),
            ("of it for the system", megabytes(target.reserved_bytes) if target.reserved_bytes else ""),
            ("context", megabytes(target.context_bytes) if target.context_bytes else ""),
            ("board", ", ".join(target.boards)),
            ("builder", _builder(target)),
            ("built", _built(target)),
            ("tried here", _TRIED[target.tried]),
            ("JetPack", target.jetpack),
            ("Jetson Linux, CUDA", ", ".join(filter(None, (target.l4t, target.cuda)))),
            ("builder versions", _range(target)),
            ("typing", _typing(target)),
            ("precisions", ", ".join(target.precisions)),
            *((f"precisions of {name}", ", ".join(kinds)) for name, kinds in target.precision_limits.items()),
            ("opset", target.opset),
            ("newest opset of its parser", target.parser_opset),
            ("operators it lacks", ", ".join(target.operators_missing)),
            ("attention", target.attention),
            ("custom operators", _FORMS[target.custom_ops] + (", expanded" if target.expand_functions else "")),
            ("largest K of TopK", target.topk_limit),
            ("DLA", target.dla),
            ("workspace", megabytes(target.workspace_bytes) if target.workspace_bytes else ""),
            ("optimisation level", target.optimization_level),
            ("power modes", ", ".join(target.power_modes)),
        ]
    )
    if target.variants:
        rows = [
            (name, each.l4t, each.cuda, each.tensorrt, _FORMS[each.custom_ops], ", ".join(each.operators_missing))
            for name, each in target.variants.items()
        ]
        columns = ("JetPack", "Jetson Linux", "CUDA", "TensorRT", "custom operators", "operators it lacks")
        yield rows_table(rows, columns, "with --jetpack")
    for label, lines in (
        ("refused", [f"{name}: {why}" for name, why in target.refused_compute_capabilities.items()]),
        ("notes", target.notes),
        ("not confirmed", target.unconfirmed),
    ):
        yield from ([label, *(f"  {line}" for line in lines)] if lines else ())


def _default(target: Target) -> str:
    different = target.default_compute_capabilities != target.compute_capabilities
    return ", ".join(target.default_compute_capabilities) if different else ""


def _memory(target: Target) -> str:
    if target.memory_bytes is None:
        return ""
    return f"{target.memory_bytes / 1e9:.0f} GB" + (" shared" if target.memory_is_unified else "")


def _builder(target: Target) -> str:
    if target.builder == "onnxruntime":
        return "ONNX Runtime"
    name = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[target.builder]
    return f"{name} {target.tensorrt}"


def _built(target: Target) -> str:
    return {"anywhere": "here", "device": "on device", None: ""}[target.builds_on]


def _range(target: Target) -> str:
    return "" if target.tensorrt_range is None else "{} to below {}".format(*target.tensorrt_range)


def _typing(target: Target) -> str:
    if target.builds_on is None:
        return ""
    return "strong, there is no other" if target.strongly_typed else "strong, by a flag"
