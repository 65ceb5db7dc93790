"""Results as people read them: rich tables from the values that the verbs return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from depthwire.report import REPORT_HTML
from depthwire.reporters import megabytes, stage_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rich.console import RenderableType

    from depthwire._results import DryRun, Inspection, Result
    from depthwire.artifact import CustomOp, EngineInfo, KernelsInfo, Manifest
    from depthwire.runtime.doctor import Finding
    from depthwire.runtime.verify_report import VerifyReport


def pairs_table(pairs: Iterable[tuple[str, object]], title: str | None = None) -> Table:
    """Return a two-column table of facts; absent ones are left out."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in pairs:
        if value not in (None, "", [], {}):
            table.add_row(label, Text(str(value)))
    return table


def rows_table(rows: Sequence[Sequence[object]], columns: Sequence[str], title: str | None = None) -> Table:
    """Return a table with one header per column; numbers are right-aligned."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(
            *(Text("" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else str(cell)) for cell in row)
        )
    return table


def show_structure(structure: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the residual stream: facts, one row per sublayer, and what breaks it."""
    final = structure["final"]
    yield pairs_table(
        [
            ("origin", f"{structure['origin']['module']} ({structure['origin']['node']})"),
            ("width", structure["width"]),
            ("sublayers", len(structure["sublayers"])),
            ("final norm", ", ".join(_norm(norm) for norm in final["norms"]) or "none"),
            ("streams", structure["streams"]),
        ],
        "residual stream",
    )
    rows = [
        (
            sublayer["index"],
            sublayer["kind"],
            sublayer["module"],
            ", ".join(_norm(norm) for norm in sublayer["norms"]) or "none",
            ", ".join(_write(write) for write in sublayer["writes"]),
        )
        for sublayer in structure["sublayers"]
    ]
    yield rows_table(rows, ("#", "kind", "module", "norm", "write"))
    if structure["breaks"]:
        breaks = [(b["code"], b["at"], b["detail"]) for b in structure["breaks"]]
        yield rows_table(breaks, ("break", "at", "why"), "what keeps the stream from being rewritten")
    else:
        yield "every reader goes through a norm: the stream can be lifted"


def _norm(norm: Mapping[str, Any]) -> str:
    kind = {"rms": "RMSNorm", "layer": "LayerNorm"}[norm["kind"]]
    return f"{kind} {norm['module']} (eps {norm['eps']:g})"


def _write(write: Mapping[str, Any]) -> str:
    scaled = "" if write["scale"] == 1 else f" * {write['scale']:g}"
    skip = "" if write["skip_scale"] == 1 else f", skip * {write['skip_scale']:g}"
    return f"{write['node']}{scaled}{skip}"


def show_passes(passes: Sequence[Mapping[str, Any]]) -> Table:
    """Return one row per pass and one per decline."""
    rows: list[Sequence[object]] = []
    for record in passes:
        options = ", ".join(f"{key}={value}" for key, value in record["options"].items())
        rows.append((record["name"], options, record["rewrites"], ""))
        rows += [("", "", "", f"declined {d['code']} at {d['at']}: {d['got']}") for d in record["declines"]]
        rows += [("", "", "", note) for note in record["notes"]]
    return rows_table(rows, ("pass", "options", "rewrites", "declines"), "passes")


def show_explanation(passes: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """Yield one row per pass, and one per place that a pass left alone: where, what it needs there, what it found."""
    rows = [(each["name"], each["rewrites"], len(each["declines"]), f"{each['seconds']:.2f} s") for each in passes]
    yield rows_table(rows, ("pass", "rewrites", "declines", "time"), "passes")
    declines = [decline for each in passes for decline in each["declines"]]
    if declines:
        cells = [[decline[key] for key in ("code", "at", "want", "got")] for decline in declines]
        yield rows_table(cells, ("left alone because", "at", "wanted", "found"), "declines")
    notes = [(each["name"], note) for each in passes for note in each["notes"]]
    if notes:
        yield rows_table(notes, ("pass", "what was weighed"), "notes")


def show_engine(engine: EngineInfo) -> Table:
    """Return the facts of one engine."""
    return pairs_table(
        [
            ("target", engine.target),
            ("builder", f"{engine.builder} {engine.version}"),
            ("file", engine.file),
            ("compute capabilities", ", ".join(engine.compute_capabilities)),
            ("size", megabytes(engine.bytes)),
            ("build", f"{engine.seconds:.1f} s, {megabytes(engine.peak_rss_bytes)} peak"),
            ("layers", _counts(engine.layers)),
            ("dtypes", _counts(engine.dtypes)),
            ("notes", "; ".join(engine.notes)),
        ],
        "engine",
    )


def show_kernels(kernels: KernelsInfo) -> Table:
    """Return the facts of the compiled GPU kernels."""
    return pairs_table(
        [
            ("compiler", f"{kernels.compiler} {kernels.version}"),
            ("compute capabilities", ", ".join(kernels.compute_capabilities)),
            ("kernels", kernels.kernels),
            ("size", megabytes(kernels.bytes)),
            ("compilation", f"{kernels.seconds:.1f} s"),
            ("notes", "; ".join(kernels.notes)),
        ],
        "GPU kernels",
    )


def _custom(name: str, op: CustomOp) -> str:
    return f"{name} {op.count} ({'with' if op.body else 'WITHOUT'} a function body)"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def show_inspection(inspection: Inspection) -> Iterator[RenderableType]:
    """Yield what was found about a model or an artefact."""
    source = inspection.source
    facts = [(name, source[name]) for name in ("reference", "kind", "model", "task", "revision")]
    yield pairs_table(facts, "source")
    if inspection.structure is not None:
        yield from show_structure(inspection.structure)
    if inspection.reads is not None:
        yield show_reads(inspection.reads)
    if inspection.depth_weights is not None:
        yield show_depth_weights(inspection.depth_weights)
    if inspection.artifact is not None:
        yield from show_manifest(inspection.artifact.manifest)


def show_reads(reads: Sequence[Mapping[str, Any]]) -> Table:
    """Return one row per AttnRes read: who takes it, its sources by the modules that made them, and what is special."""
    rows = []
    for index, read in enumerate(reads):
        sources = ", ".join(source["module"] or source["node"] for source in read["sources"])
        special = ", ".join(f"{name}={value}" for name, value in read["options"].items())
        rows.append((index, read["reader"] or read["node"], len(read["sources"]), sources, special))
    return rows_table(rows, ("#", "read by", "n", "sources", "options"), "AttnRes reads")


def show_depth_weights(weights: Mapping[str, Any]) -> Table:
    """Return one row per read: the source it takes most of, and the weights of all, oldest first."""
    rows = []
    for read in weights["reads"]:
        most = max(read["sources"], key=lambda source: source["weight"])
        shares = " ".join(f"{source['weight']:.2f}" for source in read["sources"])
        rows.append((read["module"] or read["name"], most["module"] or most["name"], f"{most['weight']:.2f}", shares))
    title = f"depth weights, mean over {weights['tokens']} tokens"
    return rows_table(rows, ("read by", "most from", "weight", "weights, oldest source first"), title)


def show_manifest(manifest: Manifest) -> Iterator[RenderableType]:
    """Yield the summary of an artefact: interface, operators, passes, files, engines."""
    yield pairs_table(
        [
            ("written by", f"depthwire {manifest.depthwire}, {manifest.created}"),
            ("target", manifest.recipe.get("target")),
            ("AttnRes", manifest.recipe.get("attn_res") or "none"),
            ("opsets", ", ".join(f"{domain or 'ai.onnx'} {number}" for domain, number in manifest.opsets.items())),
            ("weights", megabytes(manifest.weight_bytes)),
            ("operators", _counts({name: n for name, n in manifest.ops.items() if name not in manifest.custom_ops})),
            ("custom ops", ", ".join(_custom(name, op) for name, op in manifest.custom_ops.items())),
        ],
        "artefact",
    )
    tensors = [("input", i.name, i.dtype, str(i.shape)) for i in manifest.inputs]
    tensors += [("output", o.name, o.dtype, str(o.shape)) for o in manifest.outputs]
    yield rows_table(tensors, ("", "name", "dtype", "shape"), "interface")
    yield show_passes([info.model_dump(mode="json") for info in manifest.passes])
    files = [(name, megabytes(entry.bytes), entry.sha256[:16]) for name, entry in sorted(manifest.files.items())]
    yield rows_table(files, ("file", "size", "sha256 (all checked)"), "files")
    for engine in manifest.engines.values():
        yield show_engine(engine)
    if manifest.kernels is not None:
        yield show_kernels(manifest.kernels)


def show_dry_run(plan: DryRun) -> Iterator[RenderableType]:
    """Yield what a conversion would do."""
    target = plan.target
    engine = f"engine by {target['builder']} for {', '.join(target['compute_capabilities'])}"
    sizes = [(part, megabytes(count)) for part, count in plan.bytes_by_part.items()]
    room = (
        "" if plan.free_bytes is None else f"{megabytes(plan.free_bytes)} free, {'fits' if plan.fits else 'TOO LITTLE'}"
    )
    yield pairs_table(
        [
            ("source", f"{plan.source['reference']} ({plan.source['model'] or plan.source['kind']})"),
            ("AttnRes", plan.recipe.attn_res or "none"),
            ("target", f"{target['name']} ({target['title']}), opset {target['opset']}"),
            ("engine", engine if target["engine"] else "none"),
            ("would write", ", ".join(f"{part} {size}" for part, size in sizes)),
            ("disk", room),
        ],
        "dry run (nothing is written)",
    )
    if plan.structure is None:
        yield "the model has no residual stream"
    else:
        yield from show_structure(plan.structure)
    yield show_passes(plan.passes)


def show_comparison(report: VerifyReport) -> Iterator[RenderableType]:
    """Yield the numbers of a comparison."""
    from depthwire.runtime.verify_format import format_report

    yield "\n".join(format_report(report))


def show_result(result: Result) -> Iterator[RenderableType]:
    """Yield the comparison, the engine, the table of stages, and where everything lies."""
    from depthwire.runtime.target import load_target

    if result.verdict is not None:
        yield from show_comparison(result.verdict)
    if result.engine is not None:
        yield show_engine(result.engine)
    yield stage_table(result.stages)
    yield f"artefact: {result.artifact.root}"
    yield f"report:   {result.artifact.path(REPORT_HTML)}"
    target = load_target(str(result.artifact.manifest.recipe["target"]))
    if target.builds_on == "device":
        yield f"engine:   built on the device: depthwire bundle {result.artifact.root} --target {target.name}"


def show_findings(findings: Sequence[Finding]) -> Iterator[RenderableType]:
    """Yield one row per finding, then the commands on lines of their own, to be copied whole."""
    yield rows_table(
        [(f.name, f.status, f.version or "", f.detail) for f in findings], ("what", "status", "version", "")
    )
    for finding in findings:
        if finding.remedy is not None:
            yield f"{finding.name} ({finding.status}):  {finding.remedy}"
